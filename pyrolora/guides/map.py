"""Maximum a posteriori: plain LoRA, as the limit of a posterior without width."""

from __future__ import annotations

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyrolora.adapters import AdapterBank, FlatFactors
from pyrolora.checks import positive
from pyrolora.errors import ConfigError
from pyrolora.guides.options import Latent, Variational, require
from pyrolora.guides.plates import flat, tempered
from pyrolora.guides.program import Program, Quantities, Sites
from pyrolora.guides.supports import Supports


@dataclass(frozen=True, kw_only=True)
class MAP(Variational):
    """A Delta guide on both factors: A = M_A, B = M_B, with q a point mass.

    Without a prior the model has the same point mass (the empirical-Bayes prior mean without
    width), the KL is zero, and the fit is LoRA as with PEFT and the Trainer. With
    ``prior_scale`` σ₀ every entry has the prior N(0, σ₀²), and the fit is MAP:
    −log p(y|A, B) + β (‖A‖² + ‖B‖²) / (2 σ₀²) + constant. (Where the adapters have a start that is
    taken off again, the prior is around it.)

    Parameters
    ----------
    prior_scale
        σ₀, or None for no prior.
    latent
        The factors under the prior: ``"A"``, ``"B"``, or ``"AB"``.

    References
    ----------
    E. J. Hu et al. (2021), "LoRA: Low-Rank Adaptation of Large Language Models".
    """

    name = "map"

    prior_scale: float | None = None
    latent: Latent = "AB"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.draws_per_batch == 1, "draws_per_batch", "1: a point", self.draws_per_batch)
        if self.prior_scale is not None:
            positive("prior_scale", self.prior_scale)
        elif (self.kl_weight, self.kl_weight_against, self.kl_warmup) != (1.0, "sum", 0.0):
            raise ConfigError(
                "kl_weight and its warm-up weigh a prior, and there is none, got prior_scale=None; "
                "give prior_scale, too"
            )
        elif self.latent != "AB":
            raise ConfigError(
                "latent says which factors have the prior, and there is none, got "
                f"latent={self.latent!r}; give prior_scale, too"
            )

    @property
    def supports(self) -> Supports:
        return Supports(
            rank_allocation=True,
            # Around a given adapter there is the head alone to infer.
            post_hoc="computed" if self.head == "gaussian" else None,
            independent_layers=True,
            distinct_prior=True,
            gaussian_head=True,
        )

    def build(self, bank: AdapterBank) -> MAPProgram:
        return MAPProgram(bank, self)


class MAPProgram(Program):
    """A program with sites ``A`` and ``B``: all entries of the factors, flat."""

    options: MAP

    def model(self, kl_weight: float = 1.0) -> FlatFactors:
        means = self.bank.means()
        with tempered(kl_weight):
            A = pyro.sample("A", self._prior("A", means.A))
            B = pyro.sample("B", self._prior("B", means.B))
        return self.factors({"A": A, "B": B})

    def guide(self, kl_weight: float = 1.0) -> None:
        means = self.bank.means()
        with tempered(kl_weight):
            pyro.sample("A", dist.Delta(means.A, event_dim=1))
            pyro.sample("B", dist.Delta(means.B, event_dim=1))

    def factors(self, sites: Sites) -> FlatFactors:
        return FlatFactors(flat(sites["A"]), flat(sites["B"]))

    def quantities(self, sites: Sites) -> Quantities:
        return {}

    def rank_entries(self, rows: Tensor) -> dict[str, Tensor]:
        return {}  # no parameters beside the means

    def _prior(self, factor: str, mean: Tensor) -> dist.TorchDistribution:
        if self.options.prior_scale is None or factor not in self.options.latent:
            return dist.Delta(mean, event_dim=1)
        scale, origin = mean.new_tensor(self.options.prior_scale), self.bank.origin
        loc = 0.0 if origin is None else self.bank.latent_part(factor, origin)
        return dist.Normal(loc, scale).expand(mean.shape).to_event(1)
