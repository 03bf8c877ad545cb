"""Multiple choice: which of an example's choices is right."""

from __future__ import annotations

from itertools import chain
from typing import Any, ClassVar

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyrolora.columns import CHOICE_MASK, LABELS, Batch
from pyrolora.data import Collator
from pyrolora.data.collate import whole_as_long
from pyrolora.data.columns import CHOICES, context_columns
from pyrolora.data.examples import is_nested
from pyrolora.data.tokenising import encode_choices
from pyrolora.errors import DataError
from pyrolora.tasks.checkpoint import Checkpoint
from pyrolora.tasks.classification import Classification, check_whole_numbers
from pyrolora.tasks.unsupported import classes_of

# In place of -inf, with which an entropy's gradient is NaN; its exponential is 0 in every dtype.
IMPOSSIBLE = -1e30


class ChoiceCollator(Collator):
    """Examples with several choices to a batch of inputs (b, choices, ...) and ``choice_mask``.

    A choice that is missing or masked gets a copy of the example's first one: for an empty row the
    network might give NaN.
    """

    several_rows = True

    def __init__(self, network: nn.Module, tokenizer: Any) -> None:
        super().__init__(network, tokenizer)
        self.taken.add(CHOICE_MASK)

    def check_data(self, examples: Any) -> None:
        """Take data with and without choices; `encode` and `choices` say what is missing."""

    def encode(self, data: datasets.Dataset) -> tuple[datasets.Dataset, tuple[str, ...]]:
        encoded = encode_choices(data, self.encoder)
        return encoded, (CHOICES, *context_columns(data))

    def check(self, examples: Any, labels: Tensor | None, explicit: set[str]) -> None:
        """Raise `DataError` for examples without choices, and labels that are none of them."""
        for i in range(len(examples)):
            _, mask = self.choices(examples[i])
            if labels is not None:
                check_choice(i, int(labels[i]), [j for j, real in enumerate(mask) if real])

    def choices(self, example: Any) -> tuple[list[dict[str, Any]], list[bool]]:
        """Return the inputs of each choice, and which of them can be chosen."""
        row = self.example(example)
        row.pop(LABELS, None)
        stored = row.pop(CHOICE_MASK, None)
        sizes = {name: len(value) if is_nested(value) else 0 for name, value in row.items()}
        size = max(sizes.values(), default=0)
        mask = [True] * size if stored is None else [bool(real) for real in stored]
        if {*sizes.values(), len(mask)} != {size} or not any(mask):
            raise DataError(
                "an example of multiple choice needs one list of tokens per choice, (choices, T), "
                f"under each of its inputs, and a choice to choose; got {sizes} choices"
            )
        first = mask.index(True)
        picked = [j if real else first for j, real in enumerate(mask)]
        return [{name: value[j] for name, value in row.items()} for j in picked], mask

    def __call__(self, examples: list[Any]) -> dict[str, Tensor]:
        rows, masks = zip(*map(self.choices, examples), strict=True)
        size = max(map(len, masks))
        flat = chain.from_iterable((*row, *row[:1] * (size - len(row))) for row in rows)
        batch = super().__call__(list(flat))
        batch = {name: t.unflatten(0, (len(rows), size)) for name, t in batch.items()}
        batch[CHOICE_MASK] = torch.tensor(
            [[*mask, *[False] * (size - len(mask))] for mask in masks]
        )
        labels = [self.example(example).get(LABELS) for example in examples]
        if labels[0] is not None:
            batch[LABELS] = whole_as_long(torch.as_tensor(np.asarray(labels)))
        return batch


def check_choice(example: int, label: int, choices: list[int]) -> None:
    """Raise `DataError` for a label that is none of an example's choices."""
    if label not in choices:
        raise DataError(
            f"the label of example {example} is {label}, and its choices are {choices}; count the "
            "choices from 0"
        )


class MultipleChoice(Classification):
    """Choices: y ~ Categorical(softmax(f)) over those of each example.

    f (..., b, choices) are the network's scores. Choices that ``choice_mask`` leaves out have
    probability 0.
    """

    name = "multiple-choice"
    serves = None
    reads = "a score per choice, by a new head where transformers has one"
    aliases = ()
    collator: ClassVar[type[Collator]] = ChoiceCollator
    extras: ClassVar[tuple[str, ...]] = (CHOICE_MASK,)
    names_classes = False
    classes = classes_of("MULTIPLE_CHOICE")
    auto = "AutoModelForMultipleChoice"

    @classmethod
    def matches(cls, network: nn.Module) -> bool:  # whatever its ``num_labels``
        return type(network).__name__ in cls.classes

    @classmethod
    def implied(cls, checkpoint: Checkpoint) -> bool:
        writes = checkpoint.is_a("CAUSAL_LM") and not checkpoint.has_class("MULTIPLE_CHOICE")
        return checkpoint.layout == "choices" and not writes

    @classmethod
    def load(cls, checkpoint: Checkpoint, like: nn.Module | None = None) -> PreTrainedModel:
        return super(Classification, cls).load(checkpoint, like)

    def logits(self, output: Tensor, batch: Batch) -> Tensor:
        mask, scores = batch.get(CHOICE_MASK), self.tempered(output)
        return scores if mask is None else scores.masked_fill(~mask.bool(), IMPOSSIBLE)

    def check_labels(self, labels: Tensor, network: nn.Module) -> None:
        check_whole_numbers(
            labels,
            "multiple choice needs the number of the right choice as the label of an example",
            "count the choices of an example from 0",
        )

    def check_output(self, output: Tensor, labels: Tensor) -> None:
        if output.dim() != 2:
            raise DataError(
                "multiple choice needs one score per choice, (n, choices); the network gave shape "
                f"{tuple(output.shape)}"
            )
