"""Contraction: how far the posterior of each block has moved and narrowed from its prior."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrolora.adapters import AdapterBank, FlatFactors
from pyrolora.guides import SWAG, Program, Variational
from pyrolora.guides.factor_program import FactorProgram
from pyrolora.guides.wrapping import innermost
from pyrolora.model import evaluating
from pyrolora.seeding import DRAWING, seeded

DRAWS, AT_ONCE = 64, 8


@dataclass(frozen=True)
class Contraction:
    """Posterior against prior over the entries of one block: one factor of one layer.

    With v and v₀ the variances of an entry, m and m₀ its means, a Gaussian of these moments is

        KL = ½ (v/v₀ − 1 − log v/v₀) + ½ (m − m₀)²/v₀

    from its prior: one part for the width and one for the mean, in nats.

    Attributes
    ----------
    block
        ``<layer>.A`` or ``<layer>.B``.
    scale
        The posterior's standard deviation over the prior's, root mean squares over the entries: 1
        where the data said nothing about the spread, 0 for a point.
    shift
        The distance of the two means in prior standard deviations, root mean square.
    width_kl, mean_kl
        The two parts of the KL for each active rank, means over its entries: nats per entry.
    """

    block: str
    scale: float
    shift: float
    width_kl: tuple[float, ...] = ()
    mean_kl: tuple[float, ...] = ()

    @property
    def prior_dominated(self) -> bool:
        """Whether draws of the posterior look like draws of the prior.

        They do with at least 95 % of the prior's spread, around the same place: a shift of 0.2 is a
        KL of 0.02 nats per entry.
        """
        return self.scale > 0.95 and self.shift < 0.2


@dataclass(frozen=True)
class Moments:
    """Moments of the entries of a block, (r, columns), under posterior and prior.

    ``error`` is the Monte Carlo error in the mean of (m − m₀)².
    """

    mean: Tensor
    variance: Tensor
    prior_mean: Tensor
    prior_variance: Tensor
    error: Tensor


def has_trained_widths(program: Program) -> bool:
    """Return whether training steps alone made the widths.

    The number and the size of the steps then decide how wide they are, with any data or none, so
    that the widths are no sign of learning.
    """
    options = innermost(program).options
    settled = program.settles or (program.settles_at_first and has_inputs(program.bank))
    return isinstance(options, Variational | SWAG) and not settled and program.stored() is None


def has_inputs(bank: AdapterBank) -> bool:
    """Return whether all adapted layers have inputs that a curvature can be made of.

    Adapted embeddings and parameters have none.
    """
    return not (bank.config.target_parameters or any(s.lookup for s in bank.specs.values()))


@torch.no_grad()
def update_norms(program: Program) -> dict[str, float]:
    """Return ‖s B A‖ of the mean adapter by layer; nothing for an ensemble, which has several."""
    if program.members > 1 or not program.bank.specs:
        return {}
    mean = program.bank.matrices(program.mean())
    return {
        name: program.bank.specs[name].scaling * float(torch.linalg.matrix_norm(B @ A))
        for name, (A, B) in mean.items()
    }


@torch.no_grad()
def contractions(program: Program) -> list[Contraction]:
    """Return the contraction of every block whose prior has a spread.

    Plain LoRA has no such prior, nor have an ensemble, whose members are fixed, and a guide that is
    its own prior: the list is empty.

    Moments are those of the guide's own distribution where the factors are its sites. Elsewhere
    they come from draws of both, with the same random numbers, so that a guide that equals its
    prior has a scale of 1. There the variance of an entry is that of its rank (as it is in
    MonteCLoRA): the Monte Carlo error of 64 draws averages out over entries, and its contribution
    to the shift is subtracted.
    """
    if program.members > 1 or not program.supports.distinct_prior:
        return []
    with DRAWING, evaluating(program):
        core = innermost(program) if program.stored() is None else program
        moments = _stated(core) if isinstance(core, FactorProgram) else _drawn(program)
        return [_contraction(block, m) for block, m in moments if m.prior_variance.mean() > 0]


def _contraction(block: str, of: Moments) -> Contraction:
    """Return the contraction that these moments amount to."""
    distance = (of.mean - of.prior_mean).square()
    prior_spread, spread = of.prior_variance.mean(), of.variance.mean()
    shift = (distance.mean() - of.error).clamp(min=0) / prior_spread
    ratio = of.variance / of.prior_variance
    width = 0.5 * (ratio - 1 - ratio.log()).mean(-1)
    mean = 0.5 * ((distance - of.error) / of.prior_variance).mean(-1).clamp(min=0)
    return Contraction(
        block,
        float((spread / prior_spread).sqrt()),
        float(shift.sqrt()),
        tuple(width.tolist()),
        tuple(mean.tolist()),
    )


def _stated(program: FactorProgram) -> Iterator[tuple[str, Moments]]:
    """Yield the moments that the distributions of the factors state themselves."""
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
    """Yield moments estimated from draws of model and guide with the same random numbers."""
    bank, stored = program.bank, program.stored() is not None
    with seeded(0):
        prior = _moments(bank, _prior(program))
    with seeded(0):
        drawn = program.draws(DRAWS, AT_ONCE)
        posterior = _moments(bank, ((_count(s), program.factors(s)) for s in drawn))
    means = None if stored else program.mean()
    for factor in "AB":
        exact = None if means is None else bank.in_use(factor, getattr(means, factor).double())
        for name in bank.specs:
            prior_mean, prior_variance = (
                moment[name].to(posterior[factor][0][name]) for moment in prior[factor]
            )
            mean, variance = (moment[name] for moment in posterior[factor])
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


def _prior(program: Program) -> Iterator[tuple[int, FlatFactors]]:
    """Yield numbers of draws, and their factors, from the model."""
    most = program.bank.draws_at_once
    for _ in range(0, DRAWS, AT_ONCE):
        replay = program.replay(AT_ONCE, program.model) if most < AT_ONCE else None
        if replay is None:
            yield AT_ONCE, program.traced(AT_ONCE, program.model).nodes["_RETURN"]["value"]
            continue
        for start in range(0, AT_ONCE, most):
            stop = min(start + most, AT_ONCE)
            yield stop - start, replay.trace(start, stop).nodes["_RETURN"]["value"]


def _count(sites: Mapping[str, Tensor]) -> int:
    return len(next(iter(sites.values())))


def _moments(bank: AdapterBank, draws: Iterator[tuple[int, FlatFactors]]) -> dict[str, tuple]:
    """Return mean and variance of the entries by factor, each a dict of layer -> (r, columns).

    Sums are taken from the first draw on, so that their rounding error is that of the spread.
    """
    first: dict[str, Tensor] | None = None
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    for count, factors in draws:
        values = {f: getattr(factors, f).double().expand(count, -1) for f in "AB"}
        first = first or {f: value[0] for f, value in values.items()}
        for f, value in values.items():
            centred = value - first[f]
            sums[f] = sums.get(f, 0.0) + centred.sum(0)
            squares[f] = squares.get(f, 0.0) + centred.square().sum(0)
    assert first is not None
    moments = {}
    for f, reference in first.items():
        centre = sums[f] / DRAWS
        variance = (squares[f] / DRAWS - centre.square()).clamp(min=0) * DRAWS / (DRAWS - 1)
        moments[f] = (bank.in_use(f, reference + centre), bank.in_use(f, variance))
    return moments
