"""Multi-label classification: the classes that an example has, none, one or several of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyrolora.columns import IGNORED, LABELS, Batch
from pyrolora.data import Collator
from pyrolora.data.examples import is_plain
from pyrolora.data.labels import class_names, no_labels, raw_labels
from pyrolora.data.multi_hot import (
    check_lists,
    flat_labels,
    indicator_columns,
    multi_hot,
    reading,
    target_column,
)
from pyrolora.data.target import Target
from pyrolora.errors import DataError
from pyrolora.tasks.base import Task
from pyrolora.tasks.checkpoint import Checkpoint
from pyrolora.tasks.heads import load_head, outputs_like, outputs_of
from pyrolora.tasks.label_prediction import MultiLabelPrediction
from pyrolora.tasks.unsupported import MULTI_LABEL, classes_of


class LabelsCollator(Collator):
    """Examples with the list of their classes to a batch with a 0 or 1 per class."""

    targets = (
        "a column 'labels' or 'label' with a list per example, of its classes or of a 0 or 1 per "
        "class, or a column of 0 and 1 for each class of the network, under its name"
    )

    def number(
        self, examples: Any, network: nn.Module, task: Target
    ) -> tuple[Any, list[str] | None]:
        return multi_hot(examples, network, task)


class MultiLabel(Task):
    """Labels: y_c ~ Bernoulli(sigmoid(f_c)), independent, with f (..., b, classes) the logits.

    log p(y) of an example is the **sum** over classes of log Bernoulli(y_c | sigmoid(f_c)).
    transformers' loss is the mean over examples and classes of −log Bernoulli, so that it is
    −log p / classes of a mean example: its gradient is smaller by the number of classes.
    """

    name = "multi-label-classification"
    serves = "classes"
    reads = "the classes that an example has, none or several"
    aliases = ("multi-label", "multilabel-classification", "multilabel")
    collator = LabelsCollator
    discrete = True
    names_classes = True
    classes = classes_of("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION")
    problem_type = MULTI_LABEL
    prediction = MultiLabelPrediction
    linearisable = True
    tempers = True

    @classmethod
    def matches(cls, network: nn.Module) -> bool:
        config: Any = getattr(network, "config", None)
        return super().matches(network) and config.problem_type == MULTI_LABEL

    @classmethod
    def implied(cls, checkpoint: Checkpoint) -> bool:
        return checkpoint.layout == "labels"

    @classmethod
    def load(cls, checkpoint: Checkpoint, like: nn.Module | None = None) -> PreTrainedModel:
        outputs = outputs_like(like) or _outputs(checkpoint)
        return load_head(checkpoint, {**outputs, "problem_type": MULTI_LABEL})

    def law(self, output: Tensor, batch: Batch) -> dist.TorchDistribution:
        logits = self.tempered(output)
        return dist.Bernoulli(logits=logits, validate_args=False).to_event(1)

    def targets(self, batch: Batch) -> Tensor | None:
        labels = batch.get("labels")
        return None if labels is None else labels.float()

    def curvature(self, output: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Yield √(p_c (1 − p_c)) e_c for every class c; their Σ v vᵀ is diag(p (1 − p))."""
        probs = self.tempered(output.detach()).sigmoid()
        root = (probs * (1 - probs)).sqrt()
        for unit in torch.eye(root.shape[-1], dtype=root.dtype, device=root.device):
            yield root * unit

    def check_labels(self, labels: Tensor, network: nn.Module) -> None:
        need = "multi-label classification needs a 0 or 1 per example and class, (n, classes)"
        if labels.dim() != 2:
            raise DataError(
                f"{need}, got labels of shape {tuple(labels.shape)}; for one label per example use "
                "task='classification'"
            )
        if (labels == IGNORED).any():
            raise DataError(
                f"{need}, got lists of several lengths; lists of an example's classes are read "
                "from a datasets.Dataset or a list of dicts alone"
            )
        wrong = ((labels != 0) & (labels != 1)).any(-1).nonzero().flatten()
        if len(wrong):
            raise DataError(
                f"{need}, got {labels[wrong[0]].tolist()} for example {int(wrong[0])}; several "
                "real targets per example are not supported, a regression has one"
            )
        classes = getattr(getattr(network, "config", None), "num_labels", None)
        _check_width(classes, labels)

    def check_output(self, output: Tensor, labels: Tensor) -> None:
        if output.dim() != 2:
            raise DataError(
                "multi-label classification needs one row of logits per example, (n, classes); the "
                f"network gave shape {tuple(output.shape)}"
            )
        _check_width(output.shape[-1], labels)


def _check_width(classes: int | None, labels: Tensor) -> None:
    """Raise `DataError` for labels of another number of classes than the network has."""
    if classes is not None and labels.shape[-1] != classes:
        raise DataError(
            f"the network has {classes} classes, and the labels of an example have "
            f"{labels.shape[-1]} places; load it with num_labels={labels.shape[-1]}, or give a 0 "
            f"or 1 for each of the {classes}"
        )


def _outputs(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the outputs that the labels of a checkpoint's data need.

    Raises
    ------
    DataError
        For a column per class, which does not say that it is one, and labels with two readings.
    """
    examples = checkpoint.examples
    column = target_column(examples)
    if not is_plain(examples):
        return {"num_labels": int(raw_labels(examples).shape[-1])}
    if column is None:
        raise DataError(_no_lists(examples))
    check_lists(examples, column)
    flat = flat_labels(examples, column)
    if flat is None:
        raise DataError(f"the labels of an example are a list, got a column {column!r} of others")
    if not any(entry is not None for entry in flat[LABELS]):
        raise DataError(
            f"no example has a class in the column {column!r}, so that there is none to learn; "
            "leave out columns without labels, or pass a network that knows its classes"
        )
    names = class_names(flat, least=1)
    if names is None:
        rows = list(examples.with_format(None)[column])
        known = checkpoint.config.num_labels if checkpoint.has_head else None
        if reading(rows, flat.features[LABELS], known) == "multi-hot":
            return {"num_labels": max(len(row or ()) for row in rows)}
        return {"num_labels": int(raw_labels(flat).max()) + 1} if known is None else {}
    return outputs_of(checkpoint, names, flat)


def _no_lists(examples: datasets.Dataset) -> str:
    """Return the message for data without a column of labels."""
    found = indicator_columns(examples)
    if not found:
        return no_labels(examples.column_names, LabelsCollator.targets)
    return (
        "the data has no column 'labels', and which of its columns of 0 and 1 are labels is not "
        f"known before the network is, got {found}; make one of them, data.map(lambda row: "
        f"{{'labels': [name for name in {found} if row[name]]}}, remove_columns={found}), or pass "
        "a network whose id2label has the names of the columns"
    )
