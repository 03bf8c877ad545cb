"""Programs whose sites are the latent factors themselves, and their Gaussian options."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrolora import defaults
from pyrolora.adapters import AdapterBank, FlatFactors
from pyrolora.checks import positive
from pyrolora.guides.centred import CentredProgram
from pyrolora.guides.options import Latent, PriorMean, Units, Variational, unit_of
from pyrolora.guides.plates import flat, tempered
from pyrolora.guides.program import Quantities, Sites


@dataclass(frozen=True, kw_only=True)
class GaussianGuide(Variational):
    """Options of a Gaussian guide over the entries of the factors, with the prior N(m₀, σ₀²).

    Parameters
    ----------
    prior_scale
        σ₀, in the ``units``.
    init_scale
        Start of every σ_i, in the ``units``: trained scales take many steps from a small one; by
        curvature it is where the first estimate is made.
    units
        ``"row"``: scales are multiples of the root mean square of what a rank has learnt, a row of
        the mean of A (or of Bᵀ), less its start where that is taken off again; for the learned
        prior mean. ``"fan_in"``: they are multiples of 1/√in for A and of 1/√r for B, so that the
        noise of A x, or of B A x, is the same at every width and rank. ``"one"``: they are
        absolute. None: ``"row"`` with the learned prior mean, else ``"fan_in"``.
    prior_mean
        m₀: ``"learned"``, the means m of the guide, which then cost nothing (empirical Bayes);
        ``"start"``, the start of the factors (a price on what is learnt), or the adapter that a
        post-hoc fit starts from; or ``"zero"``.
    latent
        ``"A"``, ``"B"``, or ``"AB"``.
    """

    prior_scale: float = defaults.PRIOR_SCALE
    init_scale: float = defaults.INIT_SCALE
    units: Units | None = None
    prior_mean: PriorMean = defaults.PRIOR_MEAN
    latent: Latent = "A"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("prior_scale", self.prior_scale)
        positive("init_scale", self.init_scale)
        unit_of(self.units, self.prior_mean)

    @property
    def unit(self) -> Units:
        return unit_of(self.units, self.prior_mean)


class FactorProgram(CentredProgram):
    """A program whose sites are the latent factors, flat; a factor that is not latent is its mean.

    The sites are ``A`` and ``B``, or, for a joint law of both, the one site ``AB``.
    """

    joint_law: ClassVar[bool] = False

    def __init__(self, bank: AdapterBank, options: Any) -> None:
        super().__init__(bank, options)
        self.sites: tuple[str, ...] = tuple(options.latent)
        if self.joint_law:
            self.sites = (options.latent,)

    def prior(self, site: str) -> dist.TorchDistribution:
        """Return the law of a site in the model."""
        return self.normal_prior(site, self.prior_scale(site))

    def units(self, latent: str) -> Tensor:
        """Return the unit of the scale of each entry."""
        layout = self.bank.layout(latent)
        device = self.bank.get_parameter("A_loc").device
        one = torch.ones(layout.total, device=device)
        if self.options.unit != "fan_in":
            return one
        return layout.scale(layout.fan_in().to(device).rsqrt(), one)

    def prior_scale(self, site: str) -> Tensor:
        """Return σ₀ of each entry."""
        scale = self.options.prior_scale
        if self.options.unit == "row":
            return self.in_rows(site, scale)
        if self.options.unit == "fan_in":
            return scale * self.units(site)
        device = self.bank.get_parameter("A_loc").device
        number = torch.full((), float(scale), device=device)  # one, however many the entries
        return number.expand(self.bank.layout(site).total)

    def in_rows(self, site: str, scale: Tensor | float) -> Tensor:
        """Return the scale of each entry, times the size of its row where that is the unit."""
        sizes = self.sizes(site)
        if sizes is None:
            return torch.as_tensor(scale)
        return self.bank.layout(site).spread_rows(sizes) * scale

    @abstractmethod
    def law(self, site: str) -> dist.TorchDistribution:
        """Return the law of a site in the guide."""

    def model(self, kl_weight: float = 1.0) -> FlatFactors:
        prior = self.prior if self.previous is None else self.previous.law
        with tempered(kl_weight):
            return self.factors({site: pyro.sample(site, prior(site)) for site in self.sites})

    def guide(self, kl_weight: float = 1.0) -> None:
        with tempered(kl_weight):
            for site in self.sites:
                pyro.sample(site, self.law(site))

    def factors(self, sites: Sites) -> FlatFactors:
        values = [flat(sites[site]) for site in self.sites]
        if len(values) == 2:
            return FlatFactors(values[0], values[1])
        return self.bank.replaced(self.options.latent, values[0])

    def variances(self) -> FlatFactors | None:
        sites_are_factors = type(self).factors is FactorProgram.factors
        if self.stored() is not None or not sites_are_factors:
            return None
        stated = torch.cat([self.law(site).variance for site in self.sites])
        return self.bank.alone(self.options.latent, stated)

    def quantities(self, sites: Sites) -> Quantities:
        """Return ‖A‖ and ‖B‖ of each layer, (S, L), which no rotation of the ranks changes."""
        drawn = self.factors(sites)
        norms = [
            matrix.square().sum((-2, -1)).sqrt()
            for factor in self.options.latent
            for matrix in self.bank.in_use(factor, getattr(drawn, factor)).values()
        ]
        return {"factor_norm": (torch.stack(norms, dim=-1), ("block",))}

    def block_names(self) -> list[str]:
        return [block.name for block in self.bank.layout(self.options.latent).blocks]

    def loc(self, site: str) -> Tensor:
        """Return the means of the entries of a site."""
        return self.bank.latent_part(site, self.bank.means())

    def in_use(self, site: str, scale: Tensor) -> Tensor:
        """Return the scales of the entries of a site; idle ranks have the prior's, and so no KL."""
        active = self.bank.entries(site)
        if active is None:
            return scale
        return torch.where(active, scale, self.prior_scale(site))

    def normal_prior(self, site: str, scale: float | Tensor) -> dist.TorchDistribution:
        """Return N(m₀, scale²) on every entry of a site."""
        centre = self.centre(site)
        if getattr(self.options, "prior_mean", None) == "learned":
            centre = self.loc(site)
        if centre is None:
            device = self.bank.get_parameter("A_loc").device
            centre = torch.zeros((), device=device).expand(self.bank.layout(site).total)
        return dist.Normal(centre, scale).to_event(1)
