"""Full fine-tuning: every weight is trained, and none is latent."""

from __future__ import annotations

from dataclasses import dataclass

from pyrolora.adapters import AdapterBank
from pyrolora.guides.map import MAP, MAPProgram
from pyrolora.guides.options import Guide
from pyrolora.guides.supports import Supports


@dataclass(frozen=True, kw_only=True)
class Full(Guide):
    """Full fine-tuning, the baseline of all adapters.

    The weights that take a gradient are trained, without adapters, prior and spread.

    The network that is passed to ``fit`` stays as it is: a copy of it is trained, which is the
    posterior's ``base``, and whose weights `Posterior.save` writes, all of them. Weights in half
    precision are trained in half precision; load the network in float32 where that is too coarse.
    The default learning rate is that of adapters, 1e-3; where all weights move, 1e-4 or less is
    usual.
    """

    name = "full"
    adapts = False

    @property
    def supports(self) -> Supports:
        return Supports()

    def build(self, bank: AdapterBank) -> MAPProgram:
        return MAPProgram(bank, MAP())
