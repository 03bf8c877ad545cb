"""Metrics of predictions against their targets.

torchmetrics is imported where it is used: its import takes longer than that of all of pyrolora,
and a fit without evaluation needs none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, Literal

import torch

from pyrolora.errors import DataError
from pyrolora.predictive.reliability import ECE_BINS
from pyrolora.predictive.selective import aurc
from pyrolora.seeding import DRAWING
from pyrolora.tasks import (
    ClassPrediction,
    MultiLabelPrediction,
    Prediction,
    RegressionPrediction,
    TokenPrediction,
)


@DRAWING
def evaluate(prediction: Prediction, outside: Prediction | None = None) -> dict[str, float]:
    """Return the metrics of a prediction by name.

    Classification and multiple choice: ``accuracy``, ``nll`` (nats), ``ece`` (15 bins of equal
    width), ``brier`` (summed over classes, 0..2), ``error_auroc`` (`auroc` of the entropy for
    finding the wrong predictions; NaN when there are none, or nothing else), ``aurc`` (`aurc`, the
    mean error rate when only the most certain are answered). Regression: ``rmse``, ``nll``,
    ``crps`` (units of the target), ``coverage`` (share of targets in the central 90 % interval),
    ``aurc`` (of the squared error). Several labels per example: ``micro_f1``, ``macro_f1``,
    ``exact_match`` (share of examples of which every label is right), ``mean_average_precision``
    and ``label_auroc`` (means over the labels that some examples have and some have not; NaN
    without such labels), ``nll`` (nats per example, all its labels together), ``ece`` and ``brier``
    (of each label as two classes), ``aurc`` (of the share of wrong labels). Language models:
    ``nll`` (nats per counted token, of the mixture over draws) and ``perplexity`` = exp(nll). Other
    kinds: ``nll`` and ``aurc`` (of `Prediction.loss`). A kind may add its own, by
    `Prediction.metrics`. With ``outside``, a prediction for data of another distribution:
    ``ood_auroc``, the `auroc` of `Prediction.uncertainty` for telling the two apart.

    Raises
    ------
    DataError
        When the data had no labels.
    """
    check_scorable(prediction, outside)
    metrics = {name: as_number(value) for name, value in values(prediction).items()}
    if outside is not None:
        metrics["ood_auroc"] = auroc(prediction.uncertainty, outside.uncertainty)
    return metrics


def check_scorable(prediction: Prediction, outside: Prediction | None) -> None:
    """Raise `DataError` without labels, and for ``outside`` of another kind of prediction."""
    if prediction.targets is None:
        raise DataError("evaluation needs labels, and the data has none; use predict() instead")
    if outside is not None and type(outside) is not type(prediction):
        raise DataError(
            "outside must be data of the same kind as the data, got a "
            f"{type(outside).__name__} beside a {type(prediction).__name__}"
        )


@dataclass(frozen=True)
class Ratio:
    """A metric per observation, Σ_i sums_i / Σ_i counts_i, of rows with several, (n,) both."""

    sums: torch.Tensor
    counts: torch.Tensor


Value = float | torch.Tensor | Ratio
"""A metric of all rows together; or its terms, (n,), if it is their mean; or a `Ratio`."""


def values(prediction: Prediction) -> dict[str, Value]:
    """Return every metric of a prediction, with the terms of those that are means."""
    measured = {name: metric(prediction) for name, metric in _metrics(prediction).items()}
    return {**measured, **prediction.metrics()}


def joint_values(prediction: Prediction, names: Collection[str]) -> dict[str, float]:
    """Return the metrics with these ``names``, which are not means, and compute no others."""
    known = _metrics(prediction)
    measured = {name: as_number(known[name](prediction)) for name in names if name in known}
    if any(name not in known for name in names):
        measured |= {name: as_number(v) for name, v in prediction.metrics().items()}
    return {name: measured[name] for name in names}


def as_number(value: Value) -> float:
    """Return a metric as a number."""
    if isinstance(value, Ratio):
        return float(value.sums.sum() / value.counts.sum())
    return float(value.double().mean()) if isinstance(value, torch.Tensor) else value


def auroc(low: torch.Tensor, high: torch.Tensor) -> float:
    """Return the area under the ROC curve of a score, P(a < b) + ½ P(a = b).

    a from ``low`` and b from ``high`` are independent; scores that are NaN are left out. NaN when
    either is empty.

    For out-of-distribution data: ``auroc(inside.entropy, outside.entropy)``.
    """
    low, high = (scores[~scores.isnan()] for scores in (low, high))
    if not len(low) or not len(high):
        return float("nan")
    _, place, ties = torch.cat([low, high]).unique(return_inverse=True, return_counts=True)
    ranks = (ties.cumsum(0) - (ties.double() - 1) / 2)[place]  # tied scores share their mean rank
    above = ranks[len(low) :].sum() - len(high) * (len(high) + 1) / 2  # Mann and Whitney's U
    return float(above / (len(low) * len(high)))


def calibration_error(probs: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the expected calibration error of (n, classes), in 15 bins of equal width."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    # The last bin has both its ends; torchmetrics gives a confidence of 1 a separate bin.
    inside = probs.clamp(max=1 - torch.finfo(probs.dtype).eps)
    return float(multiclass_calibration_error(inside, targets, probs.shape[-1], ECE_BINS, "l1"))


def binary_calibration_error(confidence: torch.Tensor, right: torch.Tensor) -> float:
    """Return the calibration error of the probabilities (n,) that answers are right, in 15 bins."""
    from torchmetrics.functional.classification import binary_calibration_error as error

    inside = confidence.clamp(0, 1 - torch.finfo(confidence.dtype).eps)
    return float(error(inside, right.long(), ECE_BINS, "l1", validate_args=False))


Metric = Callable[[Any], Value]


@singledispatch
def _metrics(prediction: Prediction) -> dict[str, Metric]:
    """Return the functions that measure such a prediction, by the names of the metrics."""
    return {"nll": _nll, "aurc": aurc}


@_metrics.register
def _(prediction: ClassPrediction) -> dict[str, Metric]:
    return {
        "accuracy": lambda p: (p.predicted == p.targets).float(),
        "nll": _nll,
        "ece": lambda p: calibration_error(*_classes(p)),
        "brier": _brier,
        "error_auroc": _error_auroc,
        "aurc": aurc,
    }


@_metrics.register
def _(prediction: MultiLabelPrediction) -> dict[str, Metric]:
    return {
        "micro_f1": lambda p: _f1(p, "micro"),
        "macro_f1": lambda p: _f1(p, "macro"),
        "exact_match": lambda p: (p.predicted == p.targets).all(-1).float(),
        "mean_average_precision": lambda p: _mean_over_labels(p, "binary_average_precision"),
        "label_auroc": lambda p: _mean_over_labels(p, "binary_auroc"),
        "nll": _nll,
        "ece": lambda p: calibration_error(*_classes(p.decisions())),
        "brier": lambda p: 2 * (p.probs - p.targets).square().mean(-1),
        "aurc": aurc,
    }


@_metrics.register
def _(prediction: RegressionPrediction) -> dict[str, Metric]:
    return {
        "rmse": _rmse,
        "nll": _nll,
        "crps": _crps,
        "coverage": _covered,
        "aurc": aurc,
    }


@_metrics.register
def _(prediction: TokenPrediction) -> dict[str, Metric]:
    return {"nll": _per_token, "perplexity": _perplexity}


def _nll(prediction: Prediction) -> torch.Tensor:
    scores = prediction.log_predictive
    assert scores is not None
    return -scores


def _per_token(prediction: TokenPrediction) -> Ratio:
    return Ratio(_nll(prediction).double(), prediction.num_tokens)


def _perplexity(prediction: TokenPrediction) -> float:
    """Return exp of the loss per token, infinite where no float holds it."""
    try:
        return math.exp(as_number(_per_token(prediction)))
    except OverflowError:
        return math.inf


def _classes(prediction: ClassPrediction) -> tuple[torch.Tensor, torch.Tensor]:
    """Return probabilities of two classes or more, also of examples with a single choice."""
    probs, targets = prediction.probs, prediction.targets
    assert targets is not None
    if probs.shape[-1] == 1:
        probs = torch.nn.functional.pad(probs, (0, 1))
    return probs, targets


def _brier(prediction: ClassPrediction) -> torch.Tensor:
    probs, targets = _classes(prediction)
    one_hot = torch.nn.functional.one_hot(targets, probs.shape[-1])
    return (probs - one_hot).square().sum(-1)


def _error_auroc(prediction: ClassPrediction) -> float:
    wrong, entropy = prediction.predicted != prediction.targets, prediction.entropy
    return auroc(entropy[~wrong], entropy[wrong])


def _f1(prediction: MultiLabelPrediction, average: Literal["micro", "macro"]) -> float:
    from torchmetrics.functional.classification import multilabel_f1_score

    probs, targets = prediction.probs, prediction.targets
    assert targets is not None
    if probs.shape[-1] == 1:  # torchmetrics has two labels or more; this one counts for nothing
        probs, targets = (torch.nn.functional.pad(part, (0, 1)) for part in (probs, targets))
    return float(multilabel_f1_score(probs, targets, probs.shape[-1], average=average))


def _mean_over_labels(prediction: MultiLabelPrediction, name: str) -> float:
    """Return the mean of a score over the labels that some examples have and some have not."""
    from torchmetrics.functional import classification

    score, targets = getattr(classification, name), prediction.targets
    assert targets is not None
    columns = zip(prediction.probs.unbind(-1), targets.unbind(-1), strict=True)
    return _mean(score(probs, y) for probs, y in columns if 0 < int(y.sum()) < len(y))


def _rmse(prediction: RegressionPrediction) -> float:
    from torchmetrics.functional import mean_squared_error

    assert prediction.targets is not None
    return float(mean_squared_error(prediction.mean, prediction.targets, squared=False))


def _covered(prediction: RegressionPrediction) -> torch.Tensor:
    """Return 1 where the central 90 % interval has the target, else 0, (n,)."""
    (low, high), targets = prediction.interval(0.9), prediction.targets
    assert targets is not None
    return ((targets >= low) & (targets <= high)).float()


def _mean(values: Iterable[torch.Tensor]) -> float:
    """Return the mean of these numbers, NaN where there are none."""
    numbers = [float(value) for value in values]
    return sum(numbers) / len(numbers) if numbers else float("nan")


def _crps(prediction: RegressionPrediction) -> torch.Tensor:
    """Return E|Y − y| − ½ E|Y − Y'|, (n,), for the mixture over draws of N(m_s, σ²).

    It is a closed form: for a Gaussian difference of mean d and standard deviation τ,
    E|·| = 2 τ φ(d / τ) + d (2 Φ(d / τ) − 1), with τ = σ against y and σ √2 between draws.
    Reference: Grimit et al. (2006), Q. J. R. Meteorol. Soc. 132, 2925-2942.
    """
    means, targets, sigma = prediction.draws, prediction.targets, prediction.noise_scale
    assert targets is not None
    between = torch.stack([_mean_abs(means - m, sigma * 2**0.5).mean(0) for m in means]).mean(0)
    return _mean_abs(means - targets, sigma).mean(0) - 0.5 * between


def _mean_abs(difference: torch.Tensor, scale: float) -> torch.Tensor:
    z = difference / scale
    density = (-0.5 * z.square()).exp() / (2 * torch.pi) ** 0.5
    return 2 * scale * density + difference * (2 * torch.special.ndtr(z) - 1)
