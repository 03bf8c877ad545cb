"""Plots of predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from pyrolora.checks import whole_number
from pyrolora.errors import ConfigError, DataError
from pyrolora.plots.arguments import check_axes, numbers
from pyrolora.predictive import reliability_table, risk_coverage
from pyrolora.tasks import ClassPrediction, Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

ROUNDING = 1e-3
"""By how much a probability in half precision may exceed 1."""


def reliability_diagram(
    probs: ArrayLike, targets: ArrayLike, *, ax: Axes, label: str | None = None, bins: int = 10
) -> Axes:
    """Plot accuracy against confidence, in bins of equal width.

    Below the diagonal the predictions promise more than they keep: they are overconfident. The area
    of a point is proportional to the number of predictions in its bin.

    Parameters
    ----------
    probs
        Class probabilities, (n, C).
    targets
        Labels, (n,).
    ax
        The axes to draw on; call again with another ``label`` to compare.
    bins
        Number of bins of the confidence, which is the largest probability.
    """
    check_axes(ax, label)
    shares, labels = numbers("probs", probs, "(n, C)"), numbers("targets", targets, "(n,)")
    whole = labels.astype(np.int64) == labels
    known = len(labels) and whole.all() and labels.min() >= 0 and labels.max() < shares.shape[1]
    if len(shares) != len(labels) or not known:
        raise DataError(
            f"targets must be a label from 0 to {shares.shape[1] - 1} for each of {len(shares)} "
            f"rows of probs, got {targets!r:.60}"
        )
    if shares.min() < 0 or shares.max() > 1 + ROUNDING:
        raise DataError(
            f"probs must be probabilities, got numbers from {shares.min():.4g} to "
            f"{shares.max():.4g}; of logits pass softmax(logits)"
        )
    rows = torch.tensor(shares, dtype=torch.float32)[None]
    prediction = ClassPrediction(torch.tensor(labels, dtype=torch.long), None, rows)
    table = reliability_table(prediction, bins)
    table = table[table["count"] > 0]
    x, y, counts = (table[name].to_numpy() for name in ("confidence", "accuracy", "count"))
    if not ax.lines:
        ax.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
    (line,) = ax.plot(x, y, label=label)
    ax.scatter(x, y, s=4 + 250 * counts / counts.sum(), color=line.get_color(), clip_on=False)
    ax.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    return ax


def entropy_histogram(
    inside: ArrayLike, outside: ArrayLike | None = None, *, ax: Axes, bins: int = 30
) -> Axes:
    """Plot the predictive entropy of data like the training data, and of other data.

    Parameters
    ----------
    inside, outside
        Entropies in nats, (n,) and (m,); without ``outside`` there is one histogram and no label.
        Entropies of a regression may be negative.
    """
    check_axes(ax)
    whole_number("bins", bins, at_least=1)
    name = "in distribution" if outside is not None else None
    series = {name: numbers("inside", inside, "(n,)")}
    if outside is not None:
        series["out of distribution"] = numbers("outside", outside, "(m,)")
    if not all(values.size for values in series.values()):
        raise DataError(
            "a histogram needs at least one entropy per data set, got an empty one; leave it out"
        )
    low = min(float(values.min()) for values in series.values())
    high = max(float(values.max()) for values in series.values())
    if 0 < low < high / 2:
        low = 0.0  # the natural end of the axis, unless all entropies are far from it
    edges = np.linspace(low, high if high > low else low + 1, bins + 1).tolist()
    for label, values in series.items():
        ax.hist(values, bins=edges, density=True, alpha=0.6, label=label)
    ax.set(xlabel="predictive entropy (nats)", ylabel="density")
    return ax


def risk_coverage_curve(prediction: Prediction, *, ax: Axes, label: str | None = None) -> Axes:
    """Plot the risk of the answers that are kept against the share that is kept.

    The most certain are kept first. A curve that falls towards the left shows that the errors are
    among the uncertain examples; at coverage 1 it is the risk of all.
    `pyrolora.predictive.risk_coverage` defines it.

    Parameters
    ----------
    prediction
        A prediction for labelled data.
    ax
        The axes to draw on; call again with another ``label`` to compare.
    """
    check_axes(ax, label)
    if not isinstance(prediction, Prediction):
        raise ConfigError(
            f"prediction must be what posterior.predict() returns, got {prediction!r:.60}"
        )
    table = risk_coverage(prediction)
    ax.plot(table["coverage"].to_numpy(), table["risk"].to_numpy(), label=label)
    risk = f"risk: {prediction.risk_name}"
    ax.set(xlabel="coverage: share that is answered", ylabel=risk, xlim=(0, 1))
    if prediction.risk_from_zero:
        ax.set_ylim(bottom=0)
    return ax
