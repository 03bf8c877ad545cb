"""The divergence of Dirichlet laws in few kernels, of which a training step starts many."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence


def dirichlet_divergence(a: Tensor, b: Tensor) -> Tensor:
    """Return KL(Dirichlet(a) ‖ Dirichlet(b)) for concentrations (..., N).

        KL = log Γ(Σa) - log Γ(Σb) - Σ_k log Γ(a_k) / Γ(b_k) + Σ_k (a_k - b_k) (ψ(a_k) - ψ(Σa))

    It is torch's to the bit, and so is its gradient for a constant b. Functions of a and of Σa, and
    the gradient's ψ, are computed once. Other gradients are torch's own, and those of gradients are
    autograd's through the formula.
    """
    elsewhere = torch._C._are_functorch_transforms_active()
    if elsewhere or b.requires_grad or torch.autograd.forward_ad._current_level >= 0:
        laws = (Dirichlet(concentration, validate_args=False) for concentration in (a, b))
        return kl_divergence(*laws)
    divergence: Tensor = _Divergence.apply(*torch.broadcast_tensors(a, b))
    return divergence


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        both, _, apart, slope = parts = _parts(a, b)
        ctx.save_for_backward(a, b, *parts)
        lgamma = both.lgamma() - _with_sum(b).lgamma()
        return lgamma[..., -1] - lgamma[..., :-1].sum(-1) + (apart * slope).sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        a, b, *parts = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative, which the parts of forward lack
            parts = _parts(a, b)
        both, psi, apart, slope = parts
        grad = grad.unsqueeze(-1)
        through_slope, of_psi = grad * apart, grad * psi
        bend = torch.polygamma(1, both)
        own = through_slope * bend[..., :-1] + grad * slope - of_psi[..., :-1]
        of_sum = of_psi[..., -1:] - through_slope.sum(-1, keepdim=True) * bend[..., -1:]
        return own + of_sum, None


def _parts(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (a, Σa), ψ of these, a - b, and ψ(a) - ψ(Σa)."""
    both = _with_sum(a)
    psi = both.digamma()
    return both, psi, a - b, psi[..., :-1] - psi[..., -1:]


def _with_sum(a: Tensor) -> Tensor:
    """Append the sum of the entries, (..., N + 1)."""
    return torch.cat([a, a.sum(-1, keepdim=True)], -1)
