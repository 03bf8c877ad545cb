"""Draws of the network linearised at the mean adapter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from pyrolora.adapters import FlatFactors, eagerly
from pyrolora.columns import Batch
from pyrolora.model import JointModel, evaluating

JACOBIAN_ENTRIES = 2**26
"""Entries of the Jacobian of one output that live at a time: 256 MiB in float32."""


def linearised(
    joint: JointModel, batch: Batch, mean: FlatFactors, draws: FlatFactors, rows: int
) -> Tensor:
    """Return f(x; θ̄) + J(x) (θ_s - θ̄) for the S draws θ_s.

    J is the Jacobian of f with respect to the factors, at θ̄.

    Under a Gaussian θ this is a Gaussian with covariance J Σ Jᵀ, without the approximation error
    of draws far from θ̄, where the curvature that gave Σ says nothing about the network.

    Every example has its own copy of the factors, so that one backward pass per output, over all
    examples together, gives a row of J for each; it is contracted with all draws at once and
    thrown away. Time: one forward pass and one backward pass per output, whatever S. Memory: about
    three times `JACOBIAN_ENTRIES`, beside the S draws.

    Parameters
    ----------
    joint
        The model; it runs in evaluation mode.
    batch
        b examples, on the model's device.
    mean
        θ̄, (total,) each. A factor that is not drawn is used at its mean.
    draws
        θ_s, (S, total); (total,) for a factor that is not drawn.
    rows
        Most examples of one pass through the network.

    Returns
    -------
    Tensor
        (S, b, ...), without gradient, for outputs (b, ...).
    """
    drawn = [name for name in ("A", "B") if getattr(draws, name).dim() > 1]
    assert drawn, "linearised needs draws (S, total) of A, of B or of both"
    parts = []
    # Clones, since tensors of inference mode can take no part in a backward pass.
    # Compiled code may free what a second backward pass reads.
    eager = eagerly(joint.base)
    with evaluating(joint), torch.inference_mode(False), torch.enable_grad(), eager:
        mean = replace(mean, A=mean.A.detach().clone(), B=mean.B.detach().clone())
        means = [getattr(mean, name) for name in drawn]
        deltas = [getattr(draws, n).detach() - m for n, m in zip(drawn, means, strict=True)]
        step = max(1, min(rows, JACOBIAN_ENTRIES // sum(m.numel() for m in means)))
        for chunk in _chunks(batch, step):
            b = len(next(iter(chunk.values())))
            copies = [m.expand(b, -1).requires_grad_() for m in means]
            per_example = replace(mean, **dict(zip(drawn, copies, strict=True)))
            output = joint.shared_out(chunk, per_example)
            parts.append(output.detach() + _directional(output, copies, deltas))
    return torch.cat(parts, dim=1)


def _directional(output: Tensor, copies: list[Tensor], deltas: list[Tensor]) -> Tensor:
    """Return J_i δ_s, (S, b, ...), for every example i with its copy of the factors."""
    columns = output.reshape(len(output), -1).unbind(-1)
    directional = []
    for column in columns:
        jacobian = torch.autograd.grad(column.sum(), copies, retain_graph=True)
        parts = [delta @ rows.T for delta, rows in zip(deltas, jacobian, strict=True)]
        directional.append(torch.stack(parts).sum(0))
    return torch.stack(directional, dim=-1).reshape(-1, *output.shape)


def _chunks(batch: Batch, step: int) -> Iterator[dict[str, Tensor]]:
    """Yield the examples in turn, at most ``step`` at a time."""
    size = len(next(iter(batch.values())))
    for start in range(0, size, step):
        yield {
            name: t[start : start + step].clone() if isinstance(t, Tensor) else t
            for name, t in batch.items()
        }
