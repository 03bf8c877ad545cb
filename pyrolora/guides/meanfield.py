"""Mean field: an independent Gaussian for every entry of the factors."""

from __future__ import annotations

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyrolora import defaults
from pyrolora.adapters import AdapterBank, FlatFactors
from pyrolora.errors import positive
from pyrolora.guides.base import (
    LATENTS,
    Variational,
    require,
    tempered,
)
from pyrolora.guides.factor_program import FactorProgram


@dataclass(frozen=True, kw_only=True)
class MeanField(Variational):
    """A factorised Gaussian over the latent factors (the model of BLoB, with ``latent="A"``).

        prior  θ_i ~ N(0, σ₀²)          guide  θ_i ~ N(m_i, σ_i²)

    for the entries θ of A, of B, or of both; a factor that is not latent is its mean. The means
    are the LoRA weights, m and σ are learned, and the KL is a closed form:
    Σ_i log(σ₀/σ_i) + (σ_i² + m_i²) / (2 σ₀²) − ½.

    A draw is one setting of the weights for all tokens of a sequence, and for all examples of
    its group (``draws_per_batch``).

    Parameters
    ----------
    prior_scale
        σ₀, in the units of the factors.
    init_scale
        The start of every σ_i: a small one lets the network learn before the noise.
    latent
        ``"A"``, ``"B"``, or ``"AB"``.

    References
    ----------
    C. Blundell et al. (2015), "Weight Uncertainty in Neural Networks", ICML.
    Y. Wang et al. (2024), "BLoB: Bayesian Low-Rank Adaptation by Backpropagation for Large
    Language Models", NeurIPS, arXiv 2406.11675.
    """

    name = "meanfield"
    guide_only = (*Variational.guide_only, "init_scale")

    prior_scale: float = defaults.PRIOR_SCALE
    init_scale: float = defaults.INIT_SCALE
    latent: str = "A"
    kl_weight: float = defaults.MEANFIELD_KL_WEIGHT

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("prior_scale", self.prior_scale)
        positive("init_scale", self.init_scale)
        require(self.latent in LATENTS, "latent", f"one of {LATENTS}", self.latent)

    def build(self, bank: AdapterBank) -> MeanFieldProgram:
        return MeanFieldProgram(bank, self)


class MeanFieldProgram(FactorProgram):
    """One scale for each latent entry."""

    options: MeanField

    def __init__(self, bank: AdapterBank, options: MeanField) -> None:
        super().__init__(bank, options)
        for factor in options.latent:
            start = torch.full((bank.layouts[factor].total,), options.init_scale)
            self.declare(f"{factor}_scale", start, constraints.positive)

    def model(self, kl_weight: float = 1.0) -> FlatFactors:
        sites = {}
        with tempered(kl_weight):
            for factor in self.options.latent:
                sites[factor] = pyro.sample(factor, self._prior(factor))
        return self.factors(sites)

    def guide(self, kl_weight: float = 1.0) -> None:
        means = self.bank.means()
        with tempered(kl_weight):
            for factor in self.options.latent:
                mean = means.A if factor == "A" else means.B
                law = dist.Normal(mean, self._scale(factor))
                pyro.sample(factor, law.to_event(1))

    def _scale(self, factor: str) -> Tensor:
        """σ; of idle ranks the prior's, so that their KL is zero."""
        scale, active = self.param(f"{factor}_scale"), self.bank.entries(factor)
        return scale if active is None else torch.where(active, scale, self.options.prior_scale)

    def _prior(self, factor: str) -> dist.TorchDistribution:
        zeros = torch.zeros_like(self.get_parameter(f"{factor}_scale"))
        return dist.Normal(zeros, self.options.prior_scale).to_event(1)
