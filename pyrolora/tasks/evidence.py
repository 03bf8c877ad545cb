"""Evidence about a prediction: what it promised and what it has to beat, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Promise:
    """A quantity that a prediction promises for its rows, and what it kept.

    Attributes
    ----------
    promised, kept
        For each row a quantity that is good when it is high, such as a confidence and whether the
        answer was right, (n,). A calibrated prediction has the same total of both, up to chance.
    statement
        A sentence for a report, with the fields ``{promised}``, ``{kept}``, ``{gap}``, ``{error}``
        (the standard error of the gap) and ``{n}``.
    counts
        How many observations each row sums up, (n,); None: one each.
    variance
        The variance of a row's gap, where the prediction knows it better than the scatter of these
        rows shows; None: the scatter.
    """

    promised: Tensor
    kept: Tensor
    statement: str
    counts: Tensor | None = None
    variance: float | None = None

    @classmethod
    def of_confidence(cls, confidence: Tensor, loss: Tensor | None, statement: str) -> Self | None:
        """Return the confidences (n,) of answers, and which are right, those of a ``loss`` of 0.

        The variance is the one that was seen, or that of calibrated predictions where that is
        larger: a few wrong answers of the same confidence have none. None without labels, and for
        a single row.
        """
        if loss is None or len(loss) < 2:
            return None
        confidence, right = confidence.double(), 1 - loss.double()
        calibrated = (confidence * (1 - confidence)).mean()
        variance = float(torch.maximum((confidence - right).var(), calibrated))
        return cls(confidence, right, statement, variance=variance)


@dataclass(frozen=True)
class Baseline:
    """The scores of a prediction that knows nothing of the adapters, which any fit should beat.

    Attributes
    ----------
    name
        How a report calls it, as in "no better than the frequencies of the labels".
    log_likelihood
        log p(y_i), (n,), in nats.
    loss
        The cost of each row, as in `Prediction.loss`, (n,); None where costs are not compared.
    """

    name: str
    log_likelihood: Tensor
    loss: Tensor | None = None
