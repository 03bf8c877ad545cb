"""Pareto-smoothed importance sampling: k̂, and its verdict in words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from pyrolora.arviz.containers import is_modern

ROUNDS = 20
"""Simulations that `yardstick` averages, so that its error is below 0.1."""


@dataclass(frozen=True)
class PSIS:
    """Pareto-smoothed importance sampling of the posterior by draws of the guide.

    Attributes
    ----------
    khat
        k̂, the shape of the generalised Pareto distribution of the largest weights. Weights
        have finite moments of orders below 1/k̂: above 0.5 their variance is infinite, above 1
        their mean.
    num_samples
        S.
    dimensions
        The number of latent entries, counted without constraints (N mixture weights have N − 1).
    yardstick
        The k̂ that so many draws give a Gaussian guide of as many independent dimensions whose
        scales are all 10 % too small.
    """

    khat: float
    num_samples: int
    dimensions: int
    yardstick: float

    @property
    def threshold(self) -> float:
        """min(0.7, 1 − 1 / log₁₀ S): below it the weights of S draws can be relied on."""
        return min(0.7, 1 - 1 / math.log10(self.num_samples))

    @property
    def verdict(self) -> str:
        """The verdict of k̂ on the guide, in words."""
        if self.khat < self.threshold:
            return f"good: below {self.threshold:.2f}, the guide is close to the posterior"
        ruler = (
            f"in {self.dimensions:,} dimensions a Gaussian 10 % too narrow in each has "
            f"{self.yardstick:.2f}"
        )
        if self.khat <= self.yardstick:
            return (
                f"undecided: above {self.threshold:.2f}, as nearly every guide of this size is; "
                f"{ruler}. Look at the layers one by one (per_layer=True), or compare with NUTS"
            )
        return (
            f"poor: above {self.threshold:.2f}, and {ruler}: the guide misses more of the "
            "posterior than that. Its predictions may still be calibrated: evaluate them"
        )

    def __repr__(self) -> str:
        return (
            f"PSIS(khat={self.khat:.2f}, num_samples={self.num_samples}, "
            f"dimensions={self.dimensions}: {self.verdict})"
        )


def psis(log_weights: np.ndarray, relative_efficiency: float = 1.0) -> tuple[np.ndarray, Any]:
    """Return log-weights (..., S), smoothed and normalised by ArviZ, and their k̂ (...).

    ArviZ 0.2x takes log w. That of 1.x takes log-likelihoods, whose weights in leave-one-out are
    1 / p: it negates its input.

    References
    ----------
    A. Vehtari, D. Simpson, A. Gelman, Y. Yao, J. Gabry (2024), "Pareto Smoothed Importance
    Sampling", JMLR 25.
    """
    import arviz

    log_weights = np.asarray(log_weights, dtype=np.float64)
    with np.errstate(over="ignore"):  # the fit of the tail overflows where a share is 0
        if not is_modern(arviz):
            smoothed, shape = arviz.psislw(log_weights, relative_efficiency)
        else:
            stats = import_module("arviz_stats.base").array_stats
            smoothed, shape = stats.psislw(-log_weights, r_eff=relative_efficiency)
    return smoothed, shape


def psis_khat(log_weights: np.ndarray) -> float:
    """Return k̂ of importance weights, (S,).

    It is −∞ where all are equal to a thousandth, since any tail is then rounding.
    """
    if np.ptp(log_weights) < 1e-3:
        return -math.inf
    return float(psis(log_weights)[1])


def yardstick(dimensions: int, num_samples: int, ratio: float = 0.9) -> float:
    """Return k̂ of the guide N(0, ratio² I) for the posterior N(0, I).

        log w = d log ratio + ½ (1 − ratio²) χ²_d

    The result is the mean over simulations from a fixed seed. For large S in one dimension it is
    1 − ratio².
    """
    squares = np.random.default_rng(0).chisquare(dimensions, (ROUNDS, num_samples))
    return float(np.mean([psis_khat(0.5 * (1 - ratio**2) * row) for row in squares]))
