"""A plain model from one draw: the adapter added to the weights, the head put in place."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pyrolora.adapters import FlatFactors, unwrap
from pyrolora.model import JointModel


@torch.no_grad()
def merged(joint: JointModel, factors: FlatFactors) -> nn.Module:
    """A copy of the base network with W + s B A in its adapted layers and the posterior's heads.

    The sum is made in float32 and cast to the layer's dtype once. A layer that shares its weight
    with another module (an output layer tied to the embeddings) gets a weight of its own.
    """
    bank = joint.program.bank
    matrices: Mapping[str, tuple[Tensor, Tensor]] = bank.matrices(factors)
    network = copy.deepcopy(joint.base)
    unwrap(network)
    for name, spec in bank.specs.items():
        layer = network.get_submodule(name)
        A, B = matrices[name]
        update = spec.scaling * (B @ A)
        weight = layer.get_parameter("weight")
        if isinstance(layer, Conv1D):
            update = update.T
        layer.weight = nn.Parameter((weight.float() + update).to(weight.dtype))
    _untie(network)
    for name, (head,) in joint.named_heads(factors).items():
        parent, _, child = name.rpartition(".")
        dtype = next(network.get_submodule(name).parameters()).dtype
        setattr(network.get_submodule(parent), child, copy.deepcopy(head).to(dtype))
    return network.requires_grad_(True).eval()


def _untie(network: nn.Module) -> None:
    """Tell transformers, where the merged output layer is no longer the embeddings' weight."""
    if not isinstance(network, PreTrainedModel):
        return
    output, embeddings = network.get_output_embeddings(), network.get_input_embeddings()
    if output is not None and output.weight is not embeddings.weight:
        network.config.tie_word_embeddings = False
