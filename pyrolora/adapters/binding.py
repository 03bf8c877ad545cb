"""Factors and heads that a caller hands to the layers of a network for the time of one call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrolora.adapters.adapted_linear import (
    Frozen,
    adapted_linear,
    plain,
    product,
    sum_with_product,
    traced_update,
)
from pyrolora.adapters.compiled import Shown, shown, uncompiled
from pyrolora.adapters.other_kinds import folded, is_other, looked_up, rows_of
from pyrolora.adapters.weight_noise import WeightNoise, at_once, product_dtype, readable
from pyrolora.adapters.wrapper import Wrapper
from pyrolora.errors import BindingError


@dataclass(frozen=True)
class Factors:
    """Factors of one layer for one call, ready for two matrix products.

    ``A`` is (r, in) or (S, r, in); ``sB`` is the scaled transpose s Bᵀ, (r, out) or (S, r, out).
    S draws are outermost in the batch: the input then has S * b rows.
    """

    A: Tensor
    sB: Tensor
    dropout: float = 0.0
    noise: WeightNoise | None = None

    def apply(self, layer: nn.Module, x: Tensor, training: bool) -> Tensor:
        """Return the output of ``layer`` with the adapter for x (..., in)."""
        dropout = self.dropout if training else 0.0
        if self.noise is not None and torch.compiler.is_compiling():
            out: Tensor = _noisy(self, layer, x, training)
            return out
        frozen: Frozen | None = None
        if self.noise is None and is_other(layer):
            out = layer(x)
            return out + self.update(layer, x, dropout, out)
        if self.noise is not None:
            frozen = self.noise.frozen(layer, x, self.A, self.sB)
        if frozen is not None:
            x = x.to(product_dtype(x))
        else:
            frozen = plain(layer, x)
        if frozen is not None:
            return adapted_linear(frozen, x, self.A, self.sB, dropout)
        return self.add_to(layer(x), F.dropout(x, dropout) if dropout else x)

    def update(self, layer: nn.Module, x: Tensor, dropout: float, like: Tensor) -> Tensor:
        """Return s B A x of a convolution or an embedding, in the shape and dtype of its output."""
        if isinstance(layer, nn.Embedding):
            hidden = looked_up(layer, x, self.A)
        else:
            rows = rows_of(layer, F.dropout(x, dropout) if dropout else x).to(self.A.dtype)
            hidden = product(rows.flatten(0, -2), self.A.mT).unflatten(0, rows.shape[:-1])
        update = product(hidden.flatten(0, -2), self.sB).unflatten(0, hidden.shape[:-1])
        return folded(layer, update, like).to(like.dtype)

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """Return ``out + s B A x`` for x (..., in), and leave out (..., out) as it is."""
        if torch.compiler.is_compiling():
            update = traced_update(x.to(self.A.dtype), self.A, self.sB)
            return out + update.reshape(out.shape).to(out.dtype)
        hidden = product(x.reshape(-1, x.shape[-1]).to(self.A.dtype), self.A.mT)
        flat = out.reshape(-1, out.shape[-1])
        if flat.dtype != hidden.dtype:
            return (flat + product(hidden, self.sB).to(flat.dtype)).view_as(out)
        return sum_with_product(flat, hidden, self.sB).view_as(out)


def with_noise_measured(factors: Mapping[Any, Factors]) -> dict[Any, Factors]:
    """Return the factors by layer, the size of the noise on the weights computed for all at once.

    Layers whose weight is not there yet, or is not of a kind that takes noise, leave it to their
    call; so do several draws, whose products with all weights would take the memory of the draws
    once more.
    """
    noisy = {
        layer: bound.noise
        for layer, bound in factors.items()
        if bound.noise is not None
        and bound.A.dim() == bound.sB.dim() == 2
        and isinstance(layer, Wrapper)
        and readable(layer.base_layer)
    }
    if not noisy:
        return {**factors}
    bound = [factors[layer] for layer in noisy]
    layers = [layer.base_layer for layer in noisy]
    noises = at_once([*noisy.values()], layers, [f.A for f in bound], [f.sB for f in bound])
    measured = zip(noisy, bound, noises, strict=True)
    return {**factors, **{layer: replace(f, noise=noise) for layer, f, noise in measured}}


@uncompiled
def _noisy(factors: Factors, layer: nn.Module, x: Tensor, training: bool) -> Tensor:
    """Apply factors with noise outside of compiled code, which has no generators."""
    return factors.apply(layer, x, training)


class SharedPassError(BindingError):
    """A layer or head saw rows that do not fall into equal blocks, draw after draw."""


@dataclass(frozen=True)
class Binding:
    """Factors per layer and heads per slot, for one call of the network.

    Attributes
    ----------
    factors
        Wrapped layer, or slot of a parameter, -> its factors.
    heads
        Wrapped head -> the heads that stand in for it; several of them serve a block of rows each.
    blocks
        The examples in the block of each head; None: the blocks are equal.
    used
        The layers that were called.
    rows
        In a pass that several draws share, its rows, draws x examples: each layer has to see a
        multiple of them. 1 for a single setting.
    compiled
        The network is compiled, in whole or in part, and that code has to see the binding.
    eager
        A compiled network runs without its compiled code: the factors note what they see, or the
        heads were made for this call.
    """

    factors: Mapping[Any, Factors]
    heads: Mapping[nn.Module, Sequence[nn.Module]] = field(default_factory=dict)
    blocks: Sequence[int] | None = None
    used: set[Any] = field(default_factory=set)
    rows: int = 1
    compiled: bool = False
    eager: bool = False


_current: ContextVar[Binding | None] = ContextVar("pyrolora_binding", default=None)


def current_binding() -> Binding | None:
    """Return the binding of this thread and context, if any."""
    return _current.get()


@contextmanager
def bind(binding: Binding | None) -> Iterator[None]:
    """Bind factors and heads for the calls of the network inside the block."""
    token = _current.set(binding)
    try:
        with _shown(binding) if binding is not None and binding.compiled else nullcontext():
            yield
    finally:
        _current.reset(token)


@contextmanager
def _shown(binding: Binding) -> Iterator[None]:
    """Show a binding to compiled code, and note the layers that it called."""
    layers: list[Any] = [layer for layer in binding.factors if isinstance(layer, nn.Module)]
    rows = torch.empty(binding.rows, 0, dtype=torch.float32)
    parts = {slot: Shown(rows, (heads, binding.blocks)) for slot, heads in binding.heads.items()}
    for layer in layers:
        factors = binding.factors[layer]
        several = factors.A.dim() == 3 or factors.sB.dim() == 3
        parts[layer] = Shown(rows, several=factors) if several else Shown(rows, factors)
    with shown(parts):
        try:
            yield
        finally:
            binding.used.update(layer for layer in layers if layer.called)
            for layer in layers:
                layer.called = False


def binding_for_forward() -> Binding | None:
    """Return the current binding, and refuse a recomputation that has lost its binding.

    Activation checkpointing runs the forward pass again during the backward pass, when the
    binding of the first pass has ended (on a GPU even in another thread). Without factors it would
    silently give the gradients of another function.
    """
    binding = _current.get()
    if binding is None and torch._C._current_graph_task_id() != -1:
        raise BindingError(
            "an adapted layer is recomputed by activation checkpointing outside of its binding; "
            "enable checkpointing through TrainingArguments(gradient_checkpointing=True) or "
            "posterior.model.gradient_checkpointing_enable(), not on the base network"
        )
    return binding
