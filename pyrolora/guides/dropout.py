"""MC dropout: each draw is a mask, and so a function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrolora import defaults
from pyrolora.adapters import AdapterBank, FlatFactors
from pyrolora.checks import share, whole_number
from pyrolora.guides.options import Guide
from pyrolora.guides.plates import flat
from pyrolora.guides.program import SHARED_LAW, Program, Quantities, Sites
from pyrolora.guides.supports import Supports

Unit = Literal["input", "rank"]


@dataclass(frozen=True, kw_only=True)
class Dropout(Guide):
    """Dropout on the adapters, kept at prediction.

        z_u ~ Bernoulli(1 − p) for every unit u of a layer,   A = M · z / (1 − p)

    in model and guide alike. A unit is an input of the adapter (a column of A, what PEFT's
    ``lora_dropout`` drops), or one of its ranks (a row). M, B and the task head are parameters
    that model and guide share, and E[A] = M. A draw is one mask: for all tokens of a text, all
    examples of a batch, and the whole of a generated text. ``AdapterConfig.lora_dropout``, which
    acts in training alone and differs between tokens, comes on top.

    Parameters
    ----------
    p
        Probability that a mask drops a unit.
    unit
        ``"input"`` or ``"rank"``.
    draws_per_batch
        G: the examples of a training batch are split into G equal groups, each with its own mask.

    References
    ----------
    Y. Gal, Z. Ghahramani (2016), "Dropout as a Bayesian Approximation: Representing Model
    Uncertainty in Deep Learning", ICML.
    """

    name = "dropout"

    p: float = defaults.DROPOUT
    unit: Unit = "input"
    draws_per_batch: int = defaults.DROPOUT_DRAWS

    def __post_init__(self) -> None:
        super().__post_init__()
        share("p", self.p, "(0, 1)")
        whole_number("draws_per_batch", self.draws_per_batch, at_least=1)

    @property
    def supports(self) -> Supports:
        return Supports(rank_allocation=True, independent_layers=True, gaussian_head=True)

    def build(self, bank: AdapterBank) -> DropoutProgram:
        return DropoutProgram(bank, self)


class DropoutProgram(Program):
    """A program with the site ``mask``: 0 or 1 for every unit, flat, in the order of the bank."""

    options: Dropout
    _unit_of_entry: Tensor
    _keep: Tensor

    def __init__(self, bank: AdapterBank, options: Dropout) -> None:
        super().__init__(bank, options)
        units, total = [], 0
        for block in bank.layouts["A"].blocks:
            rows = torch.arange(block.rank).unsqueeze(-1).expand(-1, block.columns)
            columns = torch.arange(block.columns).expand(block.rank, -1)
            units.append(total + (columns if options.unit == "input" else rows).flatten())
            total += block.columns if options.unit == "input" else block.rank
        self.register_buffer("_unit_of_entry", torch.cat(units), persistent=False)
        self.register_buffer("_keep", torch.full((total,), 1 - options.p), persistent=False)

    def model(self, kl_weight: float = 1.0) -> FlatFactors:
        return self.factors({"mask": self._mask()})

    def guide(self, kl_weight: float = 1.0) -> None:
        self._mask()

    def factors(self, sites: Sites) -> FlatFactors:
        means, mask = self.bank.means(), flat(sites["mask"])
        kept = mask[..., self._unit_of_entry] / (1 - self.options.p)
        return FlatFactors(means.A * kept, means.B)

    def quantities(self, sites: Sites) -> Quantities:
        """Return the share of units that a draw keeps."""
        return {"kept": (sites["mask"].mean(-1), ())}

    def rank_entries(self, rows: Tensor) -> dict[str, Tensor]:
        return {}  # no parameters beside the means

    def _mask(self) -> Tensor:
        law = dist.Bernoulli(self._keep).to_event(1)
        mask: Tensor = pyro.sample("mask", law, infer={SHARED_LAW: True})
        return mask
