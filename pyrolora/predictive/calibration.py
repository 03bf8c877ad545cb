"""Calibration: one temperature for all predictions of a posterior, from held-out data."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrolora import defaults
from pyrolora.adapters import AnyFactors
from pyrolora.checks import positive, whole_number
from pyrolora.columns import Batch
from pyrolora.data import Prepared
from pyrolora.errors import ConfigError, NonFiniteError
from pyrolora.model import JointModel
from pyrolora.predictive.choices import choice_rows
from pyrolora.predictive.predict import reduced
from pyrolora.predictive.predictor import Predictor

logger = logging.getLogger(__name__)

POINTS = 25
"""Temperatures per pass over the data: an odd number, so that 1 is one of them."""
ROUNDING = 1e-6
"""The largest gain in nats that counts as none: log-likelihoods are in float32."""


@dataclass(frozen=True)
class Calibration:
    """A temperature, and its effect on the data that chose it.

    Attributes
    ----------
    temperature
        T, with the lowest negative log-likelihood of the predictive law.
    nll_before, nll_after
        The negative log-likelihood at T = 1 and at T: nats per example, or per counted token.
    num_examples
        The number of examples that chose it.
    """

    temperature: float
    nll_before: float
    nll_after: float
    num_examples: int

    @property
    def at_an_end(self) -> bool:
        """Whether T is the highest or the lowest that was tried."""
        low, high = defaults.TEMPERATURES
        return not low * 1.001 < self.temperature < high / 1.001


def check_temperature(temperature: float) -> float:
    """Return the temperature; raise `ConfigError` if it is not within ``defaults.TEMPERATURES``."""
    low, high = defaults.TEMPERATURES
    positive("temperature", temperature)
    if not low <= temperature <= high:
        raise ConfigError(f"temperature must be from {low} to {high}, got {temperature!r}")
    return float(temperature)


def calibrate(
    predictor: Predictor,
    data: Any,
    num_samples: int | None,
    *,
    draws: Iterable[int] | None = None,
    batch_size: int,
    seed: int | None,
) -> Calibration:
    """Return the temperature that suits held-out data best, as `Posterior.calibrate` has it."""
    whole_number("batch_size", batch_size, at_least=1)
    numbers = predictor.numbers(draws, num_samples=num_samples, seed=seed)
    joint = predictor.joint
    if choice_rows(data, joint) is not None:
        raise ConfigError(
            "a language model's temperature is that of each token, and the data have 'choices' "
            "between texts, whose best temperature is another; calibrate on texts, or a fit with "
            "choices='letters' or 'texts'"
        )
    prepared = predictor.prepare(data, need_labels=True, splits=defaults.FIT_SPLITS)
    factors = predictor.factors(num_samples, seed, numbers)
    calibration = calibrated(joint, prepared, factors, batch_size=batch_size)
    logger.info(
        "temperature %.4g from %d examples: NLL %.4f before, %.4f after",
        calibration.temperature,
        calibration.num_examples,
        calibration.nll_before,
        calibration.nll_after,
    )
    if calibration.at_an_end:
        warnings.warn(
            f"the temperature {calibration.temperature:.4g} is the end of what was looked at, "
            f"{defaults.TEMPERATURES}: too few examples, all of them right, labels that the "
            "predictions say nothing about, or draws that lie further apart than the labels; "
            "posterior.temperature = 1.0 undoes it",
            RuntimeWarning,
            stacklevel=3,
        )
    return calibration


def warn_untempered(target: str, temperature: float) -> None:
    """Warn that ``target``, which a posterior is exported to, does not hold its temperature."""
    if temperature != 1:
        warnings.warn(
            f"{target} does not hold the temperature {temperature:.4g} of this posterior, which "
            "was chosen for its draws together: its predictions are those at temperature 1. "
            "posterior.calibrate(data, num_samples=0) finds the mean adapter's own, and "
            "calibrate(data, draws=[k]) that of draw k: divide its logits by it, or multiply the "
            "variance of a regression's noise by it",
            UserWarning,
            stacklevel=3,
        )


@torch.no_grad()
def calibrated(
    joint: JointModel,
    data: Prepared,
    factors: AnyFactors,
    *,
    batch_size: int,
    prior: float = math.inf,
) -> Calibration:
    """Return the T that minimises −Σ_i log mean_s p_T(y_i | draw s), with p_T of `Task.at`.

    With a ``prior`` τ it minimises the sum of that and (log T)² / 2 τ². It takes two passes over
    the data. The outputs of the network are not kept.
    """
    assert data.labels is not None
    count = joint.task.count(data.labels)

    def nll(temperatures: Tensor) -> Tensor:
        tasks = [joint.task.at(float(t)) for t in temperatures]

        def losses(outputs: Iterable[Tensor], batch: Batch) -> Tensor:
            scores = [torch.stack([t.row_log_prob(o, batch) for t in tasks]) for o in outputs]
            joined = torch.cat(scores, 1).cpu().double()  # (T, S, b)
            return (math.log(joined.shape[1]) - joined.logsumexp(1)).sum(1)

        order = data.by_length()
        parts = reduced(
            joint, data, factors, losses, order, batch_size=batch_size, title="calibrating"
        )
        return (torch.stack(parts).sum(0) + 0.5 * (temperatures.log() / prior).square()) / count

    return lowest(nll, len(data))


def lowest(nll: Callable[[Tensor], Tensor], num_examples: int) -> Calibration:
    """Return the minimum of ``nll``, a function of several T, over ``defaults.TEMPERATURES``.

    It comes from a grid of log T, a second grid between the neighbours of its lowest point, and
    the vertex of the parabola through the lowest point of that and its neighbours. T stays 1 where
    no other gains anything.
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
