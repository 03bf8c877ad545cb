"""The names of a batch's columns."""

from __future__ import annotations

LABELS = "labels"
INPUTS = "inputs"
"""The input of a network that is not from transformers."""

CHOICE_MASK = "choice_mask"
"""(b, choices), true at an example's own choices."""

IGNORED = -100
"""The label of a token that does not count, as in transformers."""
