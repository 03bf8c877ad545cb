"""Maximum a posteriori: plain LoRA, as the limit of a posterior without width."""

from __future__ import annotations

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyrolora.adapters import AdapterBank, FlatFactors
from pyrolora.errors import ConfigError, positive
from pyrolora.guides.base import Guide, Program, Quantities, Sites, tempered


@dataclass(frozen=True, kw_only=True)
class MAP(Guide):
    """A Delta guide on both factors: A = M_A, B = M_B, with q a point mass.

    Without a prior the model has the same point mass (the empirical-Bayes prior mean with no
    spread), its KL is zero, and the fit is LoRA as PEFT and the Trainer do it. With
    ``prior_scale`` σ₀ every entry has the prior N(0, σ₀²), and the fit is MAP:
    −log p(y|A, B) + β (‖A‖² + ‖B‖²) / (2 σ₀²) + constant.

    Parameters
    ----------
    prior_scale
        σ₀, or None for no prior.

    References
    ----------
    E. J. Hu et al. (2021), "LoRA: Low-Rank Adaptation of Large Language Models".
    """

    name = "map"

    prior_scale: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior_scale is not None:
            positive("prior_scale", self.prior_scale)
        elif (self.kl_weight, self.kl_weight_against, self.kl_warmup) != (1.0, "sum", 0.0):
            raise ConfigError("kl_weight and its warm-up weigh a prior; give prior_scale, too")

    def build(self, bank: AdapterBank) -> MAPProgram:
        return MAPProgram(bank, self)


class MAPProgram(Program):
    """Sites ``A`` and ``B``: all entries of the factors, flat."""

    def __init__(self, bank: AdapterBank, options: MAP) -> None:
        super().__init__(bank)
        self.options = options

    def model(self, kl_weight: float = 1.0) -> FlatFactors:
        means = self.bank.means()
        with tempered(kl_weight):
            A = pyro.sample("A", self._prior(means.A))
            B = pyro.sample("B", self._prior(means.B))
        return self.factors({"A": A, "B": B})

    def guide(self, kl_weight: float = 1.0) -> None:
        means = self.bank.means()
        with tempered(kl_weight):
            pyro.sample("A", dist.Delta(means.A, event_dim=1))
            pyro.sample("B", dist.Delta(means.B, event_dim=1))

    def factors(self, sites: Sites) -> FlatFactors:
        return FlatFactors(_flat(sites["A"]), _flat(sites["B"]))

    def quantities(self, sites: Sites) -> Quantities:
        return {}

    def _prior(self, mean: Tensor) -> dist.TorchDistribution:
        if self.options.prior_scale is None:
            return dist.Delta(mean, event_dim=1)
        scale = mean.new_tensor(self.options.prior_scale)
        return dist.Normal(0.0, scale).expand(mean.shape).to_event(1)


def _flat(value: Tensor) -> Tensor:
    return value.squeeze(-2) if value.dim() > 2 else value
