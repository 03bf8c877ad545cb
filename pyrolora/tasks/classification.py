"""Classification: one label per example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pandas as pd
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyrolora.columns import Batch
from pyrolora.errors import DataError
from pyrolora.tasks.base import Task
from pyrolora.tasks.checkpoint import Checkpoint
from pyrolora.tasks.evidence import Baseline, Promise
from pyrolora.tasks.heads import load_head, outputs_like, outputs_of
from pyrolora.tasks.prediction import Prediction, entropy_of, filled, joined, table_of, tail_of
from pyrolora.tasks.unsupported import classes_of


@dataclass(frozen=True)
class ClassProbabilities(Prediction):
    """Probabilities of classes: ``draws`` is (S, n, C).

    ``classes`` are the names of the classes, where the network or the data of the fit have any;
    tables show them in place of numbers.
    """

    draws: Tensor
    classes: tuple[str, ...] | None = None

    def named(self, names: Mapping[int, str]) -> Self:
        """Return the prediction with these names of its classes, unless two share a name."""
        classes = tuple(names.get(i, str(i)) for i in range(self.draws.shape[-1]))
        return replace(self, classes=classes if len({*classes}) == len(classes) else None)

    @property
    def probs(self) -> Tensor:
        """p̄ = mean_s p_s, (n, C)."""
        return self.draws.mean(0)

    def interval(self, mass: float = 0.9) -> tuple[Tensor, Tensor]:
        """Return bounds (n, C) of the central interval of each class probability over draws."""
        tail = tail_of(mass)
        return self.draws.quantile(tail, dim=0), self.draws.quantile(1 - tail, dim=0)

    def decided(self, probs: Tensor) -> Tensor:
        """Return the class that probabilities (..., C) choose, (...)."""
        return probs.argmax(-1)

    def prob_columns(self) -> dict[str, Tensor]:
        """Return the probability of each class, (n,), by the name of its column in a table."""
        names = self.classes or tuple(str(i) for i in range(self.draws.shape[-1]))
        return {f"prob_{name}": self.probs[:, i] for i, name in enumerate(names)}


@dataclass(frozen=True)
class ClassPrediction(ClassProbabilities):
    """Class probabilities: ``draws`` is (S, n, C).

    In multiple choice, C is the largest number of choices, and an example with fewer has
    probability 0 at the others.

    The uncertainty of an example splits as H[p̄] = mean_s H[p_s] + mutual information. ``entropy``
    is the total, ``aleatoric`` the part that every draw has, ``epistemic`` the part on which draws
    disagree; in nats.
    """

    higher_is_better: ClassVar[Mapping[str, bool | None]] = {
        "accuracy": True,
        "nll": False,
        "ece": False,
        "brier": False,
        "error_auroc": True,
        "aurc": False,
    }

    @staticmethod
    def reduce(task: Classification, outputs: Iterable[Tensor], batch: Batch) -> dict[str, Tensor]:
        probs, scores = [], []
        labelled = task.targets(batch) is not None
        for output in outputs:
            probs.append(task.logits(output, batch).softmax(-1).cpu())
            if labelled:
                scores.append(task.log_prob(output, batch).cpu())
        record = {"draws": torch.cat(probs)}
        if labelled:
            record |= {"log_likelihood": torch.cat(scores), "targets": batch["labels"].cpu()}
        return record

    @classmethod
    def collect(cls, records: Sequence[dict[str, Tensor]], task: Task) -> ClassPrediction:
        classes = max(record["draws"].shape[-1] for record in records)
        return cls(
            draws=torch.cat([filled(record["draws"], classes, 0.0) for record in records], dim=1),
            targets=joined(records, "targets", 0),
            log_likelihood=joined(records, "log_likelihood", 1),
        )

    @property
    def predicted(self) -> Tensor:
        """The most probable class, (n,)."""
        return self.decided(self.probs)

    @property
    def entropy(self) -> Tensor:
        """H[p̄], (n,)."""
        return entropy_of(self.probs)

    @property
    def aleatoric(self) -> Tensor:
        """mean_s H[p_s], (n,)."""
        return entropy_of(self.draws).mean(0)

    @property
    def epistemic(self) -> Tensor:
        """H[p̄] − mean_s H[p_s] >= 0, the mutual information of label and draw, (n,)."""
        return (self.entropy - self.aleatoric).clamp(min=0)

    @property
    def uncertainty(self) -> Tensor:
        """The entropy, (n,), in nats."""
        return self.entropy

    @property
    def loss(self) -> Tensor | None:
        """1 where the prediction is wrong, else 0, (n,)."""
        return None if self.targets is None else (self.predicted != self.targets).float()

    def predictive_draws(self) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
        labels = torch.distributions.Categorical(probs=self.draws).sample()
        return {"y": (labels, (self.row,)), "probs": (self.draws, (self.row, "class"))}

    def to_pandas(self) -> pd.DataFrame:
        columns = {
            **self.prob_columns(),
            "predicted": self.predicted,
            "entropy": self.entropy,
            "aleatoric": self.aleatoric,
            "epistemic": self.epistemic,
        }
        table = table_of(columns, self.targets)
        if self.classes is not None:
            for name in {"predicted", "target"} & {*table}:
                table[name] = table[name].map(dict(enumerate(self.classes)))
        return table

    uncertainty_name = "predictive entropy (nats)"
    risk_name = "error rate"
    risk_from_zero = True
    surprise_note = "{count} of {total} answers are wrong; these are the most confident of them."

    @property
    def surprise(self) -> Tensor | None:
        """The confidence of the wrong answers, (n,); NaN for the right ones."""
        if self.loss is None:
            return None
        return self.probs.amax(-1).masked_fill(self.loss == 0, torch.nan)

    def promise(self) -> Promise | None:
        """Return the confidences, and which answers are right."""
        return Promise.of_confidence(
            self.probs.amax(-1),
            self.loss,
            "The mean confidence is {promised:.3f}, and {kept:.3f} of the answers are right: the "
            "confidence is {gap:.3f} too high, with a standard error of {error:.3f}.",
        )

    def baseline(self, without_adapters: Callable[[], Prediction | None]) -> Baseline | None:
        """Return the scores of the frequencies of these labels, among the classes of each row."""
        if self.targets is None:
            return None
        hits = np.eye(self.probs.shape[-1])[self.targets.numpy()]
        possible = (self.probs.numpy() > 0) | (hits > 0)  # rows may have fewer choices
        counts = hits.sum(0) * possible
        scores = np.log((counts * hits).sum(1) / counts.sum(1))
        wrong = counts.argmax(1) != hits.argmax(1)
        return Baseline(
            "frequencies of the labels", torch.from_numpy(scores), torch.from_numpy(wrong)
        )

    def columns(self, class_name: Callable[[int, int], str]) -> dict[str, Sequence[Any]]:
        def named(numbers: Tensor) -> list[str]:
            return [class_name(row, number) for row, number in enumerate(numbers.tolist())]

        return {
            **({} if self.targets is None else {"target": named(self.targets)}),
            "predicted": named(self.predicted),
            "probability": self.probs.amax(-1).tolist(),
            "entropy": self.entropy.tolist(),
            "mutual information": self.epistemic.tolist(),
        }


class Classification(Task):
    """Classes: y ~ Categorical(softmax(f)), with f (..., b, classes) the network's logits."""

    name = "classification"
    serves: ClassVar[Literal["classes", "tags", "value", "text"] | None] = "classes"
    reads = "a class per example"
    aliases: ClassVar[tuple[str, ...]] = (
        "text-classification",
        "sentiment-analysis",
        "image-classification",
        "audio-classification",
        "seq-cls",
    )
    discrete = True
    names_classes = True
    classes = classes_of("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION")
    prediction: ClassVar[type[Prediction]] = ClassPrediction
    problem_type: ClassVar[str | None] = "single_label_classification"
    linearisable = True
    tempers = True

    @classmethod
    def matches(cls, network: nn.Module) -> bool:
        config: Any = getattr(network, "config", None)
        return (
            super().matches(network)
            and config.problem_type in (None, cls.problem_type)
            and config.num_labels > 1
        )

    @classmethod
    def implied(cls, checkpoint: Checkpoint) -> bool:
        return checkpoint.layout == "example" and not checkpoint.has_real_labels

    @classmethod
    def load(cls, checkpoint: Checkpoint, like: nn.Module | None = None) -> PreTrainedModel:
        outputs = outputs_like(like) or outputs_of(checkpoint, checkpoint.names)
        return load_head(checkpoint, outputs)

    def law(self, output: Tensor, batch: Batch) -> dist.TorchDistribution:
        return dist.Categorical(logits=self.logits(output, batch), validate_args=False)

    def logits(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the logits of the probabilities, (..., b, classes)."""
        return self.tempered(output)

    def targets(self, batch: Batch) -> Tensor | None:
        return batch.get("labels")

    def curvature(self, output: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Yield √p_c (e_c − p) for every class c; their Σ v vᵀ is diag(p) − p pᵀ."""
        probs = self.logits(output.detach(), batch).softmax(-1)
        units = torch.eye(probs.shape[-1], dtype=probs.dtype, device=probs.device)
        for prob, unit in zip(probs.unbind(-1), units, strict=True):
            yield prob.sqrt()[..., None] * (unit - probs)

    def check_labels(self, labels: Tensor, network: nn.Module) -> None:
        check_whole_numbers(
            labels,
            "classification needs one whole-number label per example",
            "for real-valued targets use task='regression'",
        )
        classes = getattr(getattr(network, "config", None), "num_labels", None)
        if classes is not None:
            check_classes(classes, labels)

    def check_output(self, output: Tensor, labels: Tensor) -> None:
        if output.dim() != 2:
            raise DataError(
                "classification needs one row of logits per example, (n, classes); the network "
                f"gave shape {tuple(output.shape)}"
            )
        check_classes(output.shape[-1], labels)


def check_whole_numbers(labels: Tensor, need: str, remedy: str) -> None:
    """Raise `DataError` unless every label is one whole number >= 0."""
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
            f"{need}, got labels of dtype {labels.dtype} and shape {tuple(labels.shape)}; for "
            "several labels per example use task='multi-label-classification', for a label per "
            "token task='token-classification'; several real targets are not supported"
        )


def check_classes(classes: int, labels: Tensor) -> None:
    """Raise `DataError` for labels that the network has no class for."""
    low, high = int(labels.min()), int(labels.max())
    if high >= classes:
        raise DataError(
            f"the network has {classes} classes, got labels from {low} to {high}; load it with "
            f"num_labels={high + 1}, or map the labels to 0..{classes - 1}"
        )
