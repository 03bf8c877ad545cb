"""A frozen linear layer and its adapter as one product, in memory of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

PLAIN = (nn.Linear.forward, Conv1D.forward)
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Frozen(Protocol):
    """The part of the layer that is not trained."""

    def forward(self, rows: Tensor) -> Tensor:
        """W x + b for rows (m, in), as a new tensor (m, out)."""

    def backward(self, grad: Tensor) -> Tensor:
        """Wᵀ g for rows (m, out), as a new tensor (m, in)."""


@dataclass(frozen=True)
class Plain:
    """W (out, in) and b as they are."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.weight, self.bias)

    def backward(self, grad: Tensor) -> Tensor:
        return grad @ self.weight


def plain(layer: nn.Module, x: Tensor) -> Plain | None:
    """The weights of ``layer``, where calling it means nothing but W x + b in the dtype of x; None
    of a quantised, parametrised, hooked or trained layer, under autocast, and inside of
    ``torch.func``'s transformations."""
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if (
        type(layer).forward not in PLAIN
        or "forward" in layer.__dict__
        or any(getattr(layer, hooks) for hooks in HOOKS)
        or type(weight) is not nn.Parameter
        or weight.dtype != x.dtype
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or torch.is_autocast_enabled(x.device.type)
        or torch._C._are_functorch_transforms_active()
    ):
        return None
    return Plain(weight.T if isinstance(layer, Conv1D) else weight, bias)


def adapted_linear(
    frozen: Frozen, x: Tensor, A: Tensor, sB: Tensor, dropout: float = 0.0
) -> Tensor:
    """``W x + b + s B A x``, with dropout on the x of the adapter.

    What autograd would do with the two summands takes a copy of the layer's output, and one of the
    gradient of its input. Here the adapter's product is added to the frozen one in its place, in
    both directions.

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
    given = F.dropout(x, dropout) if dropout else None
    if torch.is_grad_enabled():
        result: Tensor = _AdaptedLinear.apply(x, given, A.to(x.dtype), sB.to(x.dtype), frozen)
        return result
    return _forward(x, given, A.to(x.dtype), sB.to(x.dtype), frozen)[0]


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, given: Tensor | None, A: Tensor, sB: Tensor, frozen: Frozen
    ) -> Tensor:
        result, hidden = _forward(x, given, A, sB, frozen)
        ctx.save_for_backward(x if given is None else given, A, sB, hidden)
        ctx.frozen, ctx.alone = frozen, given is None
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given, A, sB, hidden = ctx.saved_tensors
        rows, wanted = _rows(given), ctx.needs_input_grad
        if torch.is_grad_enabled():  # for second derivatives, which run through x and A, too
            hidden = product(rows, A.mT)
        grad = _rows(grad)
        back = product(grad, sB.mT)
        grad_x = grad_given = None
        if wanted[0]:
            grad_x = ctx.frozen.backward(grad)
            if ctx.alone:
                add_product(grad_x, back, A)
            grad_x = grad_x.view(given.shape)
        if wanted[1]:
            grad_given = product(back, A).view(given.shape)
        grad_A = _outer(back, rows, A) if wanted[2] else None
        grad_sB = _outer(hidden, grad, sB) if wanted[3] else None
        return grad_x, grad_given, grad_A, grad_sB, None


def _forward(
    x: Tensor, given: Tensor | None, A: Tensor, sB: Tensor, frozen: Frozen
) -> tuple[Tensor, Tensor]:
    """The result, and A x."""
    hidden = product(_rows(x if given is None else given), A.mT)
    result = frozen.forward(_rows(x))
    add_product(result, hidden, sB)
    return result.view(*x.shape[:-1], -1), hidden


def product(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows (S * m, k) times matrix (k, n), or times (S, k, n) draw by draw, as (S * m, n)."""
    if matrix.dim() == 2:
        return rows @ matrix
    return torch.bmm(_blocks(rows, matrix), matrix).flatten(0, 1)


def add_product(out: Tensor, rows: Tensor, matrix: Tensor) -> None:
    """Add `product` of the two to ``out`` (S * m, n) in place."""
    if matrix.dim() == 2:
        out.addmm_(rows, matrix)
    else:
        _blocks(out, matrix).baddbmm_(_blocks(rows, matrix), matrix)


def _outer(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """Σ of the rows' outer products, (k, n); of each draw's own, (S, k, n), if ``like`` has S."""
    if like.dim() == 2:
        return left.mT @ right
    return torch.bmm(_blocks(left, like).mT, _blocks(right, like))


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _blocks(rows: Tensor, like: Tensor) -> Tensor:
    """(S * m, k) as (S, m, k), where S is the first dimension of ``like``."""
    return rows.view(like.shape[0], -1, rows.shape[-1])
