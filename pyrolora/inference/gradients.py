"""The gradient of the loss in the frozen weights, for adapters that start from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pyrolora import defaults
from pyrolora.adapters import frozen_weight
from pyrolora.columns import LABELS, Batch
from pyrolora.errors import ConfigError
from pyrolora.model import JointModel, evaluating


def weight_gradients(
    joint: JointModel, batch: Batch, read: Callable[[str, Tensor], Any] | None = None
) -> dict[str, Any]:
    """Return the gradient of −(1/m) Σ log p(y_i | x_i) in the weight W of each adapted layer.

    It is taken at the network without adapters, with the posterior's heads; m counts the
    observations in the batch, examples or labelled tokens, as transformers' losses do.

    The network runs in evaluation mode and in its own dtype, and is left as it was: the weights'
    flags, their ``grad``, the modes. Memory: the gradients of as many layers as
    `defaults.GRADIENT_BYTES` allows, of which each such portion has a backward pass.

    Parameters
    ----------
    joint
        The model; its factors are not read.
    batch
        Examples with labels, on the model's device.
    read
        Returns what to keep of a layer's gradient, which is then dropped; None: the gradient.

    Returns
    -------
    dict
        Layer -> what is kept of the gradient, which has the shape and the dtype of the weight.

    Raises
    ------
    ConfigError
        For a weight that is not plain, or that the output does not depend on.
    """
    layers = joint.attachment.layers
    weights = {n: frozen_weight(n, layers[n].base_layer) for n in joint.program.bank.specs}
    kept: dict[str, Any] = {}
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
        for names in _portions(weights):
            some = [weights[name] for name in names]
            gradients = torch.autograd.grad(loss, some, retain_graph=True, allow_unused=True)
            for name, gradient in zip(names, gradients, strict=True):
                used = _used(name, gradient)
                kept[name] = used if read is None else read(name, used)
            del gradients, gradient, used
    return kept


def _portions(weights: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Yield layers whose weights take at most `defaults.GRADIENT_BYTES`; at least one."""
    portion: list[str] = []
    size = 0
    for name, weight in weights.items():
        if portion and size + weight.nbytes > defaults.GRADIENT_BYTES:
            yield portion
            portion, size = [], 0
        portion.append(name)
        size += weight.nbytes
    yield portion


def _used(name: str, gradient: Tensor | None) -> Tensor:
    """Return the gradient of a layer; raise `ConfigError` where there is none."""
    if gradient is None:
        raise ConfigError(
            f"the start needs a gradient, and layer {name!r} has none: the network does not "
            "use its weight for these inputs; leave it out with exclude_modules, or choose "
            "init_lora_weights='kaiming'"
        )
    return gradient


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
