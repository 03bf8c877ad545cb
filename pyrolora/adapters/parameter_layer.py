"""A module that computes with adapted parameters, such as the fused experts of a mixture."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyrolora.adapters.binding import Binding, Factors, SharedPassError, binding_for_forward
from pyrolora.adapters.compiled import uncompiled
from pyrolora.adapters.parameters import Stack
from pyrolora.adapters.wrapper import Wrapper


class ParameterSlot:
    """One matrix of a module's parameter, to which factors are bound: one expert's, or the only."""

    def __init__(self, base_layer: nn.Module, stack: Stack, expert: int | None) -> None:
        self.base_layer = base_layer
        self.stack = stack
        self.expert = expert

    @property
    def weight(self) -> Tensor:
        """The matrix as the module stores it, (out, in) or (in, out)."""
        parameter = self.base_layer.get_parameter(self.stack.parameter)
        return parameter if self.expert is None else parameter[self.expert]


class ParameterLayer(Wrapper):
    """A module that computes with ``W + s B A`` in place of parameters W while factors are bound.

    Its code runs on a shallow copy of it that has these sums, so that other threads see W. They are
    made anew for each call, as by PEFT: the memory of one layer's parameters more while the layer
    runs, and until its backward pass in training.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self._matrices: dict[str, dict[int | None, ParameterSlot]] = {}

    def slot(self, stack: Stack, expert: int | None) -> ParameterSlot:
        """Return the key of one matrix in bindings; it is the same at every call."""
        slots = self._matrices.setdefault(stack.parameter, {})
        return slots.setdefault(expert, ParameterSlot(self.base_layer, stack, expert))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._apart(*args, **kwargs)
        binding = binding_for_forward()
        adapted = {} if binding is None else self._adapted(binding)
        module = _with(self.base_layer, adapted) if adapted else self.base_layer
        return module(*args, **kwargs)

    _apart = uncompiled(forward)  # the compiler does not follow copies of modules

    def _adapted(self, binding: Binding) -> dict[str, Tensor]:
        """Return the parameters that have factors, with their updates."""
        adapted = {}
        for name, slots in self._matrices.items():
            bound = {s: binding.factors[s] for s in slots.values() if s in binding.factors}
            if bound:
                binding.used.update(bound)
                adapted[name] = _adapted(self.base_layer.get_parameter(name), bound)
        return adapted


def added(weight: Tensor, stack: Stack, A: Tensor, sB: Tensor) -> Tensor:
    """Return W + s B A for A (r, in) and s Bᵀ (r, out), or E of each for a stack of E matrices."""
    A, sB = A.to(weight.dtype), sB.to(weight.dtype)
    left, right = (A.mT, sB) if stack.transposed else (sB.mT, A)
    # Autocast would make the sum one of 16 bits, and the module expects the parameter's dtype.
    with torch.autocast(weight.device.type, enabled=False):
        return (torch.addmm if weight.dim() == 2 else torch.baddbmm)(weight, left, right)


def _adapted(weight: Tensor, factors: Mapping[ParameterSlot, Factors]) -> Tensor:
    """Return a parameter with the updates of its matrices."""
    if any(_is_several(f) for f in factors.values()):
        raise SharedPassError("a parameter is another one for each draw; let each have its pass")
    slots = sorted(factors, key=lambda slot: slot.expert or 0)
    stack, bound = slots[0].stack, [factors[slot] for slot in slots]
    weight = _noisy(weight, stack, bound)
    if stack.experts is None:
        return added(weight, stack, bound[0].A, bound[0].sB)
    return added(
        weight, stack, torch.stack([f.A for f in bound]), torch.stack([f.sB for f in bound])
    )


def _is_several(factors: Factors) -> bool:
    """Return whether factors, or the noise that goes with them, are those of several draws."""
    seeds = 1 if factors.noise is None else len(factors.noise.seeds)
    return factors.A.dim() == 3 or factors.sB.dim() == 3 or seeds > 1


def _noisy(weight: Tensor, stack: Stack, factors: Sequence[Factors]) -> Tensor:
    """Return a parameter with the noise of its matrices' weights."""
    if all(f.noise is None for f in factors):
        return weight
    matrices = weight.mT if stack.transposed else weight
    matrices = matrices if stack.experts is not None else matrices[None]
    noisy = torch.stack(
        [
            matrix if f.noise is None else f.noise.added_to(matrix, f.A, f.sB)
            for matrix, f in zip(matrices, factors, strict=True)
        ]
    )
    noisy = noisy if stack.experts is not None else noisy[0]
    return noisy.mT if stack.transposed else noisy


def _with(module: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """Return a shallow copy of ``module`` with these tensors in place of its parameters."""
    copied = copy.copy(module)
    copied._parameters = {n: p for n, p in module._parameters.items() if n not in parameters}
    copied.__dict__.update(parameters)
    return copied
