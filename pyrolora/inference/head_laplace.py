"""Laplace's approximation over the last layer of the task head, given draws of the adapters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrolora import defaults
from pyrolora.columns import PLACES, Batch
from pyrolora.data import Prepared, to_device
from pyrolora.errors import ConfigError
from pyrolora.guides import GaussianHead, full_name
from pyrolora.guides.dense import check_width
from pyrolora.inference.curvature import Kronecker
from pyrolora.inference.evidence import best_precision
from pyrolora.inference.recording import read, readable, sizes_of
from pyrolora.model import JointModel, evaluating
from pyrolora.seeding import seeded

ROUNDING = 1e-3
"""The largest second difference of a linear function, relative to its first, in float32."""


@torch.no_grad()
def settle_head(joint: JointModel, batches: Iterable[Batch], beta: float) -> float:
    """Set the law of the head's last layer, and return its λ.

        W ~ N(W̄, (H / β + λ I)⁻¹)

    with λ the maximiser of the evidence of H / β and W̄ (`best_precision`).

    Parameters
    ----------
    joint
        The model, after `JointModel.widen_head`.
    batches
        All training examples once, on the model's device.
    beta
        β, the weight of the KL.

    References
    ----------
    A. Kristiadi et al. (2020), "Being Bayesian, Even Just a Bit, Fixes Overconfidence in ReLU
    Networks", ICML. E. Daxberger et al. (2021), "Laplace Redux", NeurIPS.
    """
    program = joint.program
    assert isinstance(program, GaussianHead)
    mean = joint.heads.last_entries()
    eigen = head_curvature(joint, batches, whole=program.law.whole).eigen()
    values = eigen.values / beta
    precision = best_precision([values], [mean])
    program.law.set(mean, (eigen.U, eigen.V, values), precision)
    return precision


@torch.no_grad()
def head_curvature(joint: JointModel, batches: Iterable[Batch], *, whole: bool) -> Kronecker:
    """Return the generalised Gauss-Newton matrix of −log p(y|W) in W (C, F), bias included.

        H = E Σ_i Σ_v vec(G_iv) vec(G_iv)ᵀ,    G_iv = Σ_t g_ivt x_itᵀ

    with x_it the layer's input at position t of example i, g_ivt the gradient of <v, f(x_i)> in its
    output there, and Σ_v v vᵀ the Hessian of −log p(y_i|f) (``task.curvature``). The expectation is
    over the draws of the adapters, one per batch; linearised predictions have the mean's. It is
    scaled up where the batches are a part of the examples.

    Parameters
    ----------
    joint
        The model, after `JointModel.widen_head`.
    batches
        The training examples, on the model's device.
    whole
        Return H itself, as a Kronecker product with (1, 1); else that of KFAC-expand,
        (Σ_ivt g gᵀ) ⊗ (mean of x xᵀ), both over the positions that are read (`recording.read`). A
        causal network's score layer runs over all tokens, and the last one's output alone is read.
    """
    assert isinstance(joint.program, GaussianHead)
    layer, inner = joint.heads.last_module(), joint.program.inner
    sums = _Sums.of(layer, whole)
    seen = 0
    with evaluating(joint), torch.autocast(layer.weight.device.type, enabled=False):
        for batch in (part for every in batches for part in readable(joint, every)):
            drawn = inner.mean() if joint.linearises else inner.factors(inner.draw(1))[0]
            drawn = replace(drawn, A=drawn.A.detach(), B=drawn.B.detach())
            with torch.enable_grad(), recorded(layer) as uses:
                output = joint.run(batch, replace(joint.binding(drawn), eager=True))
            examples = len(next(iter(batch.values())))
            sizes = [y.new_zeros(y.shape[:-1]) for y in uses.outputs]
            for v in joint.task.curvature(output.detach(), batch):
                gradients = torch.autograd.grad(
                    output, uses.outputs, v, retain_graph=True, materialize_grads=True
                )
                sums.add_gradients(uses.inputs, gradients, examples)
                sizes = [
                    torch.maximum(size, sizes_of(g))
                    for size, g in zip(sizes, gradients, strict=True)
                ]
            places = [read(size, examples) for size in sizes]
            sums.add_inputs([x[r] for x, r in zip(uses.inputs, places, strict=True)])
            seen += examples
    return sums.curvature(joint.rows / max(seen, 1))


def check_last_layer(joint: JointModel, data: Prepared) -> None:
    """Raise `ConfigError` unless the network's output is linear in the last layer of its head."""
    guide = full_name(joint.program.options)
    if joint.heads.last_layer() is None:
        raise ConfigError(
            f"head='gaussian' of {guide!r} is a law of the last linear layer of the task head, and "
            f"this {type(joint.base).__name__} has no task head with one (an output layer for "
            "tokens is none); leave head out, or name the layer in "
            "AdapterConfig(modules_to_save=[...])"
        )
    if joint.heads.last_entries().numel() > defaults.HEAD_ENTRIES:
        layer = joint.heads.last_module()
        check_width(
            f"head='gaussian' of {guide!r}",
            ".".join(filter(None, joint.heads.last_layer() or ())),
            max(layer.in_features, layer.out_features),
            "leave head out",
        )
    examples = [data.examples[i] for i in range(min(2, len(data)))]
    batch = to_device(data.collate(examples), next(joint.parameters()).device)
    batch.pop(PLACES, None)
    if not _is_linear(joint, batch):
        raise ConfigError(
            f"head='gaussian' of {guide!r} is a law of the last layer, in which the output has to "
            f"be linear, and in {'.'.join(filter(None, joint.heads.last_layer() or ()))!r} of this "
            f"{type(joint.base).__name__}, the last linear one to be defined, it is not; leave "
            "head out, or name the last layer alone in AdapterConfig(modules_to_save=[...])"
        )


