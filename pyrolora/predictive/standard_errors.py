"""Standard errors of metrics, and of their differences between predictions of the same examples.

The sample is that of the examples: the draws of a posterior are taken as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyrolora import defaults
from pyrolora.checks import whole_number
from pyrolora.predictive.metrics import (
    Ratio,
    Value,
    as_number,
    auroc,
    check_scorable,
    joint_values,
    values,
)
from pyrolora.seeding import DRAWING
from pyrolora.tasks import Prediction

FEWEST = 6
"""The fewest examples on which two means differ that can show anything: if a difference is as
likely to have either sign, all of five have the same one with probability 2 / 2**5 > 0.05."""
ROUNDING = 1e-6  # metrics are means in float32
OUTSIDE = "ood_auroc"


@dataclass(frozen=True)
class Difference:
    """A difference of two metrics, this one minus a reference, with its standard error.

    Attributes
    ----------
    value, error
        The difference, and its standard error; NaN where it is not known.
    low, high
        The ends of the 95 % interval, value ± t error, with t the quantile 0.975 of Student's law
        of n − 1 degrees of freedom, for n examples.
    more_than_chance
        Whether the interval leaves zero out, and, for means, at least six examples differ.
    """

    value: float
    error: float
    low: float
    high: float
    more_than_chance: bool


@dataclass(frozen=True)
class Scores:
    """The metrics of a prediction, with the scatter from which their standard errors follow.

    Attributes
    ----------
    metrics
        The metrics by name.
    influence
        For each metric that is a mean or a ratio r = Σ a / Σ c over examples i, the values
        (a_i − r c_i) n / Σ c, (n,): r varies with the sample as their mean does.
    terms
        For the same metrics a_i n / Σ c, (n,), which say on which examples two predictions differ.
    resampled
        Each other metric of examples that are drawn anew with replacement, (R,): the bootstrap
        (Efron and Tibshirani 1993). Predictions of the same examples have the same samples, so
        that differences are paired.
    examples
        How many examples there are.
    """

    metrics: dict[str, float]
    influence: dict[str, np.ndarray]
    terms: dict[str, np.ndarray]
    resampled: dict[str, np.ndarray]
    examples: int

    def error(self, name: str) -> float:
        """Return the standard error of a metric; NaN where too few samples have it."""
        if name in self.influence:
            return error_of_mean(self.influence[name])
        return scatter(self.resampled[name])

    def errors(self) -> dict[str, float]:
        """Return the standard error of every metric, by name."""
        return {name: self.error(name) for name in self.metrics}

    def difference(self, reference: Scores, name: str) -> Difference:
        """Return how much a metric exceeds that of another prediction of the same examples."""
        value = self.metrics[name] - reference.metrics[name]
        differing = self.examples
        if name in self.influence:
            error = error_of_mean(self.influence[name] - reference.influence[name])
            gaps = np.abs(self.terms[name] - reference.terms[name])
            differing = int((gaps > ROUNDING * (1 + gaps.max())).sum())
        else:
            error = scatter(self.resampled[name] - reference.resampled[name])
        half = _quantile(self.examples - 1) * error
        clear = abs(value) > half and differing >= FEWEST  # False where ``half`` is NaN
        return Difference(value, error, value - half, value + half, clear)


@DRAWING
def scores(
    prediction: Prediction,
    outside: Prediction | None = None,
    *,
    resamples: int = defaults.RESAMPLES,
    seed: int = 0,
) -> Scores:
    """Return the metrics of a prediction, as `evaluate` does, with their scatter over examples.

    Parameters
    ----------
    prediction
        A prediction with labels.
    outside
        A prediction for data of another distribution, whose examples are drawn anew as well.
    resamples
        R, the bootstrap samples for metrics that are no means. A standard error from R of them is
        itself known to a share of 1 / √(2 R).
    seed
        The seed of the bootstrap samples.
    """
    check_scorable(prediction, outside)
    whole_number("resamples", resamples, at_least=2)
    prediction = prediction.counted()
    numbers, example = prediction.examples.unique(return_inverse=True)
    measured, n = values(prediction), len(numbers)
    means = {name: value for name, value in measured.items() if not isinstance(value, float)}
    others = [name for name in measured if name not in means]
    metrics = {name: as_number(value) for name, value in measured.items()}
    rng, resampled = np.random.default_rng(seed), np.empty((resamples, len(others)))
    for row in resampled if others and n > 1 else ():
        again = prediction.of_examples(numbers[rng.integers(0, n, n)])
        row[:] = [*joint_values(again, others).values()]
    samples = dict(zip(others, resampled.T if n > 1 else resampled.T * math.nan, strict=True))
    if outside is not None:
        metrics[OUTSIDE] = auroc(prediction.uncertainty, outside.uncertainty)
        samples[OUTSIDE] = _told_apart(prediction, outside, resamples, seed)
    influence, terms = {}, {}
    for name, value in means.items():
        influence[name], terms[name] = _by_example(value, example, n)
    return Scores(metrics, influence, terms, samples, n)


def standard_errors(
    prediction: Prediction,
    outside: Prediction | None = None,
    *,
    resamples: int = defaults.RESAMPLES,
    seed: int = 0,
) -> dict[str, float]:
    """Return the standard error of every metric of `evaluate`, by name.

    Those of means and of ratios are closed forms over examples; those of all others come from
    ``resamples`` bootstrap samples of the examples. Tokens of one text are not independent: they
    stay together.
    """
    return scores(prediction, outside, resamples=resamples, seed=seed).errors()


def _by_example(value: Value, example: Tensor, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return influence and term of each of n examples in a mean or ratio over rows, (n,) both."""
    if isinstance(value, Ratio):
        sums, counts = value.sums.double(), value.counts.double()
    else:
        assert isinstance(value, Tensor)
        sums, counts = value.double(), torch.ones(len(value), dtype=torch.float64)
    total, count = (
        torch.zeros(n, dtype=torch.float64).index_add(0, example, part.double())
        for part in (sums, counts)
    )
    terms, shares = (part * n / counts.sum() for part in (total, count))
    return (terms - sums.sum() / counts.sum() * shares).numpy(), terms.numpy()


def _told_apart(inside: Prediction, outside: Prediction, resamples: int, seed: int) -> np.ndarray:
    """Return the `auroc` of resampled examples of both kinds, (R,)."""
    rng, found = np.random.default_rng(seed), []
    of_both = [prediction.examples.unique() for prediction in (inside, outside)]
    for _ in range(resamples):
        again = [
            prediction.of_examples(numbers[rng.integers(0, len(numbers), len(numbers))]).uncertainty
            for prediction, numbers in zip((inside, outside), of_both, strict=True)
        ]
        found.append(auroc(*again))
    return np.array(found)


def error_of_mean(influence: np.ndarray) -> float:
    """Return the standard error of a mean over examples; NaN for a single one."""
    n = len(influence)
    return float(influence.std(ddof=1) / n**0.5) if n > 1 else math.nan


def scatter(resampled: np.ndarray) -> float:
    """Return the standard deviation of the samples that have a value; NaN if they are too few."""
    known = resampled[np.isfinite(resampled)]
    return float(known.std(ddof=1)) if 2 * len(known) > max(len(resampled), 2) else math.nan


def _quantile(freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, freedom)) if freedom > 0 else math.nan
