"""Mean field: an independent Gaussian for every entry of the factors."""

from __future__ import annotations

from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyrolora.adapters import AdapterBank
from pyrolora.guides.engines import Curvature
from pyrolora.guides.factor_program import FactorProgram, GaussianGuide
from pyrolora.guides.supports import Supports


@dataclass(frozen=True, kw_only=True)
class MeanField(GaussianGuide):
    """A factorised Gaussian over the latent factors (the model of BLoB, with ``latent="A"``).

        prior  θ_i ~ N(m_i0, σ₀²)       guide  θ_i ~ N(m_i, σ_i²)

    for the entries θ of A, of B, or of both; a factor that is not latent is its mean. The means
    are the LoRA weights, and the KL is a closed form:
    Σ_i log(σ₀/σ_i) + (σ_i² + (m_i − m_i0)²) / (2 σ₀²) − ½. By default m_i0 is m_i, which then costs
    nothing, and σ₀ and σ_i are multiples of the root mean square of the row of the means. Given the
    curvature H of the loss, σ_i² = β / (H_ii + β / σ₀²), to which σ_i is set, not trained.

    A draw is one value of the weights for all tokens of a sequence, and for all examples of its
    group (``draws_per_batch``).

    By default a tenth of the training examples is held back, if that is ten or more, but at most
    250: these choose one number c, by which σ₀ and all σ_i are multiplied, and a temperature. The
    options from ``kl_weight`` to ``hold_back`` are those of `Variational`, which has this rule.

    Parameters
    ----------
    prior_scale, init_scale
        σ₀, and the start of every σ_i, in the ``units``.
    units, prior_mean
        As in `GaussianGuide`.
    latent
        ``"A"``, ``"B"``, or ``"AB"``.

    References
    ----------
    C. Blundell et al. (2015), "Weight Uncertainty in Neural Networks", ICML.
    Y. Wang et al. (2024), "BLoB: Bayesian Low-Rank Adaptation by Backpropagation for Large
    Language Models", NeurIPS, arXiv 2406.11675.
    """

    name = "meanfield"

    @property
    def closed_scales(self) -> bool:
        return True

    @property
    def supports(self) -> Supports:
        return Supports(
            rank_allocation=True,
            prior=True,
            post_hoc=self.post_hoc_scales,
            closed_scales=self.closed_scales,
            independent_layers=True,
            distinct_prior=True,
            gaussian_head=True,
        )

    def build(self, bank: AdapterBank) -> MeanFieldProgram:
        return MeanFieldProgram(bank, self)


class MeanFieldProgram(FactorProgram):
    """A program with sites ``A`` and ``B``, those that are latent; one scale per entry."""

    options: MeanField

    def __init__(self, bank: AdapterBank, options: MeanField) -> None:
        super().__init__(bank, options)
        for factor in options.latent:
            start = options.init_scale * self.units(factor)
            self.declare(f"{factor}_scale", start, constraints.positive)
        self.hold_scales()

    @torch.no_grad()
    def settle(self, curvature: Curvature, beta: float) -> None:
        sizes = [self.bank.layouts[site].total for site in self.sites]
        for site, entries in zip(self.sites, curvature.entries.split(sizes), strict=True):
            size = self.in_rows(site, torch.ones_like(entries))
            precision = entries / beta + self.prior_scale(site) ** -2
            self.assign(f"{site}_scale", precision.rsqrt() / size)

    def rank_entries(self, rows: Tensor) -> dict[str, Tensor]:
        return {f"{site}_scale": self.bank.spread(site, rows) for site in self.sites}

    def law(self, site: str) -> dist.TorchDistribution:
        scale = self.in_use(site, self.in_rows(site, self.param(f"{site}_scale")))
        return dist.Normal(self.loc(site), scale).to_event(1)
