"""The gradient of the loss in the frozen weights, for adapters that start from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from pyrolora.adapters import frozen_weight
from pyrolora.columns import LABELS, Batch
from pyrolora.errors import ConfigError
from pyrolora.model import JointModel, evaluating


def weight_gradients(joint: JointModel, batch: Batch) -> dict[str, Tensor]:
    """Return the gradient of −(1/m) Σ log p(y_i | x_i) in the weight W of each adapted layer.

    It is taken at the network without adapters, with the posterior's heads; m counts the
    observations in the batch, examples or labelled tokens, as transformers' losses do.

    The network runs in evaluation mode and in its own dtype, and is left as it was: the weights'
    flags, their ``grad``, the modes. Memory: a copy of the adapted layers' weights.

    Parameters
    ----------
    joint
        The model; its factors are not read.
    batch
        Examples with labels, on the model's device.

    Returns
    -------
    dict
        Layer -> the gradient, in the shape and the dtype of the layer's weight.

    Raises
    ------
    ConfigError
        For a weight that is not plain, or that the output does not depend on.
    """
    layers = joint.attachment.layers
    weights = {name: frozen_weight(name, layer.base_layer) for name, layer in layers.items()}
    device = next(iter(weights.values())).device
    bare = replace(joint.binding(joint.program.bank.means()), factors={}, eager=True)
    with (
        evaluating(joint),
        _trained([*weights.values()]),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        output = joint.run(batch, bare)
        observations = joint.task.count(batch[LABELS])
        loss = -joint.task.log_prob(output, batch).sum() / observations
        gradients = torch.autograd.grad(loss, [*weights.values()], allow_unused=True)
    used = {}
    for name, gradient in zip(weights, gradients, strict=True):
        if gradient is None:
            raise ConfigError(
                f"the start needs a gradient, and layer {name!r} has none: the network does not "
                "use its weight for these inputs; leave it out with exclude_modules, or choose "
                "init_lora_weights='kaiming'"
            )
        used[name] = gradient
    return used


@contextmanager
def _trained(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let the weights take a gradient inside the block."""
    flags = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
