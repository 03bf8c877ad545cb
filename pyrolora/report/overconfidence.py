"""Whether predictions promise more than they keep."""

from __future__ import annotations

from functools import singledispatch

import numpy as np

from pyrolora.predictive import (
    ClassPrediction,
    Prediction,
    RegressionPrediction,
    TokenPrediction,
)
from pyrolora.report.findings import Finding


@singledispatch
def overconfident(prediction: Prediction) -> Finding | None:
    """Whether predictions promise more than they keep, by more than two standard errors.

    Classes: the mean confidence exceeds the accuracy. Regression: the central 90 % intervals hold
    less than 90 % of the targets. Texts: the negative log-likelihood a token exceeds the entropy,
    which is what the predictions themselves expect of it.
    """
    raise TypeError(f"no confidence is known for {type(prediction).__name__}")


@overconfident.register
def _(prediction: ClassPrediction) -> Finding | None:
    if prediction.loss is None or len(prediction.loss) < 2:
        return None
    confidence = prediction.probs.amax(-1).double().numpy()
    gaps = confidence - 1 + prediction.loss.double().numpy()
    # The scatter that was seen, or that of calibrated predictions where that is larger: a few wrong
    # answers of the same confidence have none.
    scatter = max(gaps.var(ddof=1), (confidence * (1 - confidence)).mean())
    error = (scatter / len(gaps)) ** 0.5
    if not gaps.mean() > 2 * error:
        return None
    return _overconfidence(
        f"The mean confidence is {confidence.mean():.3f}, and "
        f"{confidence.mean() - gaps.mean():.3f} of the answers are right: {gaps.mean():.3f} too "
        f"much, with a standard error of {error:.3f}."
    )


@overconfident.register
def _(prediction: RegressionPrediction) -> Finding | None:
    if prediction.targets is None:
        return None
    low, high = prediction.interval(0.9)
    inside = (prediction.targets >= low) & (prediction.targets <= high)
    coverage = float(inside.double().mean())
    error = (0.9 * 0.1 / len(inside)) ** 0.5
    if not coverage < 0.9 - 2 * error:
        return None
    return _overconfidence(
        f"The intervals that should hold 90 % of the targets hold {coverage:.1%}; with "
        f"{len(inside)} examples the standard error is {error:.1%}."
    )


@overconfident.register
def _(prediction: TokenPrediction) -> Finding | None:
    counts = prediction.num_tokens.double().numpy()
    if prediction.log_predictive is None or len(counts) < 2 or not counts.sum():
        return None
    expected = np.nansum(prediction.entropy.double().numpy(), axis=1)
    gaps = -prediction.log_predictive.double().numpy() - expected
    gap = gaps.sum() / counts.sum()
    error = np.std(gaps - gap * counts, ddof=1) * len(gaps) ** 0.5 / counts.sum()
    if not gap > 2 * error:
        return None
    return _overconfidence(
        f"A token costs {gap + expected.sum() / counts.sum():.3f} nats, and the predictions "
        f"themselves expect {expected.sum() / counts.sum():.3f}: {gap:.3f} too few, with a "
        f"standard error of {error:.3f}."
    )


def _overconfidence(found: str) -> Finding:
    return Finding(
        "overconfident",
        "The predictions are overconfident",
        found,
        "Do not read the probabilities as frequencies. Give the posterior more spread (a larger "
        "kl_weight, more latent factors, an ensemble), train for fewer epochs, or calibrate on "
        "held-out data (posterior.calibrate, pyrolora.predictive.Conformal).",
    )
