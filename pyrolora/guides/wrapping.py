"""A program around another program."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyrolora.adapters import AdapterBank, FlatFactors
from pyrolora.guides.engines import Curvature
from pyrolora.guides.options import Guide
from pyrolora.guides.program import Program, Quantities, Sites
from pyrolora.parameters import ParamModule


class WrappingProgram(Program):
    """A program around another one, whose bank and whose parameters it has."""

    def __init__(self, inner: Program) -> None:
        ParamModule.__init__(self)
        self.inner = inner
        self.members = inner.members
        self.chains = inner.chains
        self.linearised = inner.linearised
        self.layers_independent = inner.layers_independent
        self.has_prior = inner.has_prior

    @property
    def bank(self) -> AdapterBank:  # type: ignore[override]
        return self.inner.bank

    def quantities(self, sites: Sites) -> Quantities:
        return self.inner.quantities(sites)

    def mean(self) -> FlatFactors:
        return self.inner.mean()

    def block_names(self) -> list[str]:
        return self.inner.block_names()

    def scale_parameters(self) -> list[str]:
        return [f"inner.{name}" for name in self.inner.scale_parameters()]

    def param(self, name: str) -> Tensor:
        return self.inner.param(name.removeprefix("inner."))

    @property
    def settles(self) -> bool:
        return self.inner.settles

    def settle(self, curvature: Curvature, beta: float) -> None:
        self.inner.settle(curvature, beta)

    def groups(self, batch_size: int) -> int:
        return self.inner.groups(batch_size)

    def side_by_side(self) -> int:
        return self.inner.side_by_side()

    def renew(self, rows: Tensor) -> dict[str, Tensor]:
        return {f"inner.{name}": entries for name, entries in self.inner.renew(rows).items()}

    @property
    def previous(self) -> Any:
        return self.inner.previous

    def succeed(self, previous: Any) -> None:
        self.inner.succeed(previous.inner)

    def recentre(self) -> None:
        self.inner.recentre()

    def await_prior(self, options: Guide) -> None:
        self.inner.await_prior(options)

    def after_step(self, step: int, steps: int) -> None:
        self.inner.after_step(step, steps)
