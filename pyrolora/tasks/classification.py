"""Classification: one label an example."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from pyrolora.columns import Batch
from pyrolora.errors import DataError
from pyrolora.tasks.base import Task


class Classification(Task):
    """y ~ Categorical(softmax(f)), with f (..., b, classes) the network's logits."""

    name = "classification"
    classes = frozenset(
        {
            *modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values(),
            *modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values(),
        }
    )
    linearisable = True
    tempers = True

    @classmethod
    def matches(cls, network: nn.Module) -> bool:
        config: Any = getattr(network, "config", None)
        return (
            super().matches(network)
            and config.problem_type in (None, "single_label_classification")
            and config.num_labels > 1
        )

    def law(self, output: Tensor, batch: Batch) -> dist.TorchDistribution:
        return dist.Categorical(logits=self.logits(output, batch), validate_args=False)

    def logits(self, output: Tensor, batch: Batch) -> Tensor:
        """What the probabilities are the softmax of, (..., b, classes)."""
        return self.tempered(output)

    def targets(self, batch: Batch) -> Tensor | None:
        return batch.get("labels")

    def curvature(self, output: Tensor, batch: Batch) -> Iterator[Tensor]:
        """√p_c (e_c − p) for every class c, which add up to diag(p) − p pᵀ."""
        probs = self.logits(output.detach(), batch).softmax(-1)
        units = torch.eye(probs.shape[-1], dtype=probs.dtype, device=probs.device)
        for prob, unit in zip(probs.unbind(-1), units, strict=True):
            yield prob.sqrt()[..., None] * (unit - probs)

    def check_labels(self, labels: Tensor, network: nn.Module) -> None:
        check_whole_numbers(
            labels,
            "classification needs one whole-number label an example",
            "for real-valued targets use task='regression'",
        )
        classes = getattr(getattr(network, "config", None), "num_labels", None)
        if classes is not None:
            _check_classes(classes, labels)

    def check_output(self, output: Tensor, labels: Tensor) -> None:
        if output.dim() != 2:
            raise DataError(
                "classification needs one row of logits an example, (n, classes); the network gave "
                f"shape {tuple(output.shape)}"
            )
        _check_classes(output.shape[-1], labels)


def check_whole_numbers(labels: Tensor, need: str, remedy: str) -> None:
    """Raise `DataError` unless labels are one whole number >= 0 each."""
    check_one_label(labels, need)
    if labels.dtype.is_floating_point or labels.dim() != 1:
        raise DataError(
            f"{need}, got labels of dtype {labels.dtype} and shape {tuple(labels.shape)}; "
            + (remedy if labels.dim() == 1 else "take the number out of its list, labels[:, 0]")
        )
    low = int(labels.min())
    if low < 0:
        raise DataError(
            f"labels must be >= 0, got {low}; leave out examples without a label, "
            "for example with data.filter(lambda row: row['label'] >= 0)"
        )


def check_one_label(labels: Tensor, need: str) -> None:
    """Raise `DataError` for several labels per example."""
    if labels.dim() > 1 and labels.numel() != labels.shape[0]:
        raise DataError(
            f"{need}, got labels of dtype {labels.dtype} and shape {tuple(labels.shape)}: several "
            "labels per example (multi-label classification, a tag per token, or several targets) "
            "are not supported yet"
        )


def _check_classes(classes: int, labels: Tensor) -> None:
    low, high = int(labels.min()), int(labels.max())
    if high >= classes:
        raise DataError(
            f"the network has {classes} classes, got labels from {low} to {high}; load it with "
            f"num_labels={high + 1}, or map the labels to 0..{classes - 1}"
        )
