"""The adapted layer: forward only. It owns no factor and no site; it uses what is bound."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
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
)
from pyrolora.adapters.weight_noise import WeightNoise, product_dtype
from pyrolora.errors import BindingError


@dataclass(frozen=True)
class Factors:
    """The factors of one layer for one call, ready for two matrix products.

    ``A`` is (r, in) or (S, r, in); ``sB`` is the scaled transpose s Bᵀ, (r, out) or (S, r, out).
    S draws are outermost in the batch: the input then has S * b rows.
    """

    A: Tensor
    sB: Tensor
    dropout: float = 0.0
    noise: WeightNoise | None = None

    def apply(self, layer: nn.Module, x: Tensor, training: bool) -> Tensor:
        """What ``layer``, with the adapter, gives for x (..., in)."""
        dropout = self.dropout if training else 0.0
        frozen: Frozen | None = None
        if self.noise is not None:
            frozen = self.noise.frozen(layer, x, self.A, self.sB)
        if frozen is not None:
            x = x.to(product_dtype(x))
        else:
            frozen = plain(layer, x)
        if frozen is not None:
            return adapted_linear(frozen, x, self.A, self.sB, dropout)
        return self.add_to(layer(x), F.dropout(x, dropout) if dropout else x)

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """``out + s B A x`` for x (..., in) and out (..., out), which stays as it is."""
        hidden = product(x.reshape(-1, x.shape[-1]).to(self.A.dtype), self.A.mT)
        flat = out.reshape(-1, out.shape[-1])
        if flat.dtype != hidden.dtype:
            return (flat + product(hidden, self.sB).to(flat.dtype)).view_as(out)
        return sum_with_product(flat, hidden, self.sB).view_as(out)


class SharedPassError(BindingError):
    """A layer or head saw rows that do not fall into equal blocks, draw after draw."""


@dataclass(frozen=True)
class Binding:
    """What a caller of the base puts in its layers for the time of one call.

    Attributes
    ----------
    factors, heads
        By layer and by head; several heads serve one of as many equal blocks of rows each.
    used
        The layers that were called.
    rows
        Of a pass that several draws share, its rows, draws x examples: each layer has to see a
        multiple of them. 1 for a single setting.
    """

    factors: Mapping[nn.Module, Factors]
    heads: Mapping[nn.Module, Sequence[nn.Module]] = field(default_factory=dict)
    used: set[nn.Module] = field(default_factory=set)
    rows: int = 1


_current: ContextVar[Binding | None] = ContextVar("pyrolora_binding", default=None)


def current_binding() -> Binding | None:
    """The binding of this thread and context, if any."""
    return _current.get()


@contextmanager
def bind(binding: Binding | None) -> Iterator[None]:
    """Bind factors and heads for the calls of the base inside the block."""
    token = _current.set(binding)
    try:
        yield
    finally:
        _current.reset(token)


_calls = threading.Lock()
_callers: list[bool] = []


@contextmanager
def layers_called() -> Iterator[None]:
    """Torch's fast path for attention, which reads weights of layers without calling them, off for
    the block; it is a switch of the process, and on again when no thread needs it off."""
    with _calls:
        _callers.append(torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        with _calls:
            was = any(_callers)
            _callers.pop()
            if not _callers:
                torch.backends.mha.set_fastpath_enabled(was)


def _binding_for_forward() -> Binding | None:
    """The current binding; refuses a recomputation that has lost its own.

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


class Wrapper(nn.Module):
    """A module in place of another one that the network keeps seeing.

    Attributes and the state dict are those of the wrapped module, so that wrapping changes
    neither what the network's code reads nor a key of what it saves.
    """

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._prefix = ""
        self.register_load_state_dict_post_hook(_restore_names)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Torch looks for a child's tensors below the child's name.
        self._prefix = prefix
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}base_layer.{key[len(prefix) :]}"] = state_dict.pop(key)


def _restore_names(wrapper: nn.Module, found: Any) -> None:
    """Report missing and unexpected keys under the names that the state dict has."""
    prefix = f"{wrapper._prefix}base_layer."
    for keys in (found.missing_keys, found.unexpected_keys):
        keys[:] = [
            f"{wrapper._prefix}{key[len(prefix) :]}" if key.startswith(prefix) else key
            for key in keys
        ]


class AdapterLayer(Wrapper):
    """A linear layer (``nn.Linear`` or transformers' ``Conv1D``) that computes ``W x + b``, plus
    ``s B A x`` while factors are bound to it."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = (*args, *kwargs.values())  # by name it is ``input`` in torch, ``x`` in ``Conv1D``
        binding = _binding_for_forward()
        factors = None if binding is None else binding.factors.get(self)
        if binding is None or factors is None:
            out: Tensor = self.base_layer(x)
            return out
        binding.used.add(self)
        if x.shape[:-1].numel() % binding.rows:
            raise SharedPassError(
                f"a layer saw {x.shape[:-1].numel()} rows in a pass that {binding.rows} rows, of "
                "several draws, share; let each draw have a pass of its own"
            )
        return factors.apply(self.base_layer, x, self.training)


class HeadSlot(Wrapper):
    """A task head that gives way to the copy that is bound to it, if one is; of K copies each
    serves one of K equal blocks of rows."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        binding = _binding_for_forward()
        bound = None if binding is None else binding.heads.get(self)
        if binding is None or bound is None:
            return self.base_layer(*args, **kwargs)
        dtype = next(bound[0].parameters()).dtype  # float32, whatever the network computes in
        args = tuple(_cast(arg, dtype) for arg in args)
        if len(bound) == 1:
            return bound[0](*args, **kwargs)
        rows = [_blocks(arg, len(bound), binding.rows) for arg in args]
        named = [dict.fromkeys(kwargs) for _ in bound]
        for name, arg in kwargs.items():
            for own, block in zip(named, _blocks(arg, len(bound), 1), strict=True):
                own[name] = block
        outputs = [head(*own, **more) for head, more, *own in zip(bound, named, *rows, strict=True)]
        if not all(isinstance(output, Tensor) for output in outputs):
            raise SharedPassError(f"a head gave a {type(outputs[0]).__name__}, which is no tensor")
        return torch.cat(outputs)


def _blocks(arg: Any, count: int, rows: int) -> Sequence[Any]:
    """``arg`` in ``count`` equal blocks, of ``rows`` or a multiple of them in all."""
    if not isinstance(arg, Tensor) or not arg.dim():
        return [arg] * count
    if len(arg) % count or len(arg) % rows:
        raise SharedPassError(f"a head saw {len(arg)} rows, which {count} draws cannot share")
    return arg.chunk(count)


def _cast(arg: Any, dtype: torch.dtype) -> Any:
    return arg.to(dtype) if isinstance(arg, Tensor) and arg.is_floating_point() else arg
