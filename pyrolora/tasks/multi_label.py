"""Multi-label classification: the classes that an example has, none, one or several of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import pandas as pd
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyrolora.columns import IGNORED, Batch
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
from pyrolora.tasks.classification import ClassPrediction, ClassProbabilities
from pyrolora.tasks.evidence import Baseline, Promise
from pyrolora.tasks.heads import load_head, outputs_like, outputs_of
from pyrolora.tasks.prediction import joined, table_of
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


@dataclass(frozen=True)
class MultiLabelPrediction(ClassProbabilities):
    """Probabilities of labels: ``draws`` is (S, n, C), ``targets`` (n, C) of 0 and 1.

    The labels of an example are independent given a draw. Each splits its uncertainty as
    H[p̄] = mean_s H[p_s] + mutual information, (n, C): ``label_entropy``, ``label_aleatoric``,
    ``label_epistemic``, in nats. ``entropy``, ``aleatoric`` and ``epistemic`` are their sums over
    labels, (n,). The entropy of all labels together is at most the sum of theirs.
    """

    higher_is_better: ClassVar[Mapping[str, bool | None]] = {
        "micro_f1": True,
        "macro_f1": True,
        "exact_match": True,
        "mean_average_precision": True,
        "label_auroc": True,
        "nll": False,
        "ece": False,
        "brier": False,
        "aurc": False,
    }

    @staticmethod
    def reduce(task: MultiLabel, outputs: Iterable[Tensor], batch: Batch) -> dict[str, Tensor]:
        probs, scores, labels = [], [], task.targets(batch)
        for output in outputs:
            probs.append(task.tempered(output).sigmoid().cpu())
            if labels is not None:
                scores.append(task.log_prob(output, batch).cpu())
        record = {"draws": torch.cat(probs)}
        if labels is not None:
            record |= {"log_likelihood": torch.cat(scores), "targets": labels.long().cpu()}
        return record

    @classmethod
    def collect(cls, records: Sequence[dict[str, Tensor]], task: Any) -> MultiLabelPrediction:
        return cls(
            draws=torch.cat([record["draws"] for record in records], dim=1),
            targets=joined(records, "targets", 0),
            log_likelihood=joined(records, "log_likelihood", 1),
        )

    @property
    def predicted(self) -> Tensor:
        """1 for labels of a probability above one half, else 0, (n, C)."""
        return (self.probs > 0.5).long()

    @property
    def label_entropy(self) -> Tensor:
        """H[p̄] of each label, (n, C)."""
        return _binary_entropy(self.probs)

    @property
    def label_aleatoric(self) -> Tensor:
        """mean_s H[p_s] of each label, (n, C)."""
        return _binary_entropy(self.draws).mean(0)

    @property
    def label_epistemic(self) -> Tensor:
        """H[p̄] − mean_s H[p_s] >= 0, the mutual information of a label and the draw, (n, C)."""
        return (self.label_entropy - self.label_aleatoric).clamp(min=0)

    @property
    def entropy(self) -> Tensor:
        """The sum of the labels' entropies, (n,)."""
        return self.label_entropy.sum(-1)

    @property
    def aleatoric(self) -> Tensor:
        """The sum of the labels' aleatoric parts, (n,)."""
        return self.label_aleatoric.sum(-1)

    @property
    def epistemic(self) -> Tensor:
        """The sum of the labels' epistemic parts, (n,)."""
        return self.label_epistemic.sum(-1)

    @property
    def uncertainty(self) -> Tensor:
        """The sum of the labels' entropies, (n,), in nats."""
        return self.entropy

    @property
    def loss(self) -> Tensor | None:
        """The share of the labels that are predicted wrongly, (n,): the Hamming loss."""
        wrong = self._wrong()
        return None if wrong is None else wrong.float().mean(-1)

    def _wrong(self) -> Tensor | None:
        return None if self.targets is None else self.predicted != self.targets

    def predictive_draws(self) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
        dims = (self.row, "class")
        return {"y": (torch.bernoulli(self.draws).long(), dims), "probs": (self.draws, dims)}

    def to_pandas(self) -> pd.DataFrame:
        columns = {
            **self.prob_columns(),
            "entropy": self.entropy,
            "aleatoric": self.aleatoric,
            "epistemic": self.epistemic,
        }
        table = table_of(columns, None)
        table.insert(self.draws.shape[-1], "predicted", self._names(self.predicted))
        if self.targets is not None:
            table["target"] = self._names(self.targets)
        return table

    def _names(self, labels: Tensor) -> pd.Series:
        """Return the list of the classes of each example, as names or as numbers."""
        names: Sequence[Any] = self.classes or range(labels.shape[-1])
        rows = [[names[c] for c in row.nonzero().flatten().tolist()] for row in labels]
        return pd.Series(rows, dtype=object)

    uncertainty_name = "sum of the labels' predictive entropies (nats)"
    risk_name = "share of wrong labels"
    risk_from_zero = True
    surprise_note = (
        "{count} of {total} examples have a wrong label; these have the most confident of them."
    )

    @property
    def surprise(self) -> Tensor | None:
        """The highest confidence of a wrong label, (n,); NaN where all labels are right."""
        wrong = self._wrong()
        if wrong is None:
            return None
        highest = self._confidence().masked_fill(~wrong, -1).amax(-1)
        return highest.masked_fill(highest < 0, torch.nan)

    def _confidence(self) -> Tensor:
        return torch.maximum(self.probs, 1 - self.probs)

    def decisions(self) -> ClassPrediction:
        """Return a prediction with a row per example and label, of the classes no and yes."""
        yes = self.draws.flatten(1)
        targets = None if self.targets is None else self.targets.flatten()
        return ClassPrediction(targets, None, torch.stack([1 - yes, yes], -1))

    def class_counts(self) -> dict[str, Tensor]:
        counts = {"predicted": self.predicted.sum(0)}
        return counts if self.targets is None else {"target": self.targets.sum(0), **counts}

    def promise(self) -> Promise | None:
        """Return the confidences, and which labels are right, summed over the labels of a row."""
        wrong = self._wrong()
        if wrong is None or len(wrong) < 2:
            return None
        right = (~wrong).double().sum(-1)
        return Promise(
            self._confidence().double().sum(-1),
            right,
            "The mean confidence is {promised:.3f}, and {kept:.3f} of the labels are right: the "
            "confidence is {gap:.3f} too high, with a standard error of {error:.3f}.",
            counts=torch.full_like(right, wrong.shape[-1]),
        )

    def baseline(self, without_adapters: Callable[[], Any]) -> Baseline | None:
        """Return the scores of independent labels with their frequencies in these data."""
        if self.targets is None:
            return None
        y = self.targets.double()
        share = y.mean(0)
        scores = torch.special.xlogy(y, share) + torch.special.xlogy(1 - y, 1 - share)
        wrong = (share > 0.5).double() != y
        return Baseline("frequencies of the labels", scores.sum(-1), wrong.double().mean(-1))

    def columns(self, class_name: Callable[[int, int], str]) -> dict[str, Sequence[Any]]:
        def named(labels: Tensor) -> list[str]:
            rows = [row.nonzero().flatten().tolist() for row in labels]
            return [", ".join(class_name(i, c) for c in row) for i, row in enumerate(rows)]

        return {
            **({} if self.targets is None else {"target": named(self.targets)}),
            "predicted": named(self.predicted),
            "least sure label": [class_name(*pair) for pair in enumerate(self._least_sure())],
            "entropy": self.entropy.tolist(),
            "mutual information": self.epistemic.tolist(),
        }

    def _least_sure(self) -> list[int]:
        return self.label_entropy.argmax(-1).tolist()


def _binary_entropy(probs: Tensor) -> Tensor:
    """Return the entropy of Bernoulli variables, of the shape of ``probs``, in nats."""
    return -torch.special.xlogy(probs, probs) - torch.special.xlogy(1 - probs, 1 - probs)


class MultiLabel(Task):
    """Labels: y_c ~ Bernoulli(sigmoid(f_c)), independent, with f (..., b, classes) the logits.

    log p(y) of an example is the **sum** over classes of log Bernoulli(y_c | sigmoid(f_c)).
    transformers' loss is the mean over examples and classes of −log Bernoulli, so that it is
    −log p / classes of a mean example: its gradient is smaller by the number of classes.
    """

    name = "multi-label-classification"
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
    names = class_names(flat)
    if names is None:
        rows = list(examples.with_format(None)[column])
        known = checkpoint.config.num_labels if checkpoint.has_head else None
        if reading(rows, flat.features["labels"], known) == "multi-hot":
            return {"num_labels": max(len(row or ()) for row in rows)}
        if known is not None:
            return {}
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
