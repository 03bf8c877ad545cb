"""A frozen linear layer and its adapter as one product, without a copy of the layer's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrolora.adapters.kinds import computes_plainly, oriented

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Frozen(Protocol):
    """The part of a layer that is not trained."""

    def forward(self, rows: Tensor) -> Tensor:
        """Return W x + b for rows (m, in), as a new tensor (m, out)."""

    def backward(self, grad: Tensor) -> Tensor:
        """Return Wᵀ g for rows (m, out), as a new tensor (m, in)."""


@dataclass(frozen=True)
class Plain:
    """A layer that computes W x + b with W (out, in) and b as they are stored."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.weight, self.bias)

    def backward(self, grad: Tensor) -> Tensor:
        return grad @ self.weight


def plain(layer: nn.Module, x: Tensor) -> Plain | None:
    """Return the weights of ``layer``, where calling it means nothing but W x + b in x's dtype.

    None for a quantised, parametrised, hooked or trained layer, under autocast, inside of
    ``torch.func``'s transformations or forward-mode differentiation, and in compiled code, which
    saves the copies itself.
    """
    if torch.compiler.is_compiling():
        return None
    weight, bias = layer._parameters.get("weight"), getattr(layer, "bias", None)
    if (
        not computes_plainly(layer)
        or "forward" in layer.__dict__
        or any(getattr(layer, hooks) for hooks in HOOKS)
        or torch.nn.modules.module._has_any_global_hook()
        or type(weight) is not nn.Parameter
        or weight.dtype != x.dtype
        or weight.requires_grad
        or (bias is not None and (type(bias) is not nn.Parameter or bias.requires_grad))
        or torch.is_autocast_enabled(x.device.type)
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return None
    return Plain(oriented(layer, weight), bias)


def adapted_linear(
    frozen: Frozen, x: Tensor, A: Tensor, sB: Tensor, dropout: float = 0.0
) -> Tensor:
    """Return ``W x + b + s B A x``, with dropout on the x of the adapter.

    Autograd would copy the layer's output, and the gradient of its input, to add two summands. Here
    the adapter's product is added to the frozen one in place, in both directions.

    Parameters
    ----------
    frozen
        W and b.
    x
        (..., in).
    A, sB
        (r, in) or (S, r, in), and the scaled transpose s Bᵀ, (r, out) or (S, r, out). S draws are
        outermost in x.
    dropout
        The probability that an entry of the adapter's x is zero.
    """
    rows, A, sB = x.reshape(-1, x.shape[-1]), A.to(x.dtype), sB.to(x.dtype)
    dropped = F.dropout(rows, dropout) if dropout else None
    if torch.is_grad_enabled():
        result: Tensor = _AdaptedLinear.apply(rows, dropped, A, sB, frozen)
    else:
        result = _forward(rows, dropped, A, sB, frozen)[0]
    # Viewed outside of the Function, whose views nobody may change in place.
    return result.view(*x.shape[:-1], sB.shape[-1])


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, dropped: Tensor | None, A: Tensor, sB: Tensor, frozen: Frozen
    ) -> Tensor:
        result, hidden = _forward(rows, dropped, A, sB, frozen)
        ctx.save_for_backward(rows if dropped is None else dropped, A, sB, hidden)
        ctx.frozen, ctx.same_input = frozen, dropped is None
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, sB, hidden = ctx.saved_tensors  # the adapter's x
        wanted = ctx.needs_input_grad
        grad_rows = grad_dropped = None
        # Autocast may be on here that was off in forward, and would cast some of the products.
        with torch.autocast(grad.device.type, enabled=False):
            if torch.is_grad_enabled():  # for second derivatives, which run through x and A, too
                hidden = product(x, A.mT)
            back = product(grad, sB.mT)
            if wanted[0]:
                grad_rows = ctx.frozen.backward(grad)
                if ctx.same_input:
                    add_product(grad_rows, back, A)
            if wanted[1]:
                grad_dropped = product(back, A)
            grad_A = _outer(back, x, A) if wanted[2] else None
            grad_sB = _outer(hidden, grad, sB) if wanted[3] else None
        return grad_rows, grad_dropped, grad_A, grad_sB, None


def _forward(
    rows: Tensor, dropped: Tensor | None, A: Tensor, sB: Tensor, frozen: Frozen
) -> tuple[Tensor, Tensor]:
    """Return the result, and A x."""
    hidden = product(rows if dropped is None else dropped, A.mT)
    result = frozen.forward(rows)
    add_product(result, hidden, sB)
    return result, hidden


def product(rows: Tensor, matrix: Tensor) -> Tensor:
    """Multiply rows (S * m, k) by (k, n), or draw by draw by (S, k, n), to (S * m, n)."""
    if matrix.dim() == 2:
        return rows @ matrix
    return torch.bmm(_blocks(rows, matrix), matrix).flatten(0, 1)


def traced_update(x: Tensor, A: Tensor, sB: Tensor) -> Tensor:
    """Return s B A x for x (..., in), as (..., out), or as (S, m, out) where a factor has S draws.

    Compiled code uses it in place of `product`: no size is divided and multiplied again, over which
    the compiler would reason longer with every layer.
    """
    if A.dim() == 3 or sB.dim() == 3:
        x = x.flatten(0, -2).unflatten(0, (len(A if A.dim() == 3 else sB), -1))
    return x @ A.mT @ sB


def add_product(out: Tensor, rows: Tensor, matrix: Tensor) -> None:
    """Add `product` of the two to ``out`` (S * m, n) in place."""
    if matrix.dim() == 2:
        out.addmm_(rows, matrix)
    else:
        _blocks(out, matrix).baddbmm_(_blocks(rows, matrix), matrix)


def sum_with_product(out: Tensor, rows: Tensor, matrix: Tensor) -> Tensor:
    """Return ``out`` (S * m, n) plus `product` of the two."""
    if matrix.dim() == 2:
        return torch.addmm(out, rows, matrix)
    summed = torch.baddbmm(_blocks(out, matrix), _blocks(rows, matrix), matrix)
    return summed.flatten(0, 1)


def _outer(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """Sum the rows' outer products to (k, n); draw by draw to (S, k, n), if ``like`` has S."""
    if like.dim() == 2:
        return left.mT @ right
    return torch.bmm(_blocks(left, like).mT, _blocks(right, like))


def _blocks(rows: Tensor, like: Tensor) -> Tensor:
    """View (S * m, k) as (S, m, k), where S is the first dimension of ``like``."""
    return rows.reshape(like.shape[0], len(rows) // like.shape[0], rows.shape[-1])
