"""Metrics of predictions against their targets.

torchmetrics is imported where it is used: its import takes longer than that of all of pyrolora,
and a fit without evaluation needs none.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import singledispatch

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
    if prediction.targets is None:
        raise DataError("evaluation needs labels, and the data has none; use predict() instead")
    if outside is not None and type(outside) is not type(prediction):
        raise DataError(
            "outside must be data of the same kind as the data, got a "
            f"{type(outside).__name__} beside a {type(prediction).__name__}"
        )
    metrics = {**_metrics(prediction), **prediction.metrics()}
    if outside is not None:
        metrics["ood_auroc"] = auroc(prediction.uncertainty, outside.uncertainty)
    return metrics


def auroc(low: torch.Tensor, high: torch.Tensor) -> float:
    """Return the area under the ROC curve of a score, P(a < b) + ½ P(a = b).

    a from ``low`` and b from ``high`` are independent; scores that are NaN are left out. NaN when
    either is empty.

    For out-of-distribution data: ``auroc(inside.entropy, outside.entropy)``.
    """
    from torchmetrics.functional.classification import binary_auroc

    low, high = (scores[~scores.isnan()] for scores in (low, high))
    if not len(low) or not len(high):
        return float("nan")
    scores = torch.cat([low, high]).double()
    # Ranks, since torchmetrics takes scores in [0, 1] as they are and others through a sigmoid.
    ranks = scores.unique(return_inverse=True)[1].double()
    truth = torch.cat([torch.zeros(len(low)), torch.ones(len(high))]).long()
    return float(binary_auroc(ranks / len(scores), truth))


def calibration_error(probs: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the expected calibration error of (n, classes), in 15 bins of equal width."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    # The last bin has both its ends; torchmetrics gives a confidence of 1 a separate bin.
    inside = probs.clamp(max=1 - torch.finfo(probs.dtype).eps)
    return float(multiclass_calibration_error(inside, targets, probs.shape[-1], ECE_BINS, "l1"))


@singledispatch
def _metrics(prediction: Prediction) -> dict[str, float]:
    return {"nll": _nll(prediction), "aurc": aurc(prediction)}


@_metrics.register
def _(prediction: ClassPrediction) -> dict[str, float]:
    probs, targets = prediction.probs, prediction.targets
    assert targets is not None
    wrong = prediction.predicted != targets
    if probs.shape[-1] == 1:  # examples with a single choice
        probs = torch.nn.functional.pad(probs, (0, 1))
    one_hot = torch.nn.functional.one_hot(targets, probs.shape[-1])
    return {
        "accuracy": float((~wrong).float().mean()),
        "nll": _nll(prediction),
        "ece": calibration_error(probs, targets),
        "brier": float((probs - one_hot).square().sum(-1).mean()),
        "error_auroc": auroc(prediction.entropy[~wrong], prediction.entropy[wrong]),
        "aurc": aurc(prediction),
    }


@_metrics.register
def _(prediction: MultiLabelPrediction) -> dict[str, float]:
    from torchmetrics.functional import classification as scores

    probs, targets = prediction.probs, prediction.targets
    assert targets is not None
    single = prediction.decisions()
    assert single.targets is not None
    pairs = [
        (probs[:, c], y) for c, y in enumerate(targets.unbind(-1)) if 0 < int(y.sum()) < len(y)
    ]
    if probs.shape[-1] == 1:  # torchmetrics has two labels or more; this one counts for nothing
        probs, targets = (torch.nn.functional.pad(part, (0, 1)) for part in (probs, targets))
    classes = probs.shape[-1]
    return {
        "micro_f1": float(scores.multilabel_f1_score(probs, targets, classes, average="micro")),
        "macro_f1": float(scores.multilabel_f1_score(probs, targets, classes, average="macro")),
        "exact_match": float(scores.multilabel_exact_match(probs, targets, classes)),
        "mean_average_precision": _mean(scores.binary_average_precision(*pair) for pair in pairs),
        "label_auroc": _mean(scores.binary_auroc(*pair) for pair in pairs),
        "nll": _nll(prediction),
        "ece": calibration_error(single.probs, single.targets),
        "brier": float(2 * (single.probs[:, 1] - single.targets).square().mean()),
        "aurc": aurc(prediction),
    }


@_metrics.register
def _(prediction: RegressionPrediction) -> dict[str, float]:
    from torchmetrics.functional import mean_squared_error

    targets = prediction.targets
    assert targets is not None
    low, high = prediction.interval(0.9)
    return {
        "rmse": float(mean_squared_error(prediction.mean, targets, squared=False)),
        "nll": _nll(prediction),
        "crps": float(_crps(prediction).mean()),
        "coverage": float(((targets >= low) & (targets <= high)).float().mean()),
        "aurc": aurc(prediction),
    }


@_metrics.register
def _(prediction: TokenPrediction) -> dict[str, float]:
    scores = prediction.log_predictive
    assert scores is not None
    nll = -scores.double().sum() / prediction.num_tokens.sum()
    return {"nll": float(nll), "perplexity": float(nll.exp())}


def _mean(values: Iterable[torch.Tensor]) -> float:
    """Return the mean of these numbers, NaN where there are none."""
    numbers = [float(value) for value in values]
    return sum(numbers) / len(numbers) if numbers else float("nan")


def _nll(prediction: Prediction) -> float:
    scores = prediction.log_predictive
    assert scores is not None
    return float(-scores.mean())


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
