"""Programs around another program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributions import constraints

from pyrolora.adapters import AdapterBank, FlatFactors
from pyrolora.guides.engines import Curvature
from pyrolora.guides.options import Guide
from pyrolora.guides.program import Program, Quantities, Sites
from pyrolora.guides.supports import Capability
from pyrolora.parameters import ParamModule


class WrappingProgram(Program):
    """A program around another one, whose bank and parameters it shares.

    Everything that a subclass does not define goes to the inner program; names of parameters get
    the prefix ``inner.``.
    """

    def __init__(self, inner: Program) -> None:
        ParamModule.__init__(self)
        self.inner = inner

    # Attributes ---------------------------------------------------------------------------------

    @property
    def bank(self) -> AdapterBank:  # type: ignore[override]
        return self.inner.bank

    @property
    def previous(self) -> Any:
        return self.inner.previous

    @property
    def site_supports(self) -> Mapping[str, constraints.Constraint]:  # type: ignore[override]
        return self.inner.site_supports

    @property
    def progress(self) -> float:
        return self.inner.progress

    @progress.setter
    def progress(self, progress: float) -> None:
        self.inner.progress = progress

    @property
    def draws_per_batch(self) -> int:  # type: ignore[override]
        return self.inner.draws_per_batch

    @property
    def members(self) -> int:  # type: ignore[override]
        return self.inner.members

    @property
    def chains(self) -> int:  # type: ignore[override]
        return self.inner.chains

    # What is inferred ---------------------------------------------------------------------------

    def model(self, kl_weight: float = 1.0) -> FlatFactors:
        return self.inner.model(kl_weight)

    def guide(self, kl_weight: float = 1.0) -> None:
        self.inner.guide(kl_weight)

    def factors(self, sites: Sites) -> FlatFactors:
        return self.inner.factors(sites)

    def quantities(self, sites: Sites) -> Quantities:
        return self.inner.quantities(sites)

    def mean(self) -> FlatFactors:
        return self.inner.mean()

    def variances(self) -> FlatFactors | None:
        return self.inner.variances()

    def block_names(self) -> list[str]:
        return self.inner.block_names()

    def param(self, name: str) -> Tensor:
        return self.inner.param(name.removeprefix("inner."))

    # Scales -------------------------------------------------------------------------------------

    def scale_parameters(self) -> list[str]:
        return [f"inner.{name}" for name in self.inner.scale_parameters()]

    @property
    def settles(self) -> bool:
        return self.inner.settles

    @property
    def settles_at_first(self) -> bool:
        return self.inner.settles_at_first

    def hold_scales(self) -> None:
        self.inner.hold_scales()

    def settle(self, curvature: Curvature, beta: float) -> None:
        inner = self.inner if self.settles_at_first else self._inner_for("closed_scales")
        inner.settle(curvature, beta)

    # Training -----------------------------------------------------------------------------------

    def groups(self, batch_size: int) -> int:
        return self.inner.groups(batch_size)

    def side_by_side(self) -> int:
        return self.inner.side_by_side()

    def after_step(self, step: int, steps: int) -> None:
        self.inner.after_step(step, steps)

    def reserve(self) -> None:
        self.inner.reserve()

    def rank_entries(self, rows: Tensor) -> dict[str, Tensor]:
        return self._prefixed(self._inner_for("rank_allocation").rank_entries(rows))

    def renew(self, rows: Tensor) -> dict[str, Tensor]:
        return self._prefixed(self._inner_for("rank_allocation").renew(rows))

    # Earlier fits -------------------------------------------------------------------------------

    def adopt(self, other: Program) -> None:
        self.inner.adopt(other)

    def recentre(self) -> None:
        self.inner.recentre()

    def succeed(self, previous: Program | Guide) -> None:
        inner = previous.inner if isinstance(previous, WrappingProgram) else previous
        self._inner_for("prior").succeed(inner)

    # Draws --------------------------------------------------------------------------------------

    def stored(self) -> int | None:
        return self.inner.stored()

    def pick(self, index: Tensor) -> dict[str, Tensor]:
        return self._inner_for("stored_draws").pick(index)

    def statistics(self, index: Tensor) -> dict[str, Tensor]:
        return self.inner.statistics(index)

    def _inner_for(self, capability: Capability) -> Program:
        """Return the inner program, for a capability that the outer guide states, too."""
        if not getattr(self.supports, capability):
            self._refuse(capability)
        return self.inner

    @staticmethod
    def _prefixed(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"inner.{name}": mask for name, mask in entries.items()}


def innermost(program: Program) -> Program:
    """Return the program that is around no other one."""
    while isinstance(program, WrappingProgram):
        program = program.inner
    return program
