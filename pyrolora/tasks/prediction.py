"""Predictions: draws of the posterior's predictive law, with their uncertainty."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import pandas as pd
import torch
from torch import Tensor

from pyrolora.checks import share
from pyrolora.columns import Batch
from pyrolora.errors import DataError, NonFiniteError
from pyrolora.tasks.evidence import Baseline, Promise


@dataclass(frozen=True)
class Prediction(ABC):
    """S draws of the predictive law, in n rows: one row per example, unless a task says otherwise.

    Attributes
    ----------
    targets
        The labels, (n,), or None without labels in the data.
    log_likelihood
        log p(y_i | draw), (S, n), or None without labels.
    """

    row: ClassVar[str] = "example"
    """The name of a row, and of its dimension in ArviZ."""
    target_dims: ClassVar[tuple[str, ...]] = ("token",)
    """The names of the dimensions of `targets` after the first, in ArviZ."""
    higher_is_better: ClassVar[Mapping[str, bool | None]] = {"nll": False, "aurc": False}
    """The metrics of `evaluate`; None where neither direction is better.

    A fit goes by those with a direction (``metric_for_best_model``).
    """

    by_draw: ClassVar[tuple[str, ...]] = ("draws", "log_likelihood")
    """Fields of shape (S, n, ...); in all other tensors n comes first."""

    targets: Tensor | None
    log_likelihood: Tensor | None

    @staticmethod
    @abstractmethod
    def reduce(task: Any, outputs: Iterable[Tensor], batch: Batch) -> dict[str, Tensor]:
        """Return what is kept of the outputs (s, b, ...) of one batch, by name."""

    @classmethod
    @abstractmethod
    def collect(cls, records: Sequence[dict[str, Tensor]], task: Any) -> Prediction:
        """Return the prediction that the records of all batches make."""

    @abstractmethod
    def predictive_draws(self) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
        """Draw the targets, ``y``, and return them with what their law depends on.

        Each name has a tensor (S, n, ...) and the names of its dimensions after the first.
        """

    @abstractmethod
    def to_pandas(self) -> pd.DataFrame:
        """Return a table with one line per row."""

    @property
    @abstractmethod
    def uncertainty(self) -> Tensor:
        """One number per row, (n,), high where the prediction is not sure.

        Selective prediction and the detection of other data go by it.
        """

    @property
    @abstractmethod
    def loss(self) -> Tensor | None:
        """The cost of each prediction, (n,), or None without labels."""

    def metrics(self) -> Mapping[str, float | Tensor]:
        """Return metrics of this kind by name, beside those that `evaluate` knows of already.

        A metric is a number; or its terms, (n,), if it is their mean, from which its standard error
        follows without a bootstrap. Asked of predictions with labels only. `higher_is_better`
        states their directions.
        """
        return {}

    @property
    def examples(self) -> Tensor:
        """The number of each row's example in the data, (n,)."""
        return torch.arange(len(self.uncertainty))

    def examples_of(self, terms: int) -> int:
        """Return how many examples of these data ``terms`` of the fit's likelihood are."""
        return terms

    def places(self) -> dict[str, Tensor]:
        """Return numbers of each row that tell where it is in its example, each (n,)."""
        return {}

    def in_order(self, order: Sequence[int]) -> Self:
        """Return the prediction in the order of the data; it was made in the ``order`` given."""
        return self.select(torch.as_tensor(order).argsort())

    def check_finite(self) -> None:
        """Raise `NonFiniteError` for outputs of the network that are not finite.

        A draw may give a class no probability at all; that is finite.
        """
        draws = getattr(self, "draws", None)
        if draws is None or torch.isfinite(draws).all():
            return
        broken = (
            (~torch.isfinite(draws)).flatten(2).any(-1) if draws.dim() > 2 else ~draws.isfinite()
        )
        example = int(self.examples[broken.any(0).nonzero()[0]])
        raise NonFiniteError(
            f"the network gives NaN or infinity for example {example}, in {int(broken.sum())} of "
            f"{broken.numel()} predictions of a draw: the posterior's numbers, or the network's, "
            "are too large for its precision; load it in float32, or fit with a lower learning rate"
        )

    def select(self, rows: Tensor) -> Self:
        """Return the prediction of the rows with these numbers, (m,), in their order."""
        if not isinstance(rows, Tensor) or rows.dtype != torch.long or rows.ndim != 1:
            raise DataError(f"rows must be a tensor of whole numbers, (m,), got {rows!r:.60}")
        chosen = {
            part.name: value.index_select(1 if part.name in self.by_draw else 0, rows)
            for part in fields(self)
            if isinstance(value := getattr(self, part.name), Tensor)
        }
        return replace(self, **chosen)

    def of_examples(self, numbers: Tensor) -> Self:
        """Return the prediction of the examples with these numbers, one of which may recur."""
        return self.select(numbers)

    def named(self, names: Mapping[int, str]) -> Self:
        """Return the prediction with these names of its classes, if it has classes."""
        return self

    def counted(self) -> Self:
        """Return the prediction of the rows in which something is predicted."""
        return self

    @property
    def log_predictive(self) -> Tensor | None:
        """The log-likelihood log mean_s p(y_i | draw s) of the mixture, (n,), in nats."""
        return None if self.log_likelihood is None else log_mean_exp(self.log_likelihood)

    # What plots, ArviZ and reports ask. A class that leaves an answer as it is here does without
    # the parts that need it.

    uncertainty_name: ClassVar[str] = "uncertainty"
    """The quantity of `uncertainty`, with its unit: the label of an axis."""
    risk_name: ClassVar[str] = "mean loss"
    """The mean of `loss` over rows, with its unit: the label of an axis."""
    risk_from_zero: ClassVar[bool] = False
    """Whether the axis of the risk begins at 0."""
    surprise_note: ClassVar[str] = ""
    """A sentence about the rows of the highest `surprise`, with ``{count}`` of ``{total}``."""

    @property
    def probs(self) -> Tensor | None:
        """Class probabilities, (n, C), where the targets are classes; else None."""
        return None

    def decisions(self) -> Prediction | None:
        """Return a prediction with one row per choice of a class; None where none is chosen."""
        return None if self.probs is None else self

    def class_counts(self) -> dict[str, Tensor]:
        """Return how often each class is the ``target`` and how often ``predicted``, (C,)."""
        if self.probs is None:
            return {}
        size = self.probs.shape[-1]
        counts = {"predicted": self.probs.argmax(-1).bincount(minlength=size)}
        if self.targets is not None:
            counts = {"target": self.targets.bincount(minlength=size), **counts}
        return counts

    @property
    def token_entropy(self) -> Tensor | None:
        """The entropy of every token, (n, T), where a row is a text; else None.

        NaN where a token is not predicted. Tokens that nothing predicts may be missing in front.
        """
        return None

    @property
    def surprise(self) -> Tensor | None:
        """How much worse than promised each row came out, (n,); NaN where it came out well.

        None without labels, or where nothing is promised.
        """
        return None

    def promise(self) -> Promise | None:
        """Return what the rows promise and what they keep; None where that is not known."""
        return None

    def baseline(self, without_adapters: Callable[[], Prediction | None]) -> Baseline | None:
        """Return the scores that a fit should beat; None where there are none.

        By default they are those of the network without its adapters, which ``without_adapters``
        predicts with.
        """
        other = without_adapters()
        if other is None or other.log_predictive is None:
            return None
        return Baseline("network without the adapters", other.log_predictive)

    def facts(self) -> dict[str, str]:
        """Return what is worth knowing about the rows as a whole, by name."""
        return {}

    def columns(self, class_name: Callable[[int, int], str]) -> dict[str, Sequence[Any]]:
        """Return the columns of a report's table of rows, by heading: one value per row.

        ``class_name(row, number)`` is the name of a class, or of a choice of that row.
        """
        columns: dict[str, Sequence[Any]] = {}
        if self.targets is not None and self.targets.dim() == 1:
            columns["target"] = self.targets.tolist()
        if self.loss is not None:
            columns["loss"] = self.loss.tolist()
        return {**columns, self.uncertainty_name: self.uncertainty.tolist()}


