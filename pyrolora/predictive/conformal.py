"""Conformal prediction: sets that hold the label as often as they claim, whatever the model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyrolora.checks import share
from pyrolora.errors import ConfigError, DataError
from pyrolora.tasks import ClassPrediction, Prediction, RegressionPrediction, TokenPrediction


class Conformal:
    """Split conformal prediction.

    The n examples of ``calibration``, which the fit has not seen, give scores s_i, high where the
    prediction was far from the label; q is the ⌈(n + 1) mass⌉-th smallest. The set of a new
    example holds all labels whose score is at most q. It holds the true label with probability at
    least ``mass``, over calibration sets and new examples that are exchangeable with one another.

    Classification and multiple choice: s = 1 − p̄_y, so that a set has the labels with p̄ ≥ 1 − q
    (Sadinle, Lei and Wasserman 2019, JASA 114, 223-234). Regression: s = |y − mean| / std, so that
    a set is mean ± q std (Lei et al. 2018, JASA 113, 1094-1111).

    Parameters
    ----------
    calibration
        A prediction with labels.
    mass
        The probability that a set holds the label, between 0 and 1.

    Attributes
    ----------
    threshold
        q.

    Raises
    ------
    ConfigError
        For a prediction that is neither of classes nor of a regression, or a mass
        outside of (0, 1).
    DataError
        For data without labels, predictions that are NaN, or fewer than mass / (1 − mass)
        examples, for which there is no threshold.
    """

    def __init__(self, calibration: Prediction, mass: float = 0.9) -> None:
        share("mass", mass, "(0, 1)")
        scores = _scores(calibration)
        place = math.ceil((len(scores) + 1) * mass - 1e-9)
        if place > len(scores):
            raise DataError(
                f"sets of mass {mass} need at least {math.ceil(mass / (1 - mass) - 1e-9)} "
                f"calibration examples, got {len(scores)}"
            )
        self.mass = mass
        self.kind = type(calibration)
        self._score = float(scores.sort().values[place - 1])
        self.threshold = self._score + 1 if issubclass(self.kind, ClassPrediction) else self._score

    def __call__(self, prediction: Prediction) -> Tensor:
        """Return the sets of other examples.

        Returns
        -------
        Tensor
            Booleans (n, C), which may all be false in a row whose probabilities are spread; for a
            regression the bounds (n, 2).
        """
        if type(prediction) is not self.kind:
            raise ConfigError(
                f"calibrated on a {self.kind.__name__}, got a {type(prediction).__name__}"
            )
        if isinstance(prediction, ClassPrediction):
            return prediction.probs >= -self._score
        assert isinstance(prediction, RegressionPrediction)
        width = self._score * prediction.std
        return torch.stack([prediction.mean - width, prediction.mean + width], dim=-1)

    def evaluate(self, prediction: Prediction) -> dict[str, float]:
        """Return how the sets do on labelled data.

        Returns
        -------
        dict
            ``coverage``, the share of labels in their sets, and ``size``, the mean number of
            labels per set, or the mean width of the intervals.
        """
        sets, targets = self(prediction), prediction.targets
        if targets is None:
            raise DataError("coverage needs labels, and the data has none")
        if sets.dtype == torch.bool:
            inside = sets.gather(-1, targets[:, None])
            size = sets.sum(-1).float()
        else:
            inside = (sets[:, 0] <= targets) & (targets <= sets[:, 1])
            size = sets[:, 1] - sets[:, 0]
        return {"coverage": float(inside.float().mean()), "size": float(size.mean())}


def _scores(prediction: Prediction) -> Tensor:
    """Return the scores s; for classes s − 1 = −p̄_y.

    1 − p̄ would round to 1 for a class that is hardly probable, as for one that is impossible.
    """
    if isinstance(prediction, TokenPrediction):
        raise ConfigError(
            "conformal sets are of classes or of numbers; the texts of a language model are too "
            "many to list: let it choose between texts, with a column 'choices'"
        )
    if not isinstance(prediction, ClassPrediction | RegressionPrediction):
        raise ConfigError(
            "conformal sets are of one class per row, or of numbers with a mean and a std, got a "
            f"{type(prediction).__name__}; for the prediction of a task of your own make it a "
            "subclass of pyrolora.tasks.ClassPrediction or of RegressionPrediction, if it is one"
        )
    targets = prediction.targets
    if targets is None:
        raise DataError("calibration needs labels, and the data has none")
    if isinstance(prediction, ClassPrediction):
        scores = -prediction.probs.gather(-1, targets[:, None]).squeeze(-1)
    else:
        scores = (targets - prediction.mean).abs() / prediction.std
    if scores.isnan().any():
        raise DataError(
            f"the prediction of example {int(scores.isnan().nonzero()[0])} of the calibration is "
            "NaN, which no threshold holds; leave such examples out, or fit again"
        )
    return scores
