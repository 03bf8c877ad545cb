"""Texts, chats, and prompts with completions: columns, templates, labels, packing."""
