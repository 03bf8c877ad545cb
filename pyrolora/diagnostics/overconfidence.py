"""Overconfidence: the gap between what predictions promise and what they keep."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pyrolora.tasks.evidence import Promise

ROUNDING = 1e-9
"""Relative rounding error of a gap, by which one of exactly two standard errors may seem larger."""


@dataclass(frozen=True)
class Overconfidence:
    """How far a prediction falls short of its promise, per observation.

    Attributes
    ----------
    promised, kept
        Means over the observations.
    gap
        ``promised`` − ``kept``.
    error
        The standard error of ``gap``.
    n
        How many rows there are.
    """

    promised: float
    kept: float
    gap: float
    error: float
    n: int


def overconfidence(promise: Promise) -> Overconfidence | None:
    """Return the gap of a promise, or None where it is within two standard errors.

    With gaps g_i = promised_i − kept_i and counts c_i (1 where rows are observations), the gap is
    the ratio r = Σ g_i / Σ c_i, and its standard error √(v / n) · n / Σ c_i, with v the variance of
    g_i − r c_i.
    """
    promised, kept = promise.promised.double().numpy(), promise.kept.double().numpy()
    n = len(promised)
    counts = np.ones(n) if promise.counts is None else promise.counts.double().numpy()
    total, variance = counts.sum(), promise.variance
    if not total or (variance is None and n < 2):
        return None
    gaps = promised - kept
    gap = gaps.sum() / total
    if variance is None:
        variance = float(np.var(gaps - gap * counts, ddof=1))
    error = (variance / n) ** 0.5 * (n / total)
    if not gap > 2 * error * (1 + ROUNDING):
        return None
    return Overconfidence(promised.sum() / total, kept.sum() / total, gap, error, n)
