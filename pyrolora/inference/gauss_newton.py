"""The curvature of the log-likelihood under the posterior's draws, by which scales are set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from pyrolora.columns import Batch
from pyrolora.guides import Curvature, Latent
from pyrolora.guides.wrapping import innermost
from pyrolora.inference.recording import Recording, readable, recorded
from pyrolora.model import JointModel, evaluating


@torch.no_grad()
def gauss_newton(joint: JointModel, batches: Iterable[Batch], passes: int) -> Curvature:
    """Return the generalised Gauss-Newton matrix of −log p(y|A, B), expected under the posterior.

    With one draw from the posterior per batch, it is summed over examples and scaled up to all n:

        H = n/m Σ_i Σ_v g_iv g_ivᵀ,   g_iv the gradient of <v, f(x_i; θ)> in the latent factors

    with Σ_v v vᵀ the Hessian of −log p(y_i|f) in the network's output f (``task.curvature``). A
    variational bound asks for this curvature, expected under the posterior. The result has its
    diagonal, and for each block the part that its ranks share. A gradient is one per example,
    summed over all of its positions and all uses of a layer. The network runs in evaluation mode.

    Parameters
    ----------
    joint
        The model; its heads and its task are constants here.
    batches
        m of the training examples, on the model's device.
    passes
        The most backward passes per batch: one for each v, or, where there are more, one for
        Σ_v ±v with random signs, which has the same expectation.

    References
    ----------
    K. Osawa et al. (2019), "Practical Deep Learning with Bayesian Principles" (VOGN), NeurIPS.
    """
    program = innermost(joint.program)
    latent = program.options.latent
    layout = program.bank.layout(latent)
    zeros = [
        torch.zeros(block.rank, block.columns, device=_device(joint)) for block in layout.blocks
    ]
    entries = {(b.layer, b.factor): zero for b, zero in zip(layout.blocks, zeros, strict=True)}
    ranks = {
        (b.layer, b.factor): torch.zeros(layout.rank, layout.rank, device=_device(joint))
        for b in layout.blocks
    }
    seen = 0
    with evaluating(joint), torch.enable_grad(), torch.autocast(_device(joint).type, enabled=False):
        for batch in (part for whole in batches for part in readable(joint, whole)):
            size = len(next(iter(batch.values())))
            for key, gradient in _gradients(joint, batch, latent, passes):
                r = len(entries[key])
                # With a start that is taken off, the layer has [A - A0; A0] and [B, B - B0].
                terms = gradient.unflatten(-2, (-1, r))
                gradient = terms[:, 0] if key[1] == "A" else terms.sum(1)
                entries[key] += gradient.square().sum(0)
                ranks[key][:r, :r] += torch.einsum("bik,bjk->ij", gradient, gradient)
            seen += size
    scale = joint.rows / max(seen, 1)
    flat = torch.cat([entries[b.layer, b.factor].flatten() for b in layout.blocks])
    return Curvature(
        scale * flat, scale * torch.stack([ranks[b.layer, b.factor] for b in layout.blocks])
    )


def _gradients(
    joint: JointModel, batch: Batch, latent: Latent, passes: int
) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """Yield (layer, factor) and the gradients of each example, (b, r, columns), one v at a time."""
    program = joint.program
    drawn = program.factors(program.draw(1))[0]
    drawn = replace(drawn, A=drawn.A.detach(), B=drawn.B.detach().requires_grad_())
    output, layers = recorded(joint, batch, drawn)
    updates = [update for layer in layers.values() for update in layer.updates]
    size = len(next(iter(batch.values())))
    for v in _directions(joint, output, batch, passes):
        gradients = iter(
            torch.autograd.grad(
                output, updates, grad_outputs=v, retain_graph=True, materialize_grads=True
            )
        )
        for name, layer in layers.items():
            uses = [(x, next(gradients)) for x in layer.inputs]
            for factor in latent:
                parts = [_of_use(layer, x, g, factor, size) for x, g in uses]
                if parts:
                    total = torch.stack(parts).sum(0)
                    if factor == "B":
                        total = total * program.bank.specs[name].scaling
                    yield (name, factor), total


def _of_use(layer: Recording, x: Tensor, g: Tensor, factor: str, size: int) -> Tensor:
    """Return the gradients of one use of a layer, (b, r, columns).

    x are its inputs, and g the gradients of its update.
    """
    x, g = (t.reshape(size, -1, t.shape[-1]) for t in (x, g.to(layer.A.dtype)))
    sB = layer.sB.detach()
    if factor == "A":
        return torch.einsum("btr,bti->bri", g @ sB.mT, x).float()
    return torch.einsum("btr,bto->bro", x @ layer.A.mT, g).float()


def _directions(joint: JointModel, output: Tensor, batch: Batch, passes: int) -> list[Tensor]:
    every = list(joint.task.curvature(output.detach(), batch))
    if len(every) <= passes:
        return every
    shape = (len(every), len(output), *[1] * (output.dim() - 1))
    signs = torch.randint(0, 2, shape, device=output.device) * 2 - 1
    return [(signs * torch.stack(every)).sum(0)]


def _device(joint: JointModel) -> torch.device:
    return joint.program.bank.get_parameter("A_loc").device
