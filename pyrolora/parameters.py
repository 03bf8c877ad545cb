"""Learnable tensors that Pyro sees as parameters, and that live in their module alone."""

from __future__ import annotations

import weakref

import torch
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import constraints, transform_to
from torch.distributions.transforms import ExpTransform, Transform


def param_statement(
    name: str, unconstrained: nn.Parameter, constraint: constraints.Constraint = constraints.real
) -> Tensor:
    """State a tensor that its module owns as ``pyro.param`` does, and return its value.

    Pyro's handlers (``trace``, ``block``, ``replay``) and ``SVI`` see an ordinary parameter; the
    process-wide parameter store is neither read nor written, so that two posteriors never share
    or overwrite a parameter. (``PyroModule`` in its module-local mode does the same for
    constrained parameters, but hands plain ones to ``SVI`` without their unconstrained half.)
    """
    value: Tensor = _onto(constraint)(unconstrained)
    if not unconstrained.requires_grad:
        return value  # a frozen tensor is a constant of the program
    if value is unconstrained:  # no pickle takes a parameter with the mark below
        value = unconstrained.view_as(unconstrained)
    statement: Tensor = _stored(name, value, unconstrained, constraint=constraint, name=name)
    return statement


def _onto(constraint: constraints.Constraint) -> Transform:
    """Return torch's map onto a domain; onto positive numbers it adds 0 to 1 times exp x there."""
    if constraint is constraints.positive:
        return ExpTransform()
    transform: Transform = transform_to(constraint)
    return transform


@effectful(type="param")
def _stored(_: str, value: Tensor, unconstrained: nn.Parameter, **__: object) -> Tensor:
    """Return ``value`` with its unconstrained half where Pyro keeps it: SVI asks for it."""
    value.unconstrained = weakref.ref(unconstrained)  # type: ignore[attr-defined]
    return value


class ParamModule(nn.Module):
    """A module whose parameters are Pyro parameters: declared once, read through `param`.

    The state dict holds the unconstrained coordinates under the parameter's own name.
    """

    def __init__(self) -> None:
        super().__init__()
        self._constraints: dict[str, constraints.Constraint] = {}
        self._domains: dict[str, constraints.Constraint] = {}

    def declare(
        self, name: str, value: Tensor, constraint: constraints.Constraint = constraints.real
    ) -> None:
        """Add a parameter that starts at the constrained ``value``."""
        unconstrained = _onto(constraint).inv(value.detach()).clone()
        self._constraints[name] = constraint
        self.register_parameter(name, nn.Parameter(unconstrained))

    def confine(self, name: str, constraint: constraints.Constraint) -> None:
        """Declare which values the buffer ``name`` can hold."""
        self._domains[name] = constraint

    @torch.no_grad()
    def outside(self) -> list[str]:
        """Return the parameters and buffers of this module with values outside of their domain."""
        values = {name: self.param(name) for name in self._constraints}
        values |= dict(self.named_buffers(recurse=False))
        domains = {**self._constraints, **self._domains}
        return [
            name
            for name, value in values.items()
            if not torch.isfinite(value).all()
            or not torch.as_tensor(domains.get(name, constraints.real).check(value)).all()
        ]

    def param(self, name: str) -> Tensor:
        """Return the constrained value, as a Pyro parameter statement."""
        return param_statement(name, self.get_parameter(name), self._constraints[name])

    @torch.no_grad()
    def assign(self, name: str, value: Tensor) -> None:
        """Set the parameter to the constrained ``value``, in place."""
        self.get_parameter(name).copy_(_onto(self._constraints[name]).inv(value))
