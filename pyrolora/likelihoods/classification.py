"""Classification: one label an example."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from pyrolora.errors import DataError
from pyrolora.likelihoods.base import Likelihood
from pyrolora.types import Batch

_CLASSES = {
    *modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values(),
    *modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values(),
}


class Classification(Likelihood):
    """y ~ Categorical(softmax(f)), with f (..., b, classes) the network's logits."""

    name = "classification"

    @classmethod
    def matches(cls, network: nn.Module) -> bool:
        config: Any = getattr(network, "config", None)
        return (
            type(network).__name__ in _CLASSES
            and config.problem_type in (None, "single_label_classification")
            and config.num_labels > 1
        )

    def law(self, output: Tensor, batch: Batch) -> dist.TorchDistribution:
        return dist.Categorical(logits=output, validate_args=False)

    def targets(self, batch: Batch) -> Tensor | None:
        return batch.get("labels")

    def check_labels(self, labels: Tensor, network: nn.Module) -> None:
        if labels.dtype.is_floating_point or labels.dim() != 1:
            raise DataError(
                "classification needs one whole-number label an example, got labels of dtype "
                f"{labels.dtype} and shape {tuple(labels.shape)}; for real-valued targets use "
                "likelihood='regression'"
            )
        classes = getattr(getattr(network, "config", None), "num_labels", None)
        low = int(labels.min())
        if low < 0:
            raise DataError(f"labels must be >= 0, got {low}; leave out unlabelled examples")
        if classes is not None:
            _check_classes(classes, labels)

    def check_output(self, output: Tensor, labels: Tensor) -> None:
        if output.dim() != 2:
            raise DataError(
                "classification needs one row of logits an example, (n, classes); the network gave "
                f"shape {tuple(output.shape)}"
            )
        _check_classes(output.shape[-1], labels)


def _check_classes(classes: int, labels: Tensor) -> None:
    low, high = int(labels.min()), int(labels.max())
    if high >= classes:
        raise DataError(
            f"the network has {classes} classes, got labels from {low} to {high}; load it with "
            f"num_labels={high + 1}, or map the labels to 0..{classes - 1}"
        )
