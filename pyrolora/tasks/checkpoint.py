"""A network that is named, and the data that it is loaded for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from transformers.models.auto import modeling_auto

from pyrolora.columns import INPUTS, LABELS
from pyrolora.data.columns import (
    SPANS,
    TARGETS,
    has_choices,
    has_preferences,
    is_list,
    tags_column,
)
from pyrolora.data.examples import first_of
from pyrolora.data.inputs import MODEL_INPUTS
from pyrolora.data.labels import class_names, has_class_labels, raw_labels
from pyrolora.data.media.media import KINDS, Media
from pyrolora.data.multi_hot import has_label_lists, target_column
from pyrolora.data.spans import is_squad
from pyrolora.tasks.unsupported import classes_of

Layout = Literal["spans", "choices", "preferences", "words", "example", "labels", "tokens"]
"""Places of answers; choices; a preference between two texts; words with a tag each; one label per
example; several of them; one per token."""


@dataclass(frozen=True)
class Checkpoint:
    """A hub id or folder, its configuration, and the examples that its network will read."""

    name: str
    config: Any
    examples: Any
    tokenizer: Any = None

    @property
    def architecture(self) -> str:
        """The class in transformers of the saved network; "" where the checkpoint has none."""
        return (self.config.architectures or [""])[0]

    def is_a(self, kind: str) -> bool:
        """Return whether transformers' list of that kind ("CAUSAL_LM") has the architecture."""
        return self.architecture in classes_of(kind)

    @property
    def continues(self) -> bool:
        """Whether the saved network writes text on from its input."""
        return self.is_a("CAUSAL_LM") or self.writes_of_pictures

    @property
    def decodes(self) -> bool:
        """Whether the saved network reads with its encoder and writes a text with its decoder."""
        decodes = bool(getattr(self.config, "is_encoder_decoder", False))
        return decodes and any(map(self.is_a, ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")))

    @property
    def may_decode(self) -> bool:
        """Whether the saved network writes with its decoder, or is the base of one that does.

        BART is saved as such a base: the head is made of the embeddings.
        """
        base = self.architecture == modeling_auto.MODEL_MAPPING_NAMES.get(self.config.model_type)
        return self.decodes or (base and self.has_class("SEQ_TO_SEQ_CAUSAL_LM"))

    @cached_property
    def row(self) -> dict[str, Any]:
        """The first example."""
        return first_of(self.examples, INPUTS) if len(self.examples) else {}

    @cached_property
    def media(self) -> type[Media] | None:
        """The pictures or sounds in the data, if the network reads such; None for texts."""
        for kind in KINDS:
            if any(name in self.row for name in kind.inputs) and "input_ids" not in self.row:
                return kind
        return next((k for k in KINDS if self.has_class(k.heads) and k.raw_in(self.examples)), None)

    @property
    def processes(self) -> bool:
        """Whether the data are pictures or sounds themselves, not tensors of them."""
        inputs = () if self.media is None else self.media.inputs
        return self.media is not None and not any(name in self.row for name in inputs)

    @property
    def writes_of_pictures(self) -> bool:
        """Whether the network reads texts with pictures, and writes text with one decoder."""
        both = getattr(self.config, "is_encoder_decoder", False)
        return self.is_a("IMAGE_TEXT_TO_TEXT") and not both

    def has_class(self, kind: str) -> bool:
        """Return whether transformers has a class of that kind for the saved architecture."""
        names = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES")
        return getattr(self.config, "model_type", None) in names

    @cached_property
    def layout(self) -> Layout | None:
        """The form of the labels; None without labels, and without choices."""
        if is_squad(self.examples) or {*SPANS} <= {*self.row}:
            return "spans"
        if has_choices(self.examples):
            return "choices"
        if has_preferences(self.row):
            return "preferences"
        if tags_column(self.examples) is not None:
            return "words"
        if has_class_labels(self.examples):
            return "example"
        column = target_column(self.examples)
        listed = column is not None and is_list(self.examples.features[column])
        if self.row.get(LABELS) is None and not listed:  # the first of a list may be missing
            return None
        if self.decodes and any(name in self.row for name in MODEL_INPUTS):
            labels = np.asarray(self.row[LABELS])
            if labels.dtype.kind in "iu" and not {*labels.flat} <= {0, 1}:
                return "tokens"  # of the text to write, of any length
        return "labels" if has_label_lists(self.examples) else "tokens"

    @property
    def has_head(self) -> bool:
        """Whether the checkpoint has a head for classes of examples."""
        kinds = ("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION")
        return any(map(self.is_a, kinds))

    @cached_property
    def names(self) -> list[str] | None:
        """The names of the classes in the data, where there is one label per example."""
        return class_names(self.examples)

    @property
    def has_text_labels(self) -> bool:
        """Whether the label of an example is a text: the name of a class, or a text to write."""
        return any(isinstance(self.row.get(name), str) for name in TARGETS)

    @property
    def has_real_labels(self) -> bool:
        """Whether the labels are real numbers."""
        return self.names is None and raw_labels(self.examples).is_floating_point()
