"""The reliability of probabilities: accuracy by confidence."""

from __future__ import annotations

import pandas as pd
import torch

from pyrolora.checks import whole_number
from pyrolora.errors import ConfigError, DataError
from pyrolora.tasks import Prediction

ECE_BINS = 15


def reliability_table(prediction: Prediction, bins: int = ECE_BINS) -> pd.DataFrame:
    """Return the accuracy of predictions by their confidence, in bins of equal width.

    Where an example has several labels, each is one prediction: does the example have it?

    The expected calibration error is their sum ECE = Σ_b (count_b / n) |accuracy_b − confidence_b|.

    Returns
    -------
    pandas.DataFrame
        One row per bin [low, high), the last with its upper end: ``low``, ``high``, ``count``,
        ``confidence`` (the mean of the largest probability) and ``accuracy``; NaN in a bin without
        predictions.

    Raises
    ------
    ConfigError
        When the prediction is not of classes.
    DataError
        When the data had no labels.
    """
    whole_number("bins", bins, at_least=1)
    decisions = prediction.decisions()
    probs = None if decisions is None else decisions.probs
    if decisions is None or probs is None:
        raise ConfigError(
            f"the reliability of class probabilities needs classes, got a "
            f"{type(prediction).__name__}; a regression has evaluate(...)['coverage']"
        )
    if decisions.loss is None:
        raise DataError("reliability needs labels, and the data has none")
    confidence = probs.amax(-1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    inner = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype)[1:-1]  # as torchmetrics' ECE
    index = torch.bucketize(confidence, inner.contiguous(), right=True)
    count = index.bincount(minlength=bins)
    sums = torch.zeros(2, bins, dtype=torch.float64)
    right = 1 - decisions.loss.double()
    sums = sums.index_add(1, index, torch.stack([confidence.double(), right]))
    means = sums / count  # 0 / 0 is NaN
    return pd.DataFrame(
        {
            "low": edges[:-1].numpy(),
            "high": edges[1:].numpy(),
            "count": count.numpy(),
            "confidence": means[0].numpy(),
            "accuracy": means[1].numpy(),
        }
    )
