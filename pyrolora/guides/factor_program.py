"""What programs share whose sites are the latent factors themselves."""

from __future__ import annotations

from typing import Any

import torch

from pyrolora.adapters import FlatFactors
from pyrolora.guides.base import Program, Quantities, Sites, flat


class FactorProgram(Program):
    """A program with the sites ``A`` and ``B``, those that are latent: all entries of a factor,
    flat. A factor that is not latent is its mean."""

    options: Any  # those of a guide with ``latent``

    def factors(self, sites: Sites) -> FlatFactors:
        value = torch.cat([flat(sites[factor]) for factor in self.options.latent], dim=-1)
        return self.bank.replaced(self.options.latent, value)

    def quantities(self, sites: Sites) -> Quantities:
        """‖A‖ and ‖B‖ of each layer, (S, L), which no rotation of the ranks changes."""
        norms = [
            matrix.square().sum((-2, -1)).sqrt()
            for factor in self.options.latent
            for matrix in self.bank.in_use(factor, flat(sites[factor])).values()
        ]
        return {"factor_norm": (torch.stack(norms, dim=-1), ("block",))}

    def block_names(self) -> list[str]:
        return [block.name for block in self.bank.layout(self.options.latent).blocks]
