"""One temperature for all predictions of a posterior, from held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrolora import defaults
from pyrolora.adapters import FlatFactors
from pyrolora.checks import positive
from pyrolora.columns import Batch
from pyrolora.data import Prepared
from pyrolora.errors import ConfigError, NonFiniteError
from pyrolora.model import JointModel
from pyrolora.predictive.predict import reduced

POINTS = 25
"""Temperatures of one pass over the data: odd, so that 1 is one of them."""
ROUNDING = 1e-6
"""A gain in nats that is none: log-likelihoods are in float32."""


@dataclass(frozen=True)
class Calibration:
    """A temperature, and what it does to the data that chose it.

    Attributes
    ----------
    temperature
        T, of the lowest negative log-likelihood of the predictive law.
    nll_before, nll_after
        That of T = 1, and that of T: nats an example, or a counted token.
    num_examples
        How many examples chose it.
    """

    temperature: float
    nll_before: float
    nll_after: float
    num_examples: int

    @property
    def at_an_end(self) -> bool:
        """Whether T is the highest or the lowest that was looked at."""
        low, high = defaults.TEMPERATURES
        return not low * 1.001 < self.temperature < high / 1.001


def check_temperature(temperature: float) -> float:
    """The temperature; `ConfigError` unless it is a number within ``defaults.TEMPERATURES``."""
    low, high = defaults.TEMPERATURES
    positive("temperature", temperature)
    if not low <= temperature <= high:
        raise ConfigError(f"temperature must be from {low} to {high}, got {temperature!r}")
    return float(temperature)


@torch.no_grad()
def calibrated(
    joint: JointModel, data: Prepared, factors: FlatFactors, *, batch_size: int
) -> Calibration:
    """The T that minimises −Σ_i log mean_s p_T(y_i | draw s), with p_T of `Task.at`, by two
    passes over the data. The outputs of the network are not kept."""
    assert data.labels is not None
    count = joint.task.count(data.labels)

    def nll(temperatures: Tensor) -> Tensor:
        laws = [joint.task.at(float(t)) for t in temperatures]

        def losses(outputs: Iterable[Tensor], batch: Batch) -> Tensor:
            scores = [torch.stack([a.row_log_prob(o, batch) for a in laws]) for o in outputs]
            joined = torch.cat(scores, 1).cpu().double()  # (T, S, b)
            return (math.log(joined.shape[1]) - joined.logsumexp(1)).sum(1)

        order = data.by_length()
        parts = reduced(
            joint, data, factors, losses, order, batch_size=batch_size, title="calibrating"
        )
        return torch.stack(parts).sum(0) / count

    return lowest(nll, len(data))


def lowest(nll: Callable[[Tensor], Tensor], num_examples: int) -> Calibration:
    """The minimum of ``nll``, a function of several T at once, over ``defaults.TEMPERATURES``.

    A grid of log T, a second one between the neighbours of its lowest point, and the vertex of the
    parabola through the three lowest points of that. T stays 1 where no other gains anything.
    """
    low, high = map(math.log, defaults.TEMPERATURES)
    before = math.nan
    for look in range(2):
        grid = torch.linspace(low, high, POINTS, dtype=torch.float64)
        if not look:
            grid[POINTS // 2] = 0.0
        values = nll(grid.exp())
        if values.isnan().any():
            raise NonFiniteError(
                "the network gives NaN or infinity for the data: the posterior's numbers, or the "
                "network's, are too large for its precision; load it in float32, or fit with a "
                "lower learning rate"
            )
        before = before if look else float(values[POINTS // 2])
        best = int(values.argmin())
        low, high = (float(grid[i]) for i in (max(best - 1, 0), min(best + 1, POINTS - 1)))
    place, after = float(grid[best]), float(values[best])
    if 0 < best < POINTS - 1:
        left, middle, right = values[best - 1 : best + 2].tolist()
        bend = left - 2 * middle + right
        if 0 < bend < math.inf:
            place += float(grid[best + 1] - grid[best]) * (left - right) / (2 * bend)
            after -= (left - right) ** 2 / (8 * bend)
    if before - after < ROUNDING:
        return Calibration(1.0, before, before, num_examples)
    bounds = defaults.TEMPERATURES
    return Calibration(min(max(math.exp(place), bounds[0]), bounds[1]), before, after, num_examples)
