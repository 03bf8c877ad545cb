"""How far the data moved the posterior away from its prior."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyrolora.adapters import AdapterBank, FlatFactors
from pyrolora.guides import Program
from pyrolora.model import evaluating
from pyrolora.seeding import DRAWING

DRAWS, AT_ONCE = 64, 8


@dataclass(frozen=True)
class Contraction:
    """Posterior against prior, over the entries of one factor of one layer.

    Attributes
    ----------
    block
        ``<layer>.A`` or ``<layer>.B``.
    scale
        The posterior's standard deviation over the prior's, root mean squares over the entries: 1
        where the data said nothing of the spread, 0 of a point.
    shift
        The distance of the two means in prior standard deviations, root mean square.
    """

    block: str
    scale: float
    shift: float

    @property
    def prior_dominated(self) -> bool:
        """Whether draws of the posterior are, to the eye, draws of the prior: at least 95 % of its
        spread, around the same place. (A shift of 0.2 is a KL of 0.02 nats an entry.)"""
        return self.scale > 0.95 and self.shift < 0.2


@torch.no_grad()
def contractions(program: Program) -> list[Contraction]:
    """The contraction of every block whose prior has a spread, from draws of both; none where there
    is no such prior: of plain LoRA, of an ensemble, whose members are given, and of a guide that is
    its own prior.

    Over entries the Monte Carlo error of 64 draws averages out; what it adds to the shift is taken
    off.
    """
    if program.members > 1 or not program.has_prior:
        return []
    blocks = [block.name for factor in "AB" for block in program.bank.layouts[factor].blocks]
    with DRAWING, evaluating(program):
        prior = _moments(program.bank, _prior(program))
        posterior = _moments(program.bank, map(program.factors, program.draws(DRAWS, AT_ONCE)))
    found = []
    for block, (mean, variance), (own_mean, own_variance) in zip(
        blocks, prior, posterior, strict=True
    ):
        spread, own_spread = variance.mean(), own_variance.mean()
        if spread > 0:
            error = (spread + own_spread) / DRAWS
            distance = ((own_mean - mean).square().mean() - error).clamp(min=0)
            scale, shift = (own_spread / spread).sqrt(), (distance / spread).sqrt()
            found.append(Contraction(block, float(scale), float(shift)))
    return found


def _prior(program: Program) -> Iterator[FlatFactors]:
    """Draws of the factors from the model."""
    for _ in range(0, DRAWS, AT_ONCE):
        with poutine.block(), pyro.plate("draws", AT_ONCE, dim=-2):
            yield program.model()


def _moments(bank: AdapterBank, draws: Iterator[FlatFactors]) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance of every entry, a pair a block; sums from a first draw on, whose rounding
    error is that of the spread."""
    start: dict[str, Tensor] | None = None
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    for factors in draws:
        values = {f: getattr(factors, f).double().expand(AT_ONCE, -1) for f in "AB"}
        start = start or {f: value[0] for f, value in values.items()}
        for f, value in values.items():
            centred = value - start[f]
            sums[f] = sums.get(f, 0.0) + centred.sum(0)
            squares[f] = squares.get(f, 0.0) + centred.square().sum(0)
    assert start is not None
    pairs = []
    for f, first in start.items():
        centre = sums[f] / DRAWS
        variance = (squares[f] / DRAWS - centre.square()).clamp(min=0) * DRAWS / (DRAWS - 1)
        layout = bank.layouts[f]
        means, variances = bank.in_use(f, first + centre), bank.in_use(f, variance)
        pairs += [(means[b.layer], variances[b.layer]) for b in layout.blocks]
    return pairs
