"""Posterior against prior: what the fit made of it, and whether that can be the data's doing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyrolora.adapters import AdapterBank, FlatFactors
from pyrolora.guides import SWAG, Program, Variational, WrappingProgram
from pyrolora.guides.factor_program import FactorProgram
from pyrolora.model import evaluating
from pyrolora.seeding import DRAWING, seeded

DRAWS, AT_ONCE = 64, 8


@dataclass(frozen=True)
class Contraction:
    """Posterior against prior, over the entries of one factor of one layer.

    With v and v₀ the variances of an entry, m and m₀ its means, a Gaussian of these moments is

        KL = ½ (v/v₀ − 1 − log v/v₀) + ½ (m − m₀)²/v₀

    from its prior: a part of the width and a part of the mean, in nats.

    Attributes
    ----------
    block
        ``<layer>.A`` or ``<layer>.B``.
    scale
        The posterior's standard deviation over the prior's, root mean squares over the entries: 1
        where the data said nothing of the spread, 0 of a point.
    shift
        The distance of the two means in prior standard deviations, root mean square.
    width_kl, mean_kl
        Of each active rank the two parts of the KL, means over its entries: nats per entry.
    """

    block: str
    scale: float
    shift: float
    width_kl: tuple[float, ...] = ()
    mean_kl: tuple[float, ...] = ()

    @property
    def prior_dominated(self) -> bool:
        """Whether draws of the posterior are, to the eye, draws of the prior: at least 95 % of its
        spread, around the same place. (A shift of 0.2 is a KL of 0.02 nats an entry.)"""
        return self.scale > 0.95 and self.shift < 0.2


@dataclass(frozen=True)
class Moments:
    """Means and variances of the entries of a block, (r, columns), under posterior and prior, and
    the Monte Carlo error in the mean of (m − m₀)²."""

    mean: Tensor
    variance: Tensor
    prior_mean: Tensor
    prior_variance: Tensor
    error: Tensor


def has_trained_widths(program: Program) -> bool:
    """Whether steps of training made the widths: their number and their size then decide how wide
    they are, with any data or none, so that the widths are no sign of learning."""
    options = getattr(program.options, "inner", program.options)
    return (
        isinstance(options, Variational | SWAG) and not program.settles and program.stored() is None
    )


def about_widths(program: Program, blocks: Sequence[Contraction]) -> str:
    """What the widths of a posterior can say of the data, in words."""
    if not any(one.scale for one in blocks):
        return "The posterior is a point: it has no widths."
    if has_trained_widths(program):
        return (
            "The widths come from the steps of the training: from their number and size, with any "
            "data or none. Their KL is no sign of learning, and whether the data would have them "
            "so is not known. (Of montec and meanfield scale_updates='curvature' finds out.)"
        )
    return (
        "The widths are those of the objective: the prior's where the data said nothing. Their KL "
        "says that the data constrain the entries, which random labels do, too."
    )


@torch.no_grad()
def update_norms(program: Program) -> dict[str, float]:
    """Layer -> ‖s B A‖ of the mean adapter; none of an ensemble, which has one a member."""
    if program.members > 1 or not program.bank.specs:
        return {}
    mean = program.bank.matrices(program.mean())
    return {
        name: program.bank.specs[name].scaling * float(torch.linalg.matrix_norm(B @ A))
        for name, (A, B) in mean.items()
    }


@torch.no_grad()
def contractions(program: Program) -> list[Contraction]:
    """The contraction of every block whose prior has a spread; none where there is no such prior:
    of plain LoRA, of an ensemble, whose members are given, and of a guide that is its own prior.

    Moments are those of the guide's own law where the factors are its sites; else of draws of both,
    from the same random numbers, so that a guide that is its prior has a scale of 1. There the
    variance of an entry is that of its rank (as it is in MonteCLoRA): over entries the Monte Carlo
    error of 64 draws averages out, and what it adds to the shift is taken off.
    """
    if program.members > 1 or not program.has_prior:
        return []
    with DRAWING, evaluating(program):
        core = program
        if isinstance(program, WrappingProgram) and program.stored() is None:
            core = program.inner
        found = _stated(core) if isinstance(core, FactorProgram) else _drawn(program)
        return [_contraction(block, m) for block, m in found if m.prior_variance.mean() > 0]


def _contraction(block: str, of: Moments) -> Contraction:
    distance = (of.mean - of.prior_mean).square()
    spread, own_spread = of.prior_variance.mean(), of.variance.mean()
    shift = (distance.mean() - of.error).clamp(min=0) / spread
    ratio = of.variance / of.prior_variance
    width = 0.5 * (ratio - 1 - ratio.log()).mean(-1)
    mean = 0.5 * ((distance - of.error) / of.prior_variance).mean(-1).clamp(min=0)
    return Contraction(
        block,
        float((own_spread / spread).sqrt()),
        float(shift.sqrt()),
        tuple(width.tolist()),
        tuple(mean.tolist()),
    )


def _stated(program: FactorProgram) -> Iterator[tuple[str, Moments]]:
    """Of the laws of the factors themselves."""
    prior = program.prior if program.previous is None else program.previous.law
    laws = [(program.law(site), prior(site)) for site in program.sites]
    latent, bank = program.options.latent, program.bank
    sizes = [bank.layouts[factor].total for factor in latent]
    values = [
        torch.cat([t.double() for t in parts]).split(sizes)
        for parts in zip(*((p.mean, p.variance, q.mean, q.variance) for p, q in laws), strict=True)
    ]
    for factor, *moments in zip(latent, *values, strict=True):
        for name in bank.specs:
            m, v, m0, v0 = (bank.in_use(factor, flat)[name] for flat in moments)
            yield f"{name}.{factor}", Moments(m, v, m0, v0, error=m.new_zeros(()))


def _drawn(program: Program) -> Iterator[tuple[str, Moments]]:
    bank, stored = program.bank, program.stored() is not None
    with seeded(0):
        prior = _moments(bank, _prior(program))
    with seeded(0):
        own = _moments(bank, map(program.factors, program.draws(DRAWS, AT_ONCE)))
    means = None if stored else program.mean()
    for factor in "AB":
        exact = None if means is None else bank.in_use(factor, getattr(means, factor).double())
        for name in bank.specs:
            prior_mean, prior_variance = (
                part[name].to(own[factor][0][name]) for part in prior[factor]
            )
            mean, variance = (part[name] for part in own[factor])
            error = prior_variance.mean() + (variance.mean() if stored else 0)
            yield (
                f"{name}.{factor}",
                Moments(
                    mean if exact is None else exact[name],
                    variance.mean(-1, keepdim=True),
                    prior_mean,
                    prior_variance.mean(-1, keepdim=True),
                    error / DRAWS,
                ),
            )


def _prior(program: Program) -> Iterator[FlatFactors]:
    """Draws of the factors from the model."""
    for _ in range(0, DRAWS, AT_ONCE):
        with poutine.block(), pyro.plate("draws", AT_ONCE, dim=-2):
            yield program.model()


def _moments(bank: AdapterBank, draws: Iterator[FlatFactors]) -> dict[str, tuple]:
    """Factor -> mean and variance of the entries, each layer -> (r, columns); sums from a first
    draw on, whose rounding error is that of the spread."""
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
    found = {}
    for f, first in start.items():
        centre = sums[f] / DRAWS
        variance = (squares[f] / DRAWS - centre.square()).clamp(min=0) * DRAWS / (DRAWS - 1)
        found[f] = (bank.in_use(f, first + centre), bank.in_use(f, variance))
    return found


def contraction_table(blocks: Sequence[Contraction]) -> pd.DataFrame:
    """A row per block: the ratio of the widths, the distance of the means, and nats per entry."""
    parts = [(np.array(one.width_kl), np.array(one.mean_kl)) for one in blocks]
    both = [width + mean for width, mean in parts]
    return pd.DataFrame(
        {
            "block": [one.block for one in blocks],
            "width, of the prior's": [one.scale for one in blocks],
            "distance of the means": [one.shift for one in blocks],
            "KL of the width": [width.mean() for width, _ in parts],
            "KL of the mean": [mean.mean() for _, mean in parts],
            "KL, lowest rank": [kl.min() for kl in both],
            "KL, highest rank": [kl.max() for kl in both],
        }
    )
