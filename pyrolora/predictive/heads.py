"""Several task heads on the features of one adapter, from a single pass."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from pyrolora.adapters import FlatFactors
from pyrolora.columns import Batch
from pyrolora.inference.head_laplace import recorded
from pyrolora.model import JointModel, evaluating


def one_adapter(joint: JointModel, batch: Batch, factors: FlatFactors) -> bool:
    """Return whether the S draws differ in the last layer of the head alone, as `of_heads` asks."""
    if factors.head is None or factors.head.dim() == 1 or factors.seeds is not None:
        return False
    if not joint.task.linearisable:  # one backward pass per output, from the head's layer on
        return False
    point = all(t.dim() == 1 or bool((t == t[:1]).all()) for t in (factors.A, factors.B))
    return point and joint.together(batch)


def of_heads(joint: JointModel, batch: Batch, factors: FlatFactors, heads: Tensor) -> Tensor:
    """Return f(x; W_s), (S, b, ...), without gradient, for heads W_s (S, P) on the same adapter.

    The output is linear in the last layer, f(x; W_s) = f(x; W̄) + <∂f/∂z, (W_s − W̄) x̃> with z the
    layer's output and x̃ its input: one pass through the network, whatever S.

    Parameters
    ----------
    joint
        The model; it runs in evaluation mode.
    batch
        b examples, on the model's device.
    factors
        One setting of the factors.
    heads
        Entries of the last layer, row by row, with the bias.
    """
    layer = joint.heads.last_module()
    one = FlatFactors(factors.A.detach().clone(), factors.B.detach().clone())
    inputs = {n: t.clone() if isinstance(t, Tensor) else t for n, t in batch.items()}
    # Clones, since tensors of inference mode can take no part in a backward pass.
    with evaluating(joint), torch.inference_mode(False), torch.enable_grad():
        with recorded(layer) as uses:
            output = joint.run(inputs, replace(joint.binding(one), eager=True))
        size = len(output)
        columns = output.reshape(size, -1).unbind(-1)
        gradients = [
            torch.autograd.grad(c.sum(), uses.outputs, retain_graph=True, materialize_grads=True)
            for c in columns
        ]
    steps = (heads - joint.heads.last_entries().flatten()).unflatten(-1, (layer.out_features, -1))
    change = output.new_zeros(len(heads), size, len(columns))
    for use, x in enumerate(uses.inputs):
        wide = F.pad(x.float(), (0, int(layer.bias is not None)), value=1.0)
        z = torch.einsum("btf,scf->sbtc", wide.reshape(size, -1, wide.shape[-1]), steps)
        for column, of_use in enumerate(gradients):
            g = of_use[use].reshape(size, *z.shape[2:])
            change[..., column] += torch.einsum("btc,sbtc->sb", g, z)
    return output.detach() + change.reshape(-1, *output.shape)
