"""Functions of the entries of large tensors, with intermediate values of one piece at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyrolora import defaults

Entrywise = Callable[..., Tensor]
"""A function of entries: it returns a tensor of the shape that its arguments share."""


def in_pieces(function: Entrywise, *tensors: Tensor) -> Tensor:
    """Return ``function(*tensors)``, computed piece by piece, and once more for the gradient.

    Autograd keeps every intermediate value of every entry; here it keeps the arguments alone. Of
    small tensors it keeps all, which starts fewer kernels. Either way numbers are the same.

    Parameters
    ----------
    function
        Of entries alone: no entry of its value depends on another of the arguments.
    tensors
        They broadcast to one shape; pieces are runs of the last dimension.
    """
    same = torch.broadcast_tensors(*tensors)
    if same[0].numel() <= defaults.ENTRIES_AT_ONCE:
        return function(*same)
    value: Tensor = _InPieces.apply(function, *same)
    return value


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Entrywise, *tensors: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        result = torch.empty(tensors[0].shape, dtype=tensors[0].dtype, device=tensors[0].device)
        for piece in _pieces(result):
            result[..., piece] = function(*(tensor[..., piece] for tensor in tensors))
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        results = [
            torch.empty(grad.shape, dtype=grad.dtype, device=grad.device) if needed else None
            for needed in wanted
        ]
        for piece in _pieces(grad):
            leaves = [
                tensor[..., piece].detach().requires_grad_(needed)
                for tensor, needed in zip(ctx.saved_tensors, wanted, strict=True)
            ]
            with torch.enable_grad():
                value = ctx.function(*leaves)
            asked = [leaf for leaf, needed in zip(leaves, wanted, strict=True) if needed]
            parts = iter(torch.autograd.grad(value, asked, grad[..., piece]))
            for result in results:
                if result is not None:
                    result[..., piece] = next(parts)
        return None, *results


def _pieces(tensor: Tensor) -> Iterator[slice]:
    width = tensor.shape[-1]
    step = max(1, defaults.ENTRIES_AT_ONCE * width // tensor.numel())
    return (slice(first, first + step) for first in range(0, width, step))
