"""The batch, and the names of its columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Batch = Mapping[str, "Tensor"]
"""Column name -> tensor whose first dimension counts examples; the targets are ``labels``."""

LABELS = "labels"
INPUTS = "inputs"
"""The input of a network that is not from transformers."""

PLACES = "logits_to_keep"
"""(b, K), the same in each row: the places of a text whose logits the law reads.

The name is that of transformers' argument. Without the column a network gives all its logits.
"""

CHOICE_MASK = "choice_mask"
"""(b, choices), true at an example's own choices."""

TAGS = ("ner_tags", "pos_tags", "chunk_tags", "tags")
"""The names that data sets give to the tags of words."""

IGNORED = -100
"""The label of a token that does not count, as in transformers."""
