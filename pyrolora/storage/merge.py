"""A plain model of one draw: the adapter added to the weights, the head put in place."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyrolora.adapters import FlatFactors, is_dense, unwrap
from pyrolora.adapters.compiled import uncompile
from pyrolora.adapters.kinds import oriented
from pyrolora.adapters.parameter_layer import ParameterSlot
from pyrolora.adapters.parameters import places
from pyrolora.errors import ConfigError
from pyrolora.model import JointModel
from pyrolora.storage.dequantise import dequantised, quantised_modules


@torch.inference_mode(False)  # the model may be trained
@torch.no_grad()
def merged(joint: JointModel, factors: FlatFactors, *, dequantize: bool = False) -> nn.Module:
    """Return a copy of the base network with W + s B A in its layers and the posterior's heads.

    The sum is made in float32 and cast to the layer's dtype once. With ``dequantize`` every
    quantised linear layer becomes a plain one first (`dequantised`). A layer that shares its weight
    with another module (an output layer tied to the embeddings), or is one under several names,
    gets a weight of its own. The copy has no hub id or folder: no name loads its weights.

    Raises
    ------
    ConfigError
        When a layer's weight is quantised, parametrised, offloaded or sharded, or when the network
        cannot have output and input embeddings that differ.
    """
    if joint.sharded:
        raise ConfigError(
            "merging adds the adapter to the weights, and each process has a part of them (FSDP2); "
            "save the posterior, load it in one process with the whole network, and merge there"
        )
    bank = joint.program.bank
    matrices: Mapping[str, tuple[Tensor, Tensor]] = bank.matrices(factors)
    coded = quantised_modules(joint.base) if dequantize else []
    for name, wrapper in joint.attachment.layers.items():
        if not isinstance(wrapper, ParameterSlot) and wrapper.base_layer not in coded:
            _check_weight(name, wrapper.base_layer)
    dtype = getattr(joint.base, "dtype", torch.float32)
    network = _copy(joint.base, {id(layer): dequantised(layer, dtype) for layer in coded})
    standing = places(network, list(bank.specs))
    apart: set[tuple[str, str]] = set()
    for name, spec in bank.specs.items():
        place, (A, B) = standing[name], matrices[name]
        if (place.module, place.parameter) not in apart:
            _set_apart(network, place.module, place.parameter)
            apart.add((place.module, place.parameter))
        layer = network.get_submodule(place.module)
        whole = layer.get_parameter(place.parameter)
        weight: Tensor = whole if place.expert is None else whole[place.expert]
        update = spec.scaling * (B @ A)
        if place.stack is None:
            update = oriented(layer, update)
        elif place.stack.transposed:
            update = update.mT
        weight.copy_((weight.float() + update).to(weight.dtype))
    for name, (head,) in joint.named_heads(factors).items():
        dtype = next(network.get_submodule(name).parameters()).dtype
        network.set_submodule(name, copy.deepcopy(head).to(dtype))
    names = joint.task.class_names
    config: Any = getattr(network, "config", None)
    if names is not None and config is not None:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
    if isinstance(network, PreTrainedModel):
        _check_tied(network)
        network.config._name_or_path = network.name_or_path = ""
    return network.requires_grad_(True).eval()


def _set_apart(network: nn.Module, module: str, parameter: str) -> None:
    """Give the module under this name alone a copy of a parameter that others may share."""
    layer = copy.copy(network.get_submodule(module))
    layer._parameters = dict(layer._parameters)
    setattr(layer, parameter, nn.Parameter(layer.get_parameter(parameter).clone()))
    network.set_submodule(module, layer)


def _copy(base: nn.Module, instead: dict[int, Any]) -> nn.Module:
    """Copy the network without our wrappers, with other modules ``instead`` of those with an id."""
    try:
        network = copy.deepcopy(base, dict(instead))
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ConfigError(
            f"merging makes a copy of the network, and this {type(base).__name__} cannot be "
            f"copied, as with some quantised weights ({str(error).splitlines()[0]:.200}). Write "
            "the adapter alone, with posterior.to_peft(path), or pass dequantize=True"
        ) from error
    unwrap(network)
    uncompile(network)
    quantizer = getattr(network, "hf_quantizer", None)
    if instead and quantizer is not None:
        quantizer.remove_quantization_config(network)
    return network


def _check_weight(name: str, layer: nn.Module) -> None:
    weight = layer._parameters.get("weight")
    if weight is None or weight.is_meta or not is_dense(weight):
        state = "parametrised"
        if weight is not None:
            kind = "" if type(weight) is nn.Parameter else f"a {type(weight).__name__}, "
            state = f"{kind}{weight.dtype} on {weight.device}"
        raise ConfigError(
            f"merging adds the adapter to the weights, and that of {name!r} is no plain one in "
            f"memory: it is {state}. Write the adapter alone, with posterior.to_peft(path); of a "
            "quantised layer, pass dequantize=True; else merge on the network loaded whole"
        )


def _check_tied(network: PreTrainedModel) -> None:
    """Tie weights that were tied and are still equal.

    If some differ now, tell transformers, and give each of these weights its own tensor to save.
    """
    tied = network.get_expanded_tied_weights_keys(all_submodels=True)
    pairs = [(target, network.get_parameter(source)) for target, source in tied.items()]
    if all(_equal(network.get_parameter(target), source) for target, source in pairs):
        for target, source in pairs:
            _put(network, target, source)
        return
    if "tie_word_embeddings" in inspect.getsource(type(network).forward):
        raise ConfigError(
            f"the merged output layer differs from the embeddings, and a {type(network).__name__} "
            "whose embeddings are not tied computes something else. Write the adapter alone, with "
            "posterior.to_peft(path), or fit without the output layer and the embeddings in "
            "target_modules and modules_to_save"
        )
    for target, _ in pairs:
        _put(network, target, nn.Parameter(network.get_parameter(target).clone()))
    for part in network.modules():
        if getattr(getattr(part, "config", None), "tie_word_embeddings", False):
            part.config.tie_word_embeddings = False
    network.all_tied_weights_keys = network.get_expanded_tied_weights_keys(all_submodels=True)


def _equal(first: Tensor, second: Tensor) -> bool:
    return first is second or (first.shape == second.shape and torch.equal(first, second))


def _put(network: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(module), attribute, parameter)
