"""Acquisition: the examples of a pool whose labels would tell the posterior most."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import datasets
import torch
from torch import Tensor

from pyrolora.checks import one_of, whole_number
from pyrolora.errors import ConfigError, DataError
from pyrolora.tasks import ClassPrediction, Prediction
from pyrolora.tasks.prediction import entropy_of

By = Literal["epistemic", "entropy", "batchbald"]
CONFIGURATIONS = 4096
"""The most joint labels that BatchBALD lists, and how many it samples where there are more."""
AT_ONCE = 2**22
"""The most entries of a table of joint probabilities."""
SATURATED = 0.9
"""The share of log S, which no mutual information with S draws exceeds, that calls for more."""


def acquire(
    prediction: Prediction, k: int, by: By = "epistemic", *, seed: int | None = None
) -> list[int]:
    """Return the numbers of the k examples to label next, the best first.

    ``"epistemic"`` takes the highest mutual information of label and draw (BALD: Houlsby et al.
    2011), ``"entropy"`` the highest entropy, each by itself; of tags, the sums over the tokens of
    an example. ``"batchbald"`` takes the batch with the highest mutual information of all its
    labels together, greedily, so that it does not ask for the same thing k times:

        a_j = argmax_i  H[y_1..y_{j-1}, y_i] − Σ mean_s H[p_s],   p(y_1..y_j) = mean_s Π p_s(y)

    (Kirsch, van Amersfoort and Gal 2019, NeurIPS). Joint labels are listed while there are at most
    4,096, and sampled from then on.

    Parameters
    ----------
    prediction
        The prediction of the pool; its labels are not read.
    k
        How many.
    by
        The criterion.
    seed
        Seed of the joint labels that are sampled.

    Raises
    ------
    ConfigError
        For predictions that do not have the criterion, and draws that are all the same.
    DataError
        For more examples than there are.
    """
    one_of("by", by, By)
    whole_number("k", k, at_least=1)
    examples = prediction.examples
    size = len(examples.unique())
    if k > size:
        raise DataError(f"the pool has {size} examples, and k={k} are asked for; ask for fewer")
    draws = getattr(prediction, "draws", None)
    if by != "entropy" and isinstance(draws, Tensor) and not bool((draws != draws[0]).any()):
        raise ConfigError(
            f"by={by!r} asks where draws disagree, and all {len(draws)} are the same: a point has "
            "no spread; take more draws of another guide, or by='entropy'"
        )
    if by == "batchbald":
        return batchbald(_class_probabilities(prediction), k, seed=seed)
    scores = getattr(prediction, by, None)
    if not isinstance(scores, Tensor) or scores.shape != examples.shape:
        raise ConfigError(
            f"by={by!r} needs one {by} per example, and a {type(prediction).__name__} has none: "
            "acquire() serves classes, choices, preferences, several labels, tags, answers in "
            "contexts and regressions"
        )
    numbers, row = examples.unique(return_inverse=True)
    sums = torch.zeros(size, dtype=torch.float64).index_add(0, row, scores.double())
    return numbers[sums.argsort(descending=True, stable=True)[:k]].tolist()


def one_split(pool: Any) -> Any:
    """Return a pool; raise `DataError` for one of several splits, whose numbers would mix."""
    if isinstance(pool, datasets.DatasetDict):
        raise DataError(
            f"the pool must be one data set, got the splits {[*pool]}; pass one of them, such as "
            "data['train']"
        )
    return pool


def _class_probabilities(prediction: Prediction) -> Tensor:
    """Return (S, n, C), where an example has one label among C."""
    if not isinstance(prediction, ClassPrediction) or prediction.row != "example":
        raise ConfigError(
            "by='batchbald' needs one class per example, whose joint labels it can list, got a "
            f"{type(prediction).__name__}; choose by='epistemic'"
        )
    return prediction.draws


def batchbald(draws: Tensor, k: int, *, seed: int | None = None) -> list[int]:
    """Return the k rows of (S, n, C) probabilities that BatchBALD takes, in their order."""
    batch, probs = _Batch(draws.double(), seed), draws.double()
    expected = entropy_of(probs).mean(0)
    chosen: list[int] = []
    best = 0.0
    for _ in range(k):
        gains = batch.joint_entropies() - expected - expected[chosen].sum()
        gains[chosen] = -torch.inf
        chosen.append(int(gains.argmax()))
        best = float(gains.max())
        batch.add(chosen[-1])
    if best > SATURATED * math.log(len(draws)):
        warnings.warn(
            f"the batch tells {best:.2f} nats, and {len(draws)} draws have no more than "
            f"{math.log(len(draws)):.2f}: the last of these {k} examples are chosen by little more "
            "than chance; raise num_samples, or ask for fewer",
            RuntimeWarning,
            stacklevel=3,
        )
    return chosen


class _Batch:
    """The joint labels of a growing batch: their probabilities under every draw.

    Attributes
    ----------
    probs
        The pool, (S, n, C).
    joint
        Π p_s(y) of M joint labels, (M, S), each row over exp(``scale``), (M,).
    weights
        The probability of each joint label, (M,), in sum 1; equal ones once they are sampled.
    """

    def __init__(self, probs: Tensor, seed: int | None, most: int = CONFIGURATIONS) -> None:
        self.probs, self.most = probs, most
        self.joint = probs.new_ones(1, len(probs))
        self.scale, self.weights = probs.new_zeros(1), probs.new_ones(1)
        self.listed = True
        self.rng = torch.Generator().manual_seed(0 if seed is None else seed)

    def joint_entropies(self) -> Tensor:
        """Return H[y_1..y_j, y_i] of every row i of the pool, (n,), in nats."""
        alone = self.joint.mean(-1)
        step = max(1, AT_ONCE // (len(self.joint) * self.probs.shape[-1]))
        parts = []
        for some in self.probs.split(step, dim=1):
            together = (self.joint @ some.flatten(1)).unflatten(-1, some.shape[1:]) / len(some)
            share = together / alone[:, None, None]  # p(y_i | y_1..y_j)
            logs = torch.special.xlogy(share, together) + share * self.scale[:, None, None]
            parts.append(-(self.weights[:, None] * logs.sum(-1)).sum(0))
        return torch.cat(parts)

    def add(self, row: int) -> None:
        """Extend the joint labels by that of a row of the pool."""
        label = self.probs[:, row].T  # (C, S)
        if self.listed and len(self.joint) * len(label) <= self.most:
            joint = (self.joint[:, None] * label).flatten(0, 1)
            scale = self.scale.repeat_interleave(len(label))
        else:
            joint, scale = self._sampled(label)
        highest = joint.amax(-1)
        kept = highest > 0
        self.joint = joint[kept] / highest[kept, None]
        self.scale = scale[kept] + highest[kept].log()
        if self.listed:
            self.weights = self.joint.mean(-1) * self.scale.exp()

    def _sampled(self, label: Tensor) -> tuple[Tensor, Tensor]:
        """Return a label drawn for each joint label, which are drawn first if they are listed."""
        if self.listed:
            rows = torch.multinomial(self.weights, CONFIGURATIONS, True, generator=self.rng)
            self.joint, self.scale = self.joint[rows], self.scale[rows]
            self.weights = torch.full_like(self.scale, 1 / CONFIGURATIONS)
            self.listed = False
        drawn = torch.multinomial(self.joint @ label.T, 1, generator=self.rng)[:, 0]
        return self.joint * label[drawn], self.scale
