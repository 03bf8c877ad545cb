"""Quantised linear layers as plain ones."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pyrolora.adapters import is_dense, is_quantised_layer
from pyrolora.adapters.kinds import features, is_linear, is_transposed

COLUMNS = 512  # of a weight, computed at once


def quantised_modules(network: nn.Module) -> list[nn.Module]:
    """Return the linear layers of a network whose weights are quantised."""
    return [module for module in network.modules() if is_linear(module) and _is_coded(module)]


@torch.no_grad()
def dequantised(layer: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """Return a plain layer with the weight that ``layer`` multiplies with.

    Column j of the weight is the layer's output for the unit vector e_j, without its bias: whatever
    the format, it is the number that the layer itself computes with, rounded to ``dtype``.
    """
    inputs, outputs = features(layer)
    bias = getattr(layer, "bias", None)
    device = next(t.device for t in (*layer.parameters(), *layer.buffers()))
    plain = nn.Linear(inputs, outputs, bias is not None, device=device, dtype=dtype)
    bare = _without_bias(layer)
    for start in range(0, inputs, COLUMNS):
        count = min(COLUMNS, inputs - start)
        units = torch.zeros(count, inputs, device=device, dtype=dtype)
        units[:, start : start + count].fill_diagonal_(1)
        plain.weight[:, start : start + count] = bare(units).T
    if bias is not None:
        plain.bias.copy_(bias)
    return plain.requires_grad_(False).train(layer.training)


def _without_bias(layer: nn.Module) -> nn.Module:
    """Return a view of the layer in training mode, in which none repacks its weight for good."""
    bare = copy.copy(layer)
    bare._parameters, bare._buffers = dict(layer._parameters), dict(layer._buffers)
    if "bias" in bare._parameters:
        bare._parameters["bias"] = None
    elif getattr(bare, "bias", None) is not None:
        object.__setattr__(bare, "bias", None)
    return bare.train()


def _is_coded(layer: nn.Module) -> bool:
    weight: Tensor | None = layer._parameters.get("weight")
    dense = weight is None or is_dense(weight) or weight.is_meta
    return not is_transposed(layer) and (is_quantised_layer(layer) or not dense)
