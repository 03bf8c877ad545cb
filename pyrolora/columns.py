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

DECODER_IDS, DECODER_MASK = "decoder_input_ids", "decoder_attention_mask"
"""The input of the decoder of an encoder-decoder: the tokens before those that it is to write."""

CHOICE_MASK = "choice_mask"
"""(b, choices), true at an example's own choices."""

CHOICE_TOKENS = "choice_tokens"
"""(b, choices), the token that stands for each choice; -100 where an example has fewer."""

CHOICE_PLACES = "choice_places"
"""(b, choices, K), the places before the tokens of each choice; -1 where it has fewer."""

MARGIN = "margin"
"""(b,), by how much the reward of the preferred text has to be larger."""

COMPLETION_MASK = "completion_mask"
"""A mask of the shape of the tokens, 1 at those of the completion, or of a choice."""

TAGS = ("ner_tags", "pos_tags", "chunk_tags", "tags")
"""The names that data sets give to the tags of words."""

PICTURES = ("image", "img", "picture")
SOUNDS = ("audio", "sound", "speech")
"""The names of columns with pictures and sounds, whatever their feature."""

PATHS = ("file_name", "filename", "file", "file_path", "filepath", "path")
PICTURE_PATHS = ("image_path", "image_file", "image_file_path", *PATHS)
SOUND_PATHS = ("audio_path", "audio_file", "audio_file_path", *PATHS)
"""The names of columns with paths; `PATHS` are those of datasets' folders of files, and usual."""

IGNORED = -100
"""The label of a token that does not count, as in transformers."""
