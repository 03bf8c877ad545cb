"""Deep ensemble: independent fits, as a mixture of point masses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrolora import defaults
from pyrolora.adapters import AdapterBank, FlatFactors, LayerSpec
from pyrolora.adapters.config import AdapterConfig
from pyrolora.checks import true_or_false, whole_number
from pyrolora.errors import ConfigError
from pyrolora.guides.engines import Fit
from pyrolora.guides.map import MAP
from pyrolora.guides.options import Guide
from pyrolora.guides.program import SHARED_LAW, Program, Quantities, Sites
from pyrolora.guides.supports import Supports


@dataclass(frozen=True, kw_only=True)
class Ensemble(Guide):
    """K independent fits of plain LoRA.

    Each member has its own start of A, its own order of the data and its own copy of the task head.

        member ~ Uniform{1..K},   A = A_member,  B = B_member,  head = head_member

    in model and guide alike. The mean adapter is the mean of the updates s B_k A_k (of rank K r)
    with the mean of the heads. Where the start comes from a gradient or from the weights
    (``init_lora_weights="lora-ga"``, ...) all members start from the same A and B, and differ by
    the order of the data alone. Members share the scale of a regression's noise, σ² = mean σ_k²,
    so that the predictive variance is that of the mixture.

    Parameters
    ----------
    members
        K.
    side_by_side
        Train all members at once, as K draws of one pass. It takes K times the memory for
        activations, and is faster where one member leaves the hardware idle. Members then see the
        same batches; the loss is their mean, whose scale does not matter to AdamW, and gradients
        are clipped by their common norm.

    References
    ----------
    B. Lakshminarayanan et al. (2017), "Simple and Scalable Predictive Uncertainty Estimation using
    Deep Ensembles", NeurIPS.
    """

    name = "ensemble"

    members: int = defaults.MEMBERS
    side_by_side: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("members", self.members, at_least=2)
        true_or_false("side_by_side", self.side_by_side)

    @property
    def supports(self) -> Supports:
        return Supports(stored_draws=True)

    def build(self, bank: AdapterBank) -> EnsembleProgram:
        if self.side_by_side and bank.origin is not None:
            raise ConfigError(
                "side by side, from the one start of init_lora_weights="
                f"{bank.config.init_lora_weights!r} and on the same batches, all members stay the "
                "same; leave side_by_side out, or start from 'kaiming'"
            )
        return EnsembleProgram(bank, self)

    def shapes(
        self, specs: Sequence[LayerSpec], config: AdapterConfig
    ) -> dict[str, tuple[int, ...]]:
        shapes = super(Ensemble, replace(self, members=2)).shapes(specs, config)
        many = {name: (self.members, *shapes[name][1:]) for name in ("A_locs", "B_locs")}
        return shapes | many

    def infer(self, fit: Fit) -> None:
        if self.side_by_side:
            fit.svi()
            return
        points = fit.points(MAP(), self.members)
        for number, point in enumerate(points):
            fit.program.store(number, point.program.bank.means())
            fit.joint.adopt(point, member=number)
        fit.joint.task.pool([point.task for point in points])


class EnsembleProgram(Program):
    """A program with the site ``member``."""

    options: Ensemble

    def __init__(self, bank: AdapterBank, options: Ensemble) -> None:
        super().__init__(bank, options)
        self.members = options.members
        bank.requires_grad_(False)
        means = bank.means()
        starts = [means, *(bank.start() for _ in range(self.members - 1))]
        self.declare("A_locs", torch.stack([start.A for start in starts]))
        self.declare("B_locs", torch.stack([start.B for start in starts]))

    def model(self, kl_weight: float = 1.0) -> FlatFactors:
        member = self._member()
        if self.side_by_side() > 1:  # all of them, each in its place: nothing is looked up
            return FlatFactors(
                self.param("A_locs"), self.param("B_locs"), member.long().squeeze(-1)
            )
        return self.factors({"member": member})

    def guide(self, kl_weight: float = 1.0) -> None:
        self._member()

    def factors(self, sites: Sites) -> FlatFactors:
        member = sites["member"].long()
        member = member.squeeze(-1) if member.dim() > 1 else member
        return FlatFactors(self.param("A_locs")[member], self.param("B_locs")[member], member)

    def quantities(self, sites: Sites) -> Quantities:
        return {"member": (sites["member"], ())}

    def mean(self) -> FlatFactors:
        everyone = torch.arange(self.members)
        return FlatFactors(self.param("A_locs"), self.param("B_locs"), everyone, pooled=True)

    def scale_parameters(self) -> list[str]:
        return []

    def side_by_side(self) -> int:
        return self.members if self.training and self.options.side_by_side else 1

    def stored(self) -> int | None:
        return self.members

    def pick(self, index: Tensor) -> dict[str, Tensor]:
        return {"member": index.cpu()}

    @torch.no_grad()
    def store(self, number: int, means: FlatFactors) -> None:
        """Set the factors of one member."""
        self.get_parameter("A_locs")[number] = means.A
        self.get_parameter("B_locs")[number] = means.B

    def _member(self) -> Tensor:
        """Sample the member, on the host; inside the plate of all members each is itself."""
        ones = torch.ones(self.members)
        law: dist.TorchDistribution = dist.Categorical(ones / self.members)
        if self.side_by_side() > 1:
            law = dist.Delta(ones.cumsum(0).unsqueeze(-1) - 1)
        member: Tensor = pyro.sample("member", law, infer={SHARED_LAW: True})
        return member
