"""A guide from outside of the package: mean field, written anew under another name."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from problems import mlp
from torch import Tensor
from torch.distributions import constraints

import pyrolora
from pyrolora.adapters import AdapterBank
from pyrolora.guides import FactorProgram, GaussianGuide, Supports, register


@dataclass(frozen=True, kw_only=True)
class Copied(GaussianGuide):
    """An independent Gaussian for every entry of the factors."""

    name = "copied"

    @property
    def supports(self) -> Supports:
        return Supports(
            rank_allocation=True,
            prior=True,
            post_hoc="trained",
            independent_layers=True,
            distinct_prior=True,
        )

    def build(self, bank: AdapterBank) -> CopiedProgram:
        return CopiedProgram(bank, self)


class CopiedProgram(FactorProgram):
    """Sites ``A`` and ``B``, those that are latent."""

    def __init__(self, bank: AdapterBank, options: Copied) -> None:
        super().__init__(bank, options)
        for factor in options.latent:
            start = options.init_scale * self.units(factor)
            self.declare(f"{factor}_scale", start, constraints.positive)

    def rank_entries(self, rows: Tensor) -> dict[str, Tensor]:
        return {f"{site}_scale": self.bank.spread(site, rows) for site in self.sites}

    def law(self, site: str) -> dist.TorchDistribution:
        scale = self.in_use(site, self.in_rows(site, self.param(f"{site}_scale")))
        return dist.Normal(self.loc(site), scale).to_event(1)


def tell(folder: str, file: str) -> None:
    """Load the folder and write its predictions, or print why that is refused."""
    try:
        loaded = pyrolora.load(folder, mlp())
    except pyrolora.PyroLoraError as error:
        print(error)
    else:
        torch.save(loaded.predict((torch.eye(4),), 3, seed=0).draws, file)


if __name__ == "__main__":  # a process that loads, and registers in between: FOLDER FILE ...
    pairs = [*zip(sys.argv[1::2], sys.argv[2::2], strict=True)]
    for _ in range(2):
        for folder, file in pairs:
            tell(folder, file)
        print("registered")
        register(Copied)