@torch.no_grad()
def _is_linear(joint: JointModel, batch: Batch) -> bool:
    """Return whether two equal steps of the last layer change the output by the same, not by 0."""
    with evaluating(joint), seeded(0):
        mean = joint.heads.last_entries()
        step = torch.randn(mean.shape).to(mean) * mean.shape[-1] ** -0.5
        middle = joint.program.mean()
        low, mid, high = (
            joint.run(batch, joint.binding(replace(middle, head=(mean + k * step).flatten())))
            for k in (-1, 0, 1)
        )
    there = low.isfinite() & mid.isfinite() & high.isfinite()
    change, bend = (high - low)[there], (high - 2 * mid + low)[there]
    size = float(change.abs().amax()) if len(change) else 0.0
    level = float(mid[there].abs().amax()) if len(change) else 0.0
    return size > 0 and float(bend.abs().amax()) < ROUNDING * (size + level)


@dataclass(frozen=True)
class Uses:
    """The inputs of each use of a layer, and its outputs, at which the graph begins."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


@contextmanager
def recorded(layer: nn.Linear) -> Iterator[Uses]:
    """Record each use of a layer in the block, with a graph that begins at its outputs."""
    uses = Uses()

    def note(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        uses.inputs.append(args[0].detach())
        uses.outputs.append(output.detach().requires_grad_())
        return uses.outputs[-1]

    handle = layer.register_forward_hook(note)
    try:
        yield uses
    finally:
        handle.remove()


@dataclass
class _Sums:
    """Sums over examples, in double: of vec(G) vec(G)ᵀ, or of g gᵀ and, over positions, x xᵀ."""

    bias: bool
    outer: Tensor
    inputs: Tensor | None
    positions: int = 0

    @classmethod
    def of(cls, layer: nn.Linear, whole: bool) -> _Sums:
        bias = layer.bias is not None
        side, size = layer.out_features, layer.in_features + bias
        zeros = layer.weight.new_zeros(1, dtype=torch.double)
        if whole:
            return cls(bias, zeros.new_zeros(side * size, side * size), None)
        return cls(bias, zeros.new_zeros(side, side), zeros.new_zeros(size, size))

    def add_gradients(self, inputs: list[Tensor], gradients: Iterable[Tensor], size: int) -> None:
        uses = [
            (self._extended(x).reshape(size, -1, x.shape[-1] + self.bias), g.double())
            for x, g in zip(inputs, gradients, strict=True)
        ]
        if self.inputs is None:
            parts = [
                torch.einsum("btc,btf->bcf", g.reshape(size, -1, g.shape[-1]), x) for x, g in uses
            ]
            rows = torch.stack(parts).sum(0).flatten(1)
        else:
            rows = torch.cat([g.reshape(-1, g.shape[-1]) for _, g in uses])
        self.outer.addmm_(rows.mT, rows)

    def add_inputs(self, inputs: Iterable[Tensor]) -> None:
        if self.inputs is None:
            return
        for x in map(self._extended, inputs):
            self.inputs.addmm_(x.mT, x)
            self.positions += len(x)

    def curvature(self, scale: float) -> Kronecker:
        """Return H, times ``scale``."""
        if self.inputs is None:
            return Kronecker(self.outer.new_ones(1, 1), scale * self.outer)
        return Kronecker(scale * self.outer, self.inputs / max(self.positions, 1))

    def _extended(self, x: Tensor) -> Tensor:
        """Return x with a column of ones, where the layer has a bias."""
        return F.pad(x.double(), (0, int(self.bias)), value=1.0)
