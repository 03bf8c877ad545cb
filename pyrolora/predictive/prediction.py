"""Predictions: what the draws of a posterior say about each example, with its uncertainty."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self

import pandas as pd
import torch
from torch import Tensor

from pyrolora.checks import share
from pyrolora.columns import IGNORED, Batch
from pyrolora.errors import NonFiniteError
from pyrolora.tasks import (
    CausalLM,
    Classification,
    MaskedLM,
    MultipleChoice,
    Regression,
    Task,
    TokenTask,
)

_BY_DRAW = ("draws", "log_likelihood")  # tensors (S, n, ...); of the others n comes first


def log_mean_exp(scores: Tensor) -> Tensor:
    """log mean_s exp(score_s) over the first dimension."""
    return scores.logsumexp(0) - math.log(len(scores))


@dataclass(frozen=True)
class Prediction(ABC):
    """S draws of the predictive law of n examples.

    Attributes
    ----------
    targets
        The labels, (n,), or None without labels in the data.
    log_likelihood
        log p(y_i | draw), (S, n), or None without labels.
    """

    task: ClassVar[type[Task]]

    targets: Tensor | None
    log_likelihood: Tensor | None

    @staticmethod
    @abstractmethod
    def reduce(task: Task, outputs: Iterable[Tensor], batch: Batch) -> dict[str, Tensor]:
        """What is kept of the outputs (s, b, ...) of one batch, by name."""

    @classmethod
    @abstractmethod
    def collect(cls, records: Sequence[dict[str, Tensor]], task: Task) -> Prediction:
        """The prediction of all batches."""

    @abstractmethod
    def predictive_draws(self) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
        """Draws of the targets, ``y``, and of what their law depends on: name -> (S, n, ...) and
        the names of the dimensions after the first."""

    @abstractmethod
    def to_pandas(self) -> pd.DataFrame:
        """One row an example."""

    @property
    @abstractmethod
    def uncertainty(self) -> Tensor:
        """One number an example, (n,), high where the prediction is not sure: what selective
        prediction and the detection of other data go by."""

    @property
    @abstractmethod
    def loss(self) -> Tensor | None:
        """What each prediction costs, (n,), or None without labels."""

    def check_finite(self) -> None:
        """Raise `NonFiniteError` where the network's outputs are no numbers, for no prediction
        comes of them. (A draw may give a class no probability at all; that is a number.)"""
        draws = getattr(self, "draws", None)
        if draws is None or torch.isfinite(draws).all():
            return
        broken = (
            (~torch.isfinite(draws)).flatten(2).any(-1) if draws.dim() > 2 else ~draws.isfinite()
        )
        example = int(broken.any(0).nonzero()[0])
        raise NonFiniteError(
            f"the network gives NaN or infinity for example {example}, in {int(broken.sum())} of "
            f"{broken.numel()} predictions of a draw: the posterior's numbers, or the network's, "
            "are too large for its precision; load it in float32, or fit with a lower learning rate"
        )

    def select(self, examples: Tensor) -> Self:
        """The prediction of the examples of these numbers, (m,), in their order."""
        chosen = {
            part.name: value.index_select(1 if part.name in _BY_DRAW else 0, examples)
            for part in fields(self)
            if isinstance(value := getattr(self, part.name), Tensor)
        }
        return replace(self, **chosen)

    def counted(self) -> Self:
        """The prediction of the examples in which something is predicted."""
        return self

    @property
    def log_predictive(self) -> Tensor | None:
        """log mean_s p(y_i | draw s), (n,), in nats."""
        return None if self.log_likelihood is None else log_mean_exp(self.log_likelihood)


@dataclass(frozen=True)
class ClassPrediction(Prediction):
    """Class probabilities: ``draws`` is (S, n, C); of multiple choice, C is the largest number of
    choices and an example with fewer has probability 0 at the others.

    The uncertainty of an example splits as H[p̄] = mean_s H[p_s] + mutual information: ``entropy``
    is total, ``aleatoric`` what every draw is unsure of, ``epistemic`` what draws disagree on; in
    nats.

    ``classes`` are the names of the classes, where the network or the data of the fit have any;
    tables have them in place of numbers.
    """

    task = Classification

    draws: Tensor
    classes: tuple[str, ...] | None = None

    @staticmethod
    def reduce(task: Task, outputs: Iterable[Tensor], batch: Batch) -> dict[str, Tensor]:
        assert isinstance(task, Classification)
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
            draws=torch.cat([_pad(record["draws"], classes, 0.0) for record in records], dim=1),
            targets=_join(records, "targets", 0),
            log_likelihood=_join(records, "log_likelihood", 1),
        )

    @property
    def probs(self) -> Tensor:
        """p̄ = mean_s p_s, (n, C)."""
        return self.draws.mean(0)

    @property
    def predicted(self) -> Tensor:
        """The most probable class, (n,)."""
        return self.probs.argmax(-1)

    @property
    def entropy(self) -> Tensor:
        """H[p̄], (n,)."""
        return _entropy(self.probs)

    @property
    def aleatoric(self) -> Tensor:
        """mean_s H[p_s], (n,)."""
        return _entropy(self.draws).mean(0)

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

    def interval(self, mass: float = 0.9) -> tuple[Tensor, Tensor]:
        """Bounds (n, C) of the central interval of each class probability over draws."""
        tail = _tail(mass)
        return self.draws.quantile(tail, dim=0), self.draws.quantile(1 - tail, dim=0)

    def predictive_draws(self) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
        labels = torch.distributions.Categorical(probs=self.draws).sample()
        return {"y": (labels, ("example",)), "probs": (self.draws, ("example", "class"))}

    def to_pandas(self) -> pd.DataFrame:
        names = self.classes or tuple(str(i) for i in range(self.probs.shape[1]))
        columns: dict[str, Tensor] = {
            f"prob_{name}": self.probs[:, i] for i, name in enumerate(names)
        }
        columns |= {
            "predicted": self.predicted,
            "entropy": self.entropy,
            "aleatoric": self.aleatoric,
            "epistemic": self.epistemic,
        }
        table = _frame(columns, self.targets)
        if self.classes is not None:
            for name in {"predicted", "target"} & {*table}:
                table[name] = table[name].map(dict(enumerate(self.classes)))
        return table


@dataclass(frozen=True)
class RegressionPrediction(Prediction):
    """Means: ``draws`` is (S, n), in units of the target; ``noise_scale`` is the learned σ, times
    √T of a calibrated posterior."""

    task = Regression

    draws: Tensor
    noise_scale: float

    @staticmethod
    def reduce(task: Task, outputs: Iterable[Tensor], batch: Batch) -> dict[str, Tensor]:
        means, scores = [], []
        labels = task.targets(batch)
        for output in outputs:
            means.append(output.cpu())
            if labels is not None:
                scores.append(task.log_prob(output, batch).cpu())
        record = {"draws": torch.cat(means)}
        if labels is not None:
            record |= {"log_likelihood": torch.cat(scores), "targets": labels.cpu()}
        return record

    @classmethod
    def collect(cls, records: Sequence[dict[str, Tensor]], task: Task) -> RegressionPrediction:
        assert isinstance(task, Regression)
        return cls(
            draws=torch.cat([record["draws"] for record in records], dim=1),
            targets=_join(records, "targets", 0),
            log_likelihood=_join(records, "log_likelihood", 1),
            noise_scale=float(task.noise().detach()),
        )

    @property
    def mean(self) -> Tensor:
        """The predictive mean, (n,)."""
        return self.draws.mean(0)

    @property
    def predicted(self) -> Tensor:
        """The predictive mean, (n,)."""
        return self.mean

    @property
    def aleatoric(self) -> Tensor:
        """σ: the standard deviation of the noise, (n,)."""
        return torch.full_like(self.mean, self.noise_scale)

    @property
    def epistemic(self) -> Tensor:
        """The standard deviation of the means over draws, (n,)."""
        return self.draws.std(0, correction=0)

    @property
    def std(self) -> Tensor:
        """The predictive standard deviation, √(σ² + epistemic²), (n,)."""
        return (self.aleatoric.square() + self.epistemic.square()).sqrt()

    @property
    def entropy(self) -> Tensor:
        """Entropy of the Gaussian with the predictive variance, (n,): an upper bound, in nats."""
        return 0.5 * (2 * torch.pi * torch.e * self.std.square()).log()

    @property
    def uncertainty(self) -> Tensor:
        """The predictive standard deviation, (n,), in units of the target."""
        return self.std

    @property
    def loss(self) -> Tensor | None:
        """The squared error of the mean, (n,), in units of the target squared."""
        return None if self.targets is None else (self.mean - self.targets).square()

    def interval(self, mass: float = 0.9) -> tuple[Tensor, Tensor]:
        """Bounds (n,) of the central interval of the predictive law, the mixture over draws of
        N(mean_s, σ²), by bisection of its distribution function."""
        tail = _tail(mass)
        return self._quantile(tail), self._quantile(1 - tail)

    def _quantile(self, level: float) -> Tensor:
        width = 10 * self.noise_scale
        low, high = self.draws.amin(0) - width, self.draws.amax(0) + width
        for _ in range(60):
            middle = (low + high) / 2
            below = torch.special.ndtr((middle - self.draws) / self.noise_scale).mean(0) < level
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def predictive_draws(self) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
        noise = self.noise_scale * torch.randn_like(self.draws)
        return {"y": (self.draws + noise, ("example",)), "mean": (self.draws, ("example",))}

    def to_pandas(self) -> pd.DataFrame:
        low, high = self.interval()
        columns = {"mean": self.mean, "std": self.std, "epistemic": self.epistemic}
        return _frame({**columns, "low_90": low, "high_90": high}, self.targets)


@dataclass(frozen=True)
class TokenPrediction(Prediction):
    """Predictions of the tokens of given texts: per token, NaN where a token does not count.

    ``entropy`` and ``aleatoric`` are (n, T), in nats; (n, T-1) of a causal model, which predicts
    every token but the first. The (S, n, T, vocabulary) probabilities are never held.
    ``log_likelihood`` sums an example's counted tokens; ``num_tokens`` (n,) says how many there
    are.
    """

    task = TokenTask

    entropy: Tensor
    aleatoric: Tensor
    num_tokens: Tensor

    @staticmethod
    def reduce(task: Task, outputs: Iterable[Tensor], batch: Batch) -> dict[str, Tensor]:
        assert isinstance(task, TokenTask)
        mask = task.token_mask(batch)
        labels = task.targets(batch)
        total: Tensor | float = 0.0
        aleatoric: Tensor | float = 0.0
        scores, count = [], 0
        for output in outputs:
            probs = task.token_logits(output).softmax(-1)
            total = total + probs.sum(0)
            aleatoric = aleatoric + _entropy(probs).sum(0)
            count += len(output)
            if labels is not None:
                scores.append(task.log_prob(output, batch).cpu())
        assert isinstance(total, Tensor)
        assert isinstance(aleatoric, Tensor)
        record = {
            "entropy": _entropy(total / count).masked_fill(~mask, torch.nan).cpu(),
            "aleatoric": (aleatoric / count).masked_fill(~mask, torch.nan).cpu(),
            "num_tokens": mask.sum(-1).cpu(),
        }
        if labels is not None:
            counted = labels.masked_fill(~mask, IGNORED)
            record |= {"log_likelihood": torch.cat(scores), "targets": counted.cpu()}
        return record

    @classmethod
    def collect(cls, records: Sequence[dict[str, Tensor]], task: Task) -> TokenPrediction:
        length = max(record["entropy"].shape[1] for record in records)
        padded = [
            {
                **record,
                "entropy": _pad(record["entropy"], length, torch.nan),
                "aleatoric": _pad(record["aleatoric"], length, torch.nan),
                **(
                    {"targets": _pad(record["targets"], length, IGNORED)}
                    if "targets" in record
                    else {}
                ),
            }
            for record in records
        ]
        return cls(
            entropy=torch.cat([record["entropy"] for record in padded]),
            aleatoric=torch.cat([record["aleatoric"] for record in padded]),
            num_tokens=torch.cat([record["num_tokens"] for record in padded]),
            targets=_join(padded, "targets", 0),
            log_likelihood=_join(padded, "log_likelihood", 1),
        )

    @property
    def epistemic(self) -> Tensor:
        """The mutual information of token and draw, of the shape of ``entropy``."""
        return (self.entropy - self.aleatoric).clamp(min=0)

    @property
    def uncertainty(self) -> Tensor:
        """The mean entropy of the tokens that count, (n,), in nats a token."""
        return self.entropy.nanmean(-1)

    @property
    def loss(self) -> Tensor | None:
        """The negative log-likelihood of the mixture over draws, (n,), in nats a token."""
        scores = self.log_predictive
        return None if scores is None else -scores / self.num_tokens

    def counted(self) -> Self:
        return self.select(self.num_tokens.nonzero().flatten())

    def predictive_draws(self) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
        return {}  # the texts that the model might have written are not drawn

    def to_pandas(self) -> pd.DataFrame:
        columns = {
            "num_tokens": self.num_tokens,
            "entropy": self.uncertainty,
            "aleatoric": self.aleatoric.nanmean(-1),
            "epistemic": self.epistemic.nanmean(-1),
        }
        if self.loss is not None:
            columns["nll"] = self.loss
        return _frame(columns, None)


@dataclass(frozen=True)
class TokenScores(TokenPrediction):
    """The log-likelihoods of given texts alone: their entropies, which take a softmax over the
    vocabulary at every token, are NaN."""

    @staticmethod
    def reduce(task: Task, outputs: Iterable[Tensor], batch: Batch) -> dict[str, Tensor]:
        assert isinstance(task, TokenTask)
        mask, labels = task.token_mask(batch), task.targets(batch)
        assert labels is not None
        unknown = torch.full(mask.shape, torch.nan)
        return {
            "entropy": unknown,
            "aleatoric": unknown,
            "num_tokens": mask.sum(-1).cpu(),
            "log_likelihood": torch.cat([task.log_prob(o, batch).cpu() for o in outputs]),
            "targets": labels.masked_fill(~mask, IGNORED).cpu(),
        }


def _tail(mass: float) -> float:
    share("the mass of an interval", mass, "(0, 1)")
    return (1 - mass) / 2


def _entropy(probs: Tensor) -> Tensor:
    return -torch.special.xlogy(probs, probs).sum(-1)


def _join(records: Sequence[dict[str, Tensor]], name: str, dim: int) -> Tensor | None:
    if any(name not in record for record in records):
        return None
    return torch.cat([record[name] for record in records], dim=dim)


def _pad(tensor: Tensor, length: int, value: float) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, length - tensor.shape[-1]), value=value)


def _frame(columns: dict[str, Tensor], targets: Tensor | None) -> pd.DataFrame:
    if targets is not None:
        columns = {**columns, "target": targets}
    return pd.DataFrame({name: tensor.numpy() for name, tensor in columns.items()})


PREDICTIONS: dict[type[Task], type[Prediction]] = {
    task: kind
    for task in (Classification, Regression, CausalLM, MultipleChoice, MaskedLM)
    for kind in (ClassPrediction, RegressionPrediction, TokenPrediction)
    if issubclass(task, kind.task)
}
