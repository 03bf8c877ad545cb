"""A plain model from one draw: the adapter added to the weights, the head put in place."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pyrolora.adapters import FlatFactors, is_quantised, unwrap
from pyrolora.errors import ConfigError
from pyrolora.model import JointModel


@torch.inference_mode(False)  # the model may be trained
@torch.no_grad()
def merged(joint: JointModel, factors: FlatFactors) -> nn.Module:
    """A copy of the base network with W + s B A in its adapted layers and the posterior's heads.

    The sum is made in float32 and cast to the layer's dtype once. A layer that shares its weight
    with another module (an output layer tied to the embeddings), or is one under several names,
    gets a weight of its own.

    Raises
    ------
    ConfigError
        When a layer's weight is quantised, parametrised or offloaded.
    """
    bank = joint.program.bank
    matrices: Mapping[str, tuple[Tensor, Tensor]] = bank.matrices(factors)
    for name, wrapper in joint.attachment.layers.items():
        _check_weight(name, wrapper.base_layer)
    network = copy.deepcopy(joint.base)
    unwrap(network)
    for name, spec in bank.specs.items():
        layer = copy.copy(network.get_submodule(name))
        layer._parameters = dict(layer._parameters)
        A, B = matrices[name]
        update = spec.scaling * (B @ A)
        weight = layer.get_parameter("weight")
        if isinstance(layer, Conv1D):
            update = update.T
        layer.weight = nn.Parameter((weight.float() + update).to(weight.dtype))
        network.set_submodule(name, layer)
    _untie(network)
    for name, (head,) in joint.named_heads(factors).items():
        dtype = next(network.get_submodule(name).parameters()).dtype
        network.set_submodule(name, copy.deepcopy(head).to(dtype))
    names = joint.likelihood.class_names
    config: Any = getattr(network, "config", None)
    if names is not None and config is not None:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
    return network.requires_grad_(True).eval()


def _check_weight(name: str, layer: nn.Module) -> None:
    weight = layer._parameters.get("weight")
    if weight is None or weight.is_meta or is_quantised(weight.dtype):
        found = "parametrised" if weight is None else f"{weight.dtype} on {weight.device}"
        raise ConfigError(
            f"merging adds the adapter to the weights, and that of {name!r} is no plain one in "
            f"memory: it is {found}. Write the adapter alone, with posterior.to_peft(path), or "
            "merge on the network loaded whole and not quantised"
        )


def _untie(network: nn.Module) -> None:
    """Tell transformers, where the merged output layer is no longer the embeddings' weight."""
    if not isinstance(network, PreTrainedModel):
        return
    output, embeddings = network.get_output_embeddings(), network.get_input_embeddings()
    if output is not None and output.weight is not embeddings.weight:
        network.config.tie_word_embeddings = False
