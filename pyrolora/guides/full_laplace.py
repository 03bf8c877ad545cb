"""The program of Laplace with the full curvature: draws that are made at the end of the fit."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyrolora.adapters import AdapterBank
from pyrolora.checks import SINGLE
from pyrolora.errors import NonFiniteError
from pyrolora.guides.factor_program import FactorProgram
from pyrolora.guides.program import picked

REMEDY = "choose a prior_scale and a lora_alpha nearer to 1, or scale the features"


@torch.no_grad()
def set_precision(buffer: Tensor, precision: float) -> None:
    """Set λ; raise `NonFiniteError` for one that single precision does not hold."""
    if not SINGLE[0] <= precision <= SINGLE[1]:
        raise NonFiniteError(
            f"the prior of 'laplace' cannot be used: its precision is {precision:.3g}, and single "
            f"precision goes from {SINGLE[0]:.2g} to {SINGLE[1]:.2g}; {REMEDY}"
        )
    buffer.fill_(precision)


class FullLaplaceProgram(FactorProgram):
    """A program with sites ``A`` and ``B``, those that are latent: all entries of a factor, flat.

    Buffers: λ, ``precision``; and ``deviations`` (draws, P), the draws of θ − θ̄, that are all
    there are. None until `keep`, which stands for zeros: the training needs none.
    """

    precision: Tensor
    deviations: Tensor

    def __init__(self, bank: AdapterBank, options: Any) -> None:
        super().__init__(bank, options)
        self.register_buffer("precision", torch.ones(()))
        self.confine("precision", constraints.positive)
        total = bank.layout(options.latent).total
        self.register_buffer("deviations", torch.zeros(0, total))

    def reserve(self) -> None:
        total = self.bank.layout(self.options.latent).total
        self.deviations = self.deviations.new_zeros(self.options.size, total)

    def prior(self, site: str) -> dist.TorchDistribution:
        return dist.Normal(self.prior_centre(site), self.precision.rsqrt()).to_event(1)

    @property
    def shrunk(self) -> str:
        """The latent factors whose prior is not around their learned means.

        Where B is latent and around zero, A is no part of the network without adapters: with B = 0
        any A gives that network.
        """
        latent: str = self.options.latent
        return "B" if latent == "AB" and self.bank.origin is None else latent

    def prior_centre(self, site: str) -> Tensor:
        """Return θ₀ of a site: that of the network without adapters.

        For an A that this leaves open it is the learned means.
        """
        if self.bank.origin is not None:
            return self.bank.latent_part(site, self.bank.origin)
        mean = self.loc(site)
        return torch.zeros_like(mean) if site in self.shrunk else mean

    def centre_of_all(self) -> Tensor:
        """Return θ₀, (P,)."""
        return torch.cat([self.prior_centre(site) for site in self.sites]).detach()

    def law(self, site: str) -> dist.TorchDistribution:
        """Return a point mass: the draws have no density."""
        return dist.Delta(self.loc(site), event_dim=1)

    def guide(self, kl_weight: float = 1.0) -> None:
        """Sample one of the draws, whose number is the auxiliary site ``draw``."""
        self.sample_stored()

    def rank_entries(self, rows: Tensor) -> dict[str, Tensor]:
        return {}  # draws are made after training

    def stored(self) -> int:
        size: int = self.options.size
        return size

    def pick(self, index: Tensor) -> dict[str, Tensor]:
        sizes = [self.bank.layouts[site].total for site in self.sites]
        parts = picked(self.deviations, index).split(sizes, dim=-1)
        return {s: self.loc(s) + part for s, part in zip(self.sites, parts, strict=True)}

    @torch.no_grad()
    def keep(self, deviations: Tensor, precision: float) -> None:
        """Store draws of θ − θ̄, (draws, P), and the λ that they are for."""
        assert deviations.shape == (self.options.size, self.deviations.shape[1])
        self.deviations = deviations.to(self.deviations)
        set_precision(self.precision, precision)
