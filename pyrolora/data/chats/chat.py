"""Chats to tokens, by the tokenizer's own template, and which of them the assistant says."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pyrolora.errors import DataError

Messages = list[dict[str, Any]]

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The mark in a template of what the assistant says, as transformers looks for it."""
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
"""ShareGPT's names of roles."""
LISTENED = ("assistant", "tool", "function")
"""Roles whose messages a template may rewrite: it drops thoughts, and quotes results."""
UNLIKELY = "\u2620 0"
"""A content that no message has."""
OF_TEMPLATE = TOOLS, TEMPLATE_OPTIONS = "tools", "chat_template_kwargs"
"""Columns with more of what a chat template is given, as in TRL."""


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer.

    Its text is tokenised as it is: what begins and ends a chat is what the template writes. Only
    where it has no special token at all, EOS ends a chat that ends with the assistant.
    """

    tokenizer: Any

    def __post_init__(self) -> None:
        if self.tokenizer is None:
            raise DataError(
                "the data holds chats and there is no tokenizer; pass "
                "tokenizer=AutoTokenizer.from_pretrained(...), of a model that was made for chats"
            )
        if not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                f"the data holds chats, and this {type(self.tokenizer).__name__} has no chat "
                "template; set tokenizer.chat_template, for example to that of the model's variant "
                "for chats (AutoTokenizer.from_pretrained(...).chat_template), or write the chats "
                "as texts in a column 'text'"
            )

    def opened(self, messages: Messages, **more: Any) -> list[int]:
        """Return the tokens of a chat in which it is the assistant's turn."""
        if messages and messages[-1].get("role") == "assistant":
            raise DataError(
                "a chat ends with a message of the assistant, and nothing is left to be written; "
                "leave that message out (its score is that of predict or evaluate), or, where a "
                "completion follows, join it to that"
            )
        text = self.text(messages, add_generation_prompt=True, **more)
        self._check_whole(messages, text, more)
        return self._ids(text)

    def closed(self, messages: Messages, **more: Any) -> list[int]:
        """Return the tokens of a whole chat."""
        text = self.text(messages, **more)
        self._check_whole(messages, text, more)
        return self._ended(self._ids(text), messages)

    def said(self, messages: Messages, **more: Any) -> tuple[list[int], list[bool]]:
        """Return the tokens of a whole chat, and which of them the assistant says.

        The template says so by ``{% generation %}``. In one without, the assistant's part of turn
        i goes from the end of the chat before it, opened for the assistant, to that of the chat
        with it.
        """
        ids = self.closed(messages, **more)
        if self._is_marked(more.get("tools")):
            mask = self._marked(messages, **more)
            mask += [True] * (len(ids) - len(mask))  # EOS, where the template writes none
        else:
            mask = [False] * len(ids)
            for start, stop in self._turns(messages, ids, more):
                mask[start:stop] = [True] * (stop - start)
        if not any(mask):
            raise DataError("the assistant says nothing in a chat; leave it out")
        return ids, mask

    def text(self, messages: Messages, **more: Any) -> str:
        """Return the text that the template makes of a chat.

        Raises
        ------
        DataError
            With the template's own words, for a chat that it refuses.
        """
        try:
            made = self.tokenizer.apply_chat_template(messages, tokenize=False, **more)
        except Exception as error:  # a template is a program, and raises anything
            raise DataError(
                f"the chat template cannot write a chat with the roles "
                f"{[m.get('role') for m in messages]}: {type(error).__name__}: {error}"
            ) from error
        return str(made)

    # Turns of the assistant ----------------------------------------------------------------------

    def _is_marked(self, tools: Any) -> bool:
        return GENERATION.search(self.tokenizer.get_chat_template(tools=tools)) is not None

    def _marked(self, messages: Messages, **more: Any) -> list[bool]:
        made = self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **more
        )
        return [bool(said) for said in made["assistant_masks"]]

    def _turns(
        self, messages: Messages, ids: list[int], more: Mapping[str, Any]
    ) -> list[tuple[int, int]]:
        """Return where the assistant's turns begin and end, in a template that does not say it."""
        turns: list[tuple[int, int]] = []
        for i, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            start = -1
            if i:  # a template need not open a chat of no message
                opened = self._ids(self.text(messages[:i], add_generation_prompt=True, **more))
                start = shared(opened, ids)
            stop = len(ids)
            if i + 1 < len(messages):
                stop = self._end(ids, start, self._ids(self.text(messages[: i + 1], **more)))
            before = turns[-1][1] if turns else 0
            if not before <= start < stop <= len(ids):
                raise DataError(
                    "the chat template does not mark what the assistant says, and that cannot be "
                    "told otherwise: the chat begins with it, or earlier messages are written in "
                    "another way than later ones; put {% generation %} and "
                    "{% endgeneration %} around it (trl.chat_template_utils."
                    "get_training_chat_template has such templates)"
                )
            turns.append((start, stop))
        return turns

    def _end(self, ids: list[int], start: int, until: list[int]) -> int:
        """Return where the turn that begins at ``start`` ends; ``until`` is the chat up to its end.

        A template may write a turn differently once others follow it (without its thoughts, or
        without EOS): then its end is that of the last special token of the turn, with the spaces
        after it.
        """
        common = shared(until, ids)
        if common > start and all(token in self._special for token in until[common:]):
            return common
        places = [k for k in range(start, len(until)) if until[k] in self._special]
        end = until[places[-1] :] if places else []
        for k in range(start, len(ids) - len(end) + 1 if end else start):
            if ids[k : k + len(end)] == end:
                return k + len(end)
        return start

    # Tokens --------------------------------------------------------------------------------------

    def _ids(self, text: str) -> list[int]:
        return [*self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    @cached_property
    def _special(self) -> frozenset[int]:
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        marked = (number for number, token in added.items() if token.special)
        return frozenset([*self.tokenizer.all_special_ids, *marked])

    def _ended(self, ids: list[int], messages: Messages) -> list[int]:
        """Return the tokens with EOS, if the template ends turns without any special token."""
        eos = getattr(self.tokenizer, "eos_token_id", None)
        if eos is None or not messages or messages[-1].get("role") != "assistant":
            return ids
        marks = self._special - {getattr(self.tokenizer, "bos_token_id", None)}
        return ids if marks.intersection(ids) else [*ids, eos]

    def _check_whole(self, messages: Messages, text: str, more: Mapping[str, Any]) -> None:
        """Raise `DataError` for a message, a call or a tool that the template leaves out."""
        for i, message in enumerate(messages):
            content, role = message.get("content"), message.get("role")
            for call in message.get("tool_calls") or ():
                self._check_name(_function(call), f"a tool call of the role {role!r}", text)
            if not isinstance(content, str) or content.strip() in text:
                continue
            if role in LISTENED:  # it may be rewritten, and is left out if another writes the same
                other = {**message, "content": UNLIKELY}
                if self.text([*messages[:i], other, *messages[i + 1 :]], **more) != text:
                    continue
            raise DataError(
                f"the chat template leaves out a message of the role {role!r}, "
                f"{content[:40]!r}; drop such messages, or give them a role that it knows"
            )
        for tool in more.get("tools") or ():
            self._check_name(_function(tool), "a tool", text)

    @staticmethod
    def _check_name(function: Any, what: str, text: str) -> None:
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str) and name not in text:
            raise DataError(
                f"the chat template leaves out {what}, {name[:40]!r}; leave tools out of the data, "
                "write them into the messages, or set tokenizer.chat_template to one that has tools"
            )


