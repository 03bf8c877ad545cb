"""The evidence of a Gaussian approximation, and the prior's precision that maximises it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

PRECISIONS = (1e-8, 1e12)
"""Bounds of `best_precision`: prior standard deviations of the factors from 1e4 to 1e-6."""


def log_marginal_likelihood(
    log_likelihood: float, eigenvalues: Sequence[Tensor], means: Sequence[Tensor], precision: float
) -> float:
    """Return Laplace's log p(y) under θ ~ N(0, I / λ), in nats.

        log p(y | θ̄) - ½ [ λ ‖θ̄‖² + Σ_i log(e_i + λ) - P log λ ]

    It is exact for a Gaussian law of a linear function, at θ̄ the mode for this very λ.

    Parameters
    ----------
    log_likelihood
        log p(y | θ̄), summed over all examples.
    eigenvalues
        e >= 0 of the curvature, in tensors of any shape, P numbers in all.
    means
        θ̄, in tensors of any shape.
    precision
        λ > 0.
    """
    norm = _squared_norm(means)
    # log((e + λ) / λ), which does not cancel where e is small.
    log_ratio = sum(float((e.double() / precision).log1p().sum()) for e in eigenvalues)
    return log_likelihood - 0.5 * (precision * norm + log_ratio)


def best_precision(eigenvalues: Sequence[Tensor], means: Sequence[Tensor]) -> float:
    """Return the λ that maximises `log_marginal_likelihood`, with θ̄ and the eigenvalues fixed.

    It is MacKay's fixed point λ ‖θ̄‖² = γ(λ) = Σ_i e_i / (e_i + λ). The left side rises from 0 and
    the right side falls to 0, so that there is one solution, found by bisection of log λ within
    `PRECISIONS`. For a solution outside, the nearer bound is returned: the upper one for ‖θ̄‖ = 0,
    where the evidence rises with λ without bound, and the lower one where all e_i are 0.

    References
    ----------
    D. J. C. MacKay (1992), "Bayesian Interpolation".
    """
    norm = _squared_norm(means)
    values = torch.cat([e.double().flatten() for e in eigenvalues])
    low, high = (math.log(bound) for bound in PRECISIONS)
    for _ in range(60):
        middle = 0.5 * (low + high)
        precision = math.exp(middle)
        if precision * norm < float((values / (values + precision)).sum()):
            low = middle
        else:
            high = middle
    return min(max(math.exp(0.5 * (low + high)), PRECISIONS[0]), PRECISIONS[1])


def _squared_norm(means: Sequence[Tensor]) -> float:
    return sum(float(mean.detach().double().square().sum()) for mean in means)
