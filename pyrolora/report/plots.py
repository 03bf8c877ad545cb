"""Pictures: plain functions that draw on matplotlib axes and return them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def reliability_diagram(
    probs: Tensor, targets: Tensor, *, ax: Axes, label: str | None = None, bins: int = 10
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
    confidence, predicted = probs.max(-1)
    right = (predicted == targets).double()
    index = (confidence * bins).long().clamp(0, bins - 1)
    counts = torch.bincount(index, minlength=bins)
    used = counts > 0
    x, y = (
        torch.bincount(index, weights=values.double(), minlength=bins)[used] / counts[used]
        for values in (confidence, right)
    )
    if not ax.lines:
        ax.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
    (line,) = ax.plot(x.numpy(), y.numpy(), label=label)
    sizes = 4 + 250 * counts[used] / len(targets)
    ax.scatter(x.numpy(), y.numpy(), s=sizes.numpy(), color=line.get_color())
    ax.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    return ax


def entropy_histogram(inside: Tensor, outside: Tensor, *, ax: Axes, bins: int = 30) -> Axes:
    """The predictive entropy of data like the training data, and of other data.

    Parameters
    ----------
    inside, outside
        Entropies in nats, (n,) and (m,).
    """
    top = float(torch.cat([inside, outside]).max()) or 1.0
    edges = torch.linspace(0, top, bins + 1).tolist()
    for values, label in ((inside, "in distribution"), (outside, "out of distribution")):
        ax.hist(values.numpy(), bins=edges, density=True, alpha=0.6, label=label)
    ax.set(xlabel="predictive entropy (nats)", ylabel="density")
    return ax