def _function(call: Any) -> Any:
    """Return the function of a tool, or of a call of one, with its name."""
    return call.get("function", call) if isinstance(call, Mapping) else None


def shared(some: Sequence[int], others: Sequence[int]) -> int:
    """Return how many tokens two rows have in common from their beginning on."""
    pairs = enumerate(zip(some, others, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(some), len(others)))


def messages_of(chat: Any) -> Messages:
    """Return a chat as messages with ``role`` and ``content``, of ShareGPT's form, too.

    Entries without a value, which a table adds where other messages have them, are left out.

    Raises
    ------
    DataError
        For what is no list of messages.
    """
    if not isinstance(chat, list | tuple) or not chat:
        raise DataError(f"a chat must be a list of at least one message, got {chat!r:.80}")
    return [_message(message) for message in chat]


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DataError(f"a message must be a dict with 'role' and 'content', got {message!r:.80}")
    made = {name: _filled(v) for name, v in message.items() if v is not None}
    if "role" not in made and "from" in made:
        speaker = made.pop("from")
        made = {"role": SPEAKERS.get(speaker, speaker), "content": made.pop("value", None), **made}
    if not isinstance(made.get("role"), str):
        raise DataError(f"a message has no role: {message!r:.80}; give it 'role' and 'content'")
    made.setdefault("content", None)
    if made["content"] is None and "tool_calls" not in made:
        raise DataError(
            f"a message of the role {made['role']!r} has no content; fill it or drop it"
        )
    return made


def _filled(value: Any) -> Any:
    """Return a nested value without the entries that have none."""
    if isinstance(value, Mapping):
        return {name: _filled(part) for name, part in value.items() if part is not None}
    return [_filled(part) for part in value] if isinstance(value, list | tuple) else value


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row has for the template beside its messages: tools, and other options."""
    tools = row.get(TOOLS)
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise DataError(f"the tools of an example are no JSON: {error}") from error
    more = _filled(row.get(TEMPLATE_OPTIONS) or {})
    return {**({"tools": _filled(tools)} if tools else {}), **more}
