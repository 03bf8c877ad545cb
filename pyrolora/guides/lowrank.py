"""A Gaussian with a diagonal and a few directions, for the correlations that mean field lacks."""

from __future__ import annotations

from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyrolora import defaults
from pyrolora.adapters import AdapterBank
from pyrolora.checks import whole_number
from pyrolora.guides.engines import Curvature
from pyrolora.guides.factor_program import FactorProgram, GaussianGuide
from pyrolora.guides.supports import Supports


@dataclass(frozen=True, kw_only=True)
class LowRank(GaussianGuide):
    """A Gaussian over all latent factors at once, with K directions beside its diagonal.

        prior  θ ~ N(m₀, σ₀² I)         guide  θ ~ N(m, S (I + F Fᵀ) S),  S = diag(σ)

    for the n entries θ of A, of B, or of both, over all layers; F is (n, K), in units of σ. Along a
    direction entries move together, within a layer, across A and B, and across layers. With
    v_i = σ_i² (1 + Σ_k F_ik²) the variances, the KL is a closed form of O(n K²):

        ½ Σ_i [(v_i + (m_i − m_i0)²) / σ₀² − 1 + log(σ₀² / σ_i²)] − ½ log|I + Fᵀ F|

    By default m₀ is m, which then costs nothing, and σ₀ and σ are multiples of the root mean square
    of the row of the means. σ and F have no closed optimum given the curvature. With
    ``scale_updates=None`` σ is set to the optimum without correlations before some of the steps,
    and both are trained.

    By default a tenth of the training examples is held back, if that is ten or more, but at most
    250: these choose one number c, by which σ₀ and all σ_i are multiplied, and a temperature. The
    options from ``kl_weight`` to ``hold_back`` are those of `Variational`, which has this rule.

    Parameters
    ----------
    rank
        K. It takes the memory of K more copies of the factors, and of two more each for AdamW.
    prior_scale, init_scale
        σ₀, and the start of every σ_i, in the ``units``.
    units, prior_mean
        As in `GaussianGuide`.
    latent
        ``"A"``, ``"B"``, or ``"AB"``.

    References
    ----------
    V. M.-H. Ong, D. J. Nott, M. S. Smith (2018), "Gaussian Variational Approximation With a Factor
    Covariance Structure", Journal of Computational and Graphical Statistics, arXiv 1701.03208.
    """

    name = "lowrank"

    rank: int = defaults.COVARIANCE_RANK

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("rank", self.rank, at_least=1)

    @property
    def settles_at_first(self) -> bool:
        return self.scale_updates is None

    @property
    def supports(self) -> Supports:
        return Supports(
            rank_allocation=True,
            prior=True,
            post_hoc=self.post_hoc_scales,
            distinct_prior=True,
            gaussian_head=True,
        )

    def build(self, bank: AdapterBank) -> LowRankProgram:
        return LowRankProgram(bank, self)


class LowRankProgram(FactorProgram):
    """A program with one site, named by the latent factors: ``A``, ``B`` or ``AB``."""

    joint_law = True

    options: LowRank

    def __init__(self, bank: AdapterBank, options: LowRank) -> None:
        super().__init__(bank, options)
        total = bank.layout(options.latent).total
        start = options.init_scale * self.units(options.latent)
        self.declare("scale", start, constraints.positive)
        # At zero the directions would have no gradient; this is a hundredth of the variance.
        start = 0.1 * options.rank**-0.5 * torch.randn(total, options.rank)
        self.declare("directions", start)

    @torch.no_grad()
    def settle(self, curvature: Curvature, beta: float) -> None:
        """Set σ to the optimum without correlations, given how long F's rows are.

        The training goes on from there; without correlations in the curvature it stays.
        """
        latent = self.options.latent
        size = self.in_rows(latent, torch.ones_like(curvature.entries))
        longer = 1 + self.param("directions").square().sum(-1)
        precision = curvature.entries / beta + self.prior_scale(latent) ** -2
        self.assign("scale", (longer * precision).rsqrt() / size)

    def rank_entries(self, rows: Tensor) -> dict[str, Tensor]:
        entries = self.bank.spread(self.options.latent, rows)
        return {"scale": entries, "directions": entries.unsqueeze(-1)}

    def law(self, site: str) -> dist.TorchDistribution:
        scale = self.in_use(site, self.in_rows(site, self.param("scale")))
        directions = self.param("directions")
        active = self.bank.entries(site)
        if active is not None:
            directions = torch.where(active.unsqueeze(-1), directions, 0.0)
        factor = scale.unsqueeze(-1) * directions
        return dist.LowRankMultivariateNormal(self.loc(site), factor, scale.square())