def log_mean_exp(scores: Tensor) -> Tensor:
    """Return log mean_s exp(score_s) over the first dimension."""
    return scores.logsumexp(0) - math.log(len(scores))


def tail_of(mass: float) -> float:
    """Return the probability on either side of a central interval."""
    share("the mass of an interval", mass, "(0, 1)")
    return (1 - mass) / 2


def entropy_of(probs: Tensor) -> Tensor:
    """Return the entropy over the last dimension, in nats."""
    return -torch.special.xlogy(probs, probs).sum(-1)


def joined(records: Sequence[dict[str, Tensor]], name: str, dim: int) -> Tensor | None:
    """Return that part of all records in one tensor; None where a record has none."""
    if any(name not in record for record in records):
        return None
    return torch.cat([record[name] for record in records], dim=dim)


def filled(tensor: Tensor, length: int, value: float) -> Tensor:
    """Return a tensor whose last dimension is filled up to ``length``."""
    return torch.nn.functional.pad(tensor, (0, length - tensor.shape[-1]), value=value)


def table_of(columns: Mapping[str, Tensor], targets: Tensor | None) -> pd.DataFrame:
    """Return a table of these columns, and of the targets if there are any."""
    if targets is not None:
        columns = {**columns, "target": targets}
    return pd.DataFrame({name: tensor.numpy() for name, tensor in columns.items()})
