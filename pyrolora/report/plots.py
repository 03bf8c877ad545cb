"""Pictures: plain functions that draw on matplotlib axes and return them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike


def reliability_diagram(
    probs: ArrayLike, targets: ArrayLike, *, ax: Axes, label: str | None = None, bins: int = 10
) -> Axes:
    """Accuracy against confidence, in bins of equal width.

    Below the diagonal the predictions promise more than they keep: overconfidence. The area of a
    point is proportional to the number of predictions in its bin.

    Parameters
    ----------
    probs
        Class probabilities, (n, C).
    targets
        Labels, (n,).
    ax
        Where to draw; call again with another ``label`` to compare.
    bins
        Number of bins of the confidence, which is the largest probability.
    """
    probs, targets = np.asarray(probs), np.asarray(targets)
    confidence, right = probs.max(-1), probs.argmax(-1) == targets
    index = (confidence * bins).astype(int).clip(0, bins - 1)
    counts = np.bincount(index, minlength=bins)
    used = counts > 0
    x, y = (
        np.bincount(index, weights=values, minlength=bins)[used] / counts[used]
        for values in (confidence, right)
    )
    if not ax.lines:
        ax.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
    (line,) = ax.plot(x, y, label=label)
    ax.scatter(x, y, s=4 + 250 * counts[used] / len(targets), color=line.get_color())
    ax.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    return ax


def entropy_histogram(inside: ArrayLike, outside: ArrayLike, *, ax: Axes, bins: int = 30) -> Axes:
    """The predictive entropy of data like the training data, and of other data.

    Parameters
    ----------
    inside, outside
        Entropies in nats, (n,) and (m,).
    """
    inside, outside = np.asarray(inside), np.asarray(outside)
    top = float(max(inside.max(), outside.max())) or 1.0
    edges = np.linspace(0, top, bins + 1).tolist()
    for values, label in ((inside, "in distribution"), (outside, "out of distribution")):
        ax.hist(values, bins=edges, density=True, alpha=0.6, label=label)
    ax.set(xlabel="predictive entropy (nats)", ylabel="density")
    return ax
