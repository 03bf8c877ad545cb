"""SWAG: a Gaussian from the moments of the optimiser's iterates."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pyrolora import defaults
from pyrolora.adapters import AdapterBank
from pyrolora.checks import positive, share, whole_number
from pyrolora.errors import ConfigError
from pyrolora.guides.engines import Fit
from pyrolora.guides.factor_program import FactorProgram
from pyrolora.guides.options import Guide, Latent, require
from pyrolora.guides.supports import Supports

SMALLEST_VARIANCE = 1e-12
"""The variance of an entry that did not move, so that the law has a density."""


@dataclass(frozen=True, kw_only=True)
class SWAG(Guide):
    """A Gaussian around the mean of T iterates of plain LoRA, with their covariance.

    The last part of the training holds its learning rate and passes through θ_1 .. θ_T, evenly
    spaced. With θ̄ and v their mean and variance, entry by entry, and D the last K deviations
    θ_t − θ̄ as columns,

        guide  θ ~ N(θ̄, ½ [diag(v) + D Dᵀ / (K − 1)])

    over the entries θ of A, of B, or of both, of all layers. The other factor, the task head and
    the noise of a regression are the means of theirs. How wide it is depends on the learning rate
    and the batch size: a large step, a wide posterior.

    Parameters
    ----------
    start
        The share of the training steps after which iterates are collected, and the learning rate
        is held. With the Trainer's linear schedule that is 1 − ``start`` times the first.
    snapshots
        T, or as many as there are steps.
    rank
        K <= T. It takes the memory of K more copies of the factors.
    prior_scale
        σ₀ of the prior N(0, σ₀² I), in training, too; None: plain LoRA, and the prior of the Pyro
        model is the guide's law.
    latent
        ``"A"``, ``"B"``, or ``"AB"``.

    References
    ----------
    W. J. Maddox et al. (2019), "A Simple Baseline for Bayesian Uncertainty in Deep Learning",
    NeurIPS, arXiv 1902.02476. E. Onal et al. (2024), "Gaussian Stochastic Weight Averaging for
    Bayesian Low-Rank Adaptation of Large Language Models", arXiv 2405.03425.
    """

    name = "swag"

    start: float = defaults.SWAG_START
    snapshots: int = defaults.SWAG_SNAPSHOTS
    rank: int = defaults.SWAG_RANK
    prior_scale: float | None = None
    latent: Latent = "AB"

    def __post_init__(self) -> None:
        super().__post_init__()
        share("start", self.start, "[0, 1)")
        whole_number("snapshots", self.snapshots, at_least=2)
        whole_number("rank", self.rank, at_least=2)
        require(self.rank <= self.snapshots, "rank", "at most snapshots", self.rank)
        if self.prior_scale is not None:
            positive("prior_scale", self.prior_scale)

    @property
    def supports(self) -> Supports:
        return Supports(
            rank_allocation=True,
            distinct_prior=self.prior_scale is not None,
            gaussian_head=True,
        )

    def build(self, bank: AdapterBank) -> SWAGProgram:
        return SWAGProgram(bank, self)

    def infer(self, fit: Fit) -> None:
        joint = fit.joint
        fit.program.begin([*joint.heads.parameters(), *joint.task.parameters()])
        try:
            fit.svi(final=False)
        finally:
            fit.program.conclude()
        if int(fit.program.count) < 2:
            warnings.warn(
                "the training ended before swag had two iterates, so that the posterior is a point "
                "mass: the network as it was at the end",
                stacklevel=2,
            )

    def rate_held_from(self) -> float:
        return self.start


class SWAGProgram(FactorProgram):
    """A program with one site, named by the latent factors: ``A``, ``B`` or ``AB``.

    During training it is the point mass of plain LoRA.

    Buffers: the number of iterates, ``count``; the mean over them of all that is trained,
    ``iterate_mean``, which is empty but for the time of a training; and of the latent entries
    ``variance`` (n,) and ``deviations`` (K, n). Until `conclude`, ``variance`` is a sum of squares,
    and ``deviations`` are the iterates themselves.
    """

    joint_law = True

    options: SWAG
    count: Tensor
    iterate_mean: Tensor
    variance: Tensor
    deviations: Tensor

    def __init__(self, bank: AdapterBank, options: SWAG) -> None:
        super().__init__(bank, options)
        total = bank.layout(options.latent).total
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("iterate_mean", torch.zeros(0))
        self.register_buffer("variance", torch.zeros(total))
        self.register_buffer("deviations", torch.zeros(options.rank, total))
        for name in ("count", "variance"):
            self.confine(name, constraints.nonnegative)
        self._trained: list[nn.Parameter] | None = None

    def prior(self, site: str) -> dist.TorchDistribution:
        if self.options.prior_scale is None:
            return self.law(site)
        return super().prior(site)

    def law(self, site: str) -> dist.TorchDistribution:
        mean = self.loc(site)
        if self._trained is not None:
            return dist.Delta(mean, event_dim=1)
        variance = (0.5 * self.variance).clamp(min=SMALLEST_VARIANCE)
        return dist.LowRankMultivariateNormal(mean, self.deviations.mT, variance)

    def rank_entries(self, rows: Tensor) -> dict[str, Tensor]:
        return {}  # iterates are collected once the ranks no longer move

    def scale_parameters(self) -> list[str]:
        return []

    def begin(self, others: Iterable[nn.Parameter]) -> None:
        """Become a point mass, and collect the iterates of the bank and of ``others``."""
        self._trained = [*self.bank.parameters(), *others]
        self.iterate_mean = torch.zeros_like(parameters_to_vector(self._trained))

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        if self._trained is None:
            return
        first = round(self.options.start * steps)
        wanted = min(self.options.snapshots, steps - first)
        if wanted < 2:
            raise ConfigError(
                f"swag needs two steps after start={self.options.start:g} of the training, and of "
                f"{steps} there are {steps - first}; train longer, or start earlier"
            )
        # The t-th of T snapshots is made at step first + t (steps - first) / T.
        if step > first and (step - first) * wanted % (steps - first) < wanted:
            self._collect()

    def _collect(self) -> None:
        """Update mean and squares by Welford's rule, and replace the oldest iterate."""
        assert self._trained is not None
        bank = self.bank
        latent = bank.latent_part(self.options.latent, bank.means())
        iterate = parameters_to_vector(self._trained)
        if not torch.isfinite(iterate).all():  # the next step will stop the training
            return
        before = latent - self._latent_mean()
        row = int(self.count) % self.options.rank
        self.count += 1
        self.iterate_mean += (iterate - self.iterate_mean) / self.count
        self.variance += before * (latent - self._latent_mean())
        self.deviations[row] = latent

    @torch.no_grad()
    def conclude(self) -> None:
        """Replace the last iterate by the means, and the sums by the moments of the law."""
        assert self._trained is not None
        count, kept = int(self.count), min(int(self.count), self.options.rank)
        if count > 1:
            self.variance /= count - 1
            self.deviations[:kept] -= self._latent_mean()
            self.deviations *= (2 * (kept - 1)) ** -0.5
            vector_to_parameters(self.iterate_mean, self._trained)
        else:
            self.deviations.zero_()
        self.iterate_mean = self.iterate_mean[:0].clone()
        self._trained = None

    def _latent_mean(self) -> Tensor:
        sizes = [self.bank.layouts[factor].total for factor in "AB"]
        A, B = self.iterate_mean[: sum(sizes)].split(sizes)
        return {"A": A, "B": B, "AB": self.iterate_mean[: sum(sizes)]}[self.options.latent]
