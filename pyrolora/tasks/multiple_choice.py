"""Multiple choice: which of an example's own choices is right."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from pyrolora.columns import CHOICE_MASK, Batch
from pyrolora.errors import DataError
from pyrolora.tasks.classification import Classification, check_whole_numbers

# In place of -inf, which makes NaN of an entropy's gradient; its exponential is 0 in every dtype.
IMPOSSIBLE = -1e30


class MultipleChoice(Classification):
    """y ~ Categorical(softmax(f)) over the choices of each example, with f (..., b, choices) the
    network's score of each. Choices that ``choice_mask`` leaves out have probability 0.
    """

    name = "multiple_choice"
    classes = frozenset(modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values())
    extras = (CHOICE_MASK,)

    @classmethod
    def matches(cls, network: nn.Module) -> bool:  # whatever its ``num_labels``
        return type(network).__name__ in cls.classes

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
                "multiple choice needs one score a choice, (n, choices); the network gave shape "
                f"{tuple(output.shape)}"
            )
