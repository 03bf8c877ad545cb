"""Selective prediction: answer only where the uncertainty is low."""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor

from pyrolora.errors import DataError
from pyrolora.tasks import Prediction


def risk_coverage(prediction: Prediction) -> pd.DataFrame:
    """Return the mean loss of the k most certain examples, for k = 1..n.

    Examples are in the order of `Prediction.uncertainty`. Ties get the expectation over their
    random orders. Reference: El-Yaniv and Wiener (2010), JMLR 11, 1605-1641.

    Returns
    -------
    pandas.DataFrame
        ``coverage`` = k / n, the share that is answered, and ``risk``, the mean of
        `Prediction.loss` over it: the error rate, the squared error (units of the target squared),
        or nats per token.

    Raises
    ------
    DataError
        When the data had no labels.
    """
    risk = _risk(prediction)
    coverage = torch.arange(1, len(risk) + 1, dtype=risk.dtype) / len(risk)
    return pd.DataFrame({"coverage": coverage.numpy(), "risk": risk.numpy()})


def aurc(prediction: Prediction) -> float:
    """Return the area under the risk-coverage curve, (1/n) Σ_k risk(k / n).

    It is low where the losses are among the uncertain examples. Reference: Geifman, Uziel and
    El-Yaniv (2019), ICLR.
    """
    return float(_risk(prediction).mean())


def _risk(prediction: Prediction) -> Tensor:
    prediction = prediction.counted()
    loss = prediction.loss
    if loss is None:
        raise DataError("the risk needs labels, and the data has none")
    return risks(prediction.uncertainty, loss)


def risks(uncertainty: Tensor, loss: Tensor) -> Tensor:
    """Return the mean loss of the k most certain of n, for k = 1..n, (n,)."""
    ranks = uncertainty.unique(return_inverse=True)[1]
    sums = torch.zeros(int(ranks.max()) + 1, dtype=torch.float64)
    sums = sums.index_add(0, ranks, loss.double())
    expected = (sums / ranks.bincount())[ranks.sort().values]
    return expected.cumsum(0) / torch.arange(1, len(loss) + 1)
