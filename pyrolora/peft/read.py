"""Adapters that PEFT saved, read and checked against a network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyrolora.adapters import (
    AdapterConfig,
    LayerSpec,
    features,
    refuse_foreign,
    unwrapped,
    walk,
)
from pyrolora.adapters.kinds import TITLES
from pyrolora.adapters.modules import adaptable_layers
from pyrolora.adapters.names import is_saved, selects, value_of
from pyrolora.adapters.other_kinds import OTHER_TITLES, is_embedding
from pyrolora.adapters.parameters import Stack, stacks
from pyrolora.errors import CheckpointError, ConfigError, PyroLoraError, TargetError, listed
from pyrolora.files import shown
from pyrolora.peft.config import (
    CONFIG_FILE,
    PICKLE_FILE,
    PREFIX,
    WEIGHTS_FILE,
    adapter_config,
    read_options,
)
from pyrolora.peft.patterns import Patterns
from pyrolora.peft.rules import WEIGHT, is_within_saved
from pyrolora.peft.shapes import shape, tensor_name
from pyrolora.peft.stacked import keys, split
from pyrolora.storage.tensor_file import TensorFile, tensor_file


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as PEFT saved it, checked against a network.

    Attributes
    ----------
    config
        The configuration in our terms; targets and heads by their full names.
    specs
        The adapted layers in the network's order.
    matrices
        Layer -> (A (r, in), B (out, r)), float32, unscaled.
    heads
        Name of a module of ``modules_to_save`` -> its state dict.
    """

    config: AdapterConfig
    specs: list[LayerSpec]
    matrices: dict[str, tuple[Tensor, Tensor]]
    heads: dict[str, dict[str, Tensor]]


def read_adapter(path: str | Path, network: nn.Module) -> Adapter:
    """Read a LoRA adapter that PEFT (or `write_adapter`) saved for ``network``.

    Plain LoRA and rsLoRA of linear layers and of parameters (``target_parameters``), with rank and
    alpha patterns and ``modules_to_save``. The tensors say
    which layers are adapted, and with what rank; configuration and network have to agree.

    Raises
    ------
    ConfigError
        For anything but a plain LoRA of linear layers, and for a network that PEFT has wrapped.
    CheckpointError
        When the folder is no adapter or is damaged, or the adapter is one of another network.
    """
    refuse_foreign(network)
    folder = Path(path)
    try:
        options = read_options(folder)
        file = _weights(folder)
        # Shapes are checked before any value is read.
        _checked(options, _named(file, file.declared), network)
        return _checked(options, _named(file, file.read()), network)
    except (RecursionError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, PyroLoraError):
            raise
        raise CheckpointError(
            f"{folder} was edited or is incomplete ({type(error).__name__}: {error}); restore it "
            "from a copy"
        ) from error


def _weights(folder: Path) -> TensorFile:
    """Return the file of tensors, and refuse a pickle."""
    file = folder / WEIGHTS_FILE
    if not file.exists() and (folder / PICKLE_FILE).exists():
        raise CheckpointError(
            f"{folder} has {PICKLE_FILE}, a pickle, which may run code when it is read; convert "
            "it where you trust it: PeftModel.from_pretrained(model, folder).save_pretrained("
            f"new_folder, safe_serialization=True) writes {WEIGHTS_FILE}"
        )
    return tensor_file(file)


def _named(file: TensorFile, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by their names within the network."""
    for name, tensor in tensors.items():
        if not name.startswith(PREFIX):
            raise CheckpointError(
                f"{file.path} has the tensor {shown(name)}, and PEFT's begin with {PREFIX!r}; load "
                "it with the program that wrote it and save it with PEFT"
            )
        if ".lora_" in name and not tensor.is_floating_point():
            raise CheckpointError(
                f"{file.path} has the tensor {shown(name)} of {tensor.dtype}, and factors are real "
                "numbers; restore it from a copy"
            )
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def _checked(
    options: Mapping[str, Any], tensors: Mapping[str, Tensor], network: nn.Module
) -> Adapter:
    """Return the adapter, with every tensor in its place."""
    patterns = Patterns()
    saved = options.get("modules_to_save") or []
    factors, rest = _split(tensors)
    heads = {
        name: _take_head(name, unwrapped(module), rest)
        for name, module in walk(network)
        if name and is_saved(saved, name) and any(True for _ in module.parameters())
    }
    parameters = _parameters(options, network)
    stacked = {stack.name: factors.pop(key, {}) for key, stack in parameters}
    layers = _layers(factors, heads, network, bool(parameters))
    _drop_frozen(rest, network)
    _refuse_rest(rest, saved, network, patterns)
    _check_selection(options, list(layers), network, patterns)
    config = adapter_config(options, list(layers), list(stacked), list(heads))
    specs = [_spec(n, layer, factors[n], config, patterns) for n, layer in layers.items()]
    matrices = {
        s.name: (factors[s.name]["A"].float().flatten(1), factors[s.name]["B"].float().flatten(1))
        for s in specs
    }
    for _, stack in parameters:
        own = stacked[stack.name]
        spec = _spec(stack.name, stack, own, config, patterns)
        specs += [replace(spec, name=name) for name in stack.names]
        matrices |= split(stack, own["A"].float(), own["B"].float())
    return Adapter(config, specs, matrices, heads)


def _parameters(options: Mapping[str, Any], network: nn.Module) -> list[tuple[str, Stack]]:
    """Return the parameters that the adapter is one of, each after its module in PEFT's file."""
    try:
        found = [*stacks(network, options.get("target_parameters") or []).values()]
    except TargetError as error:
        raise ConfigError(
            f"the adapter has target_parameters that pyrolora cannot adapt: {error}"
        ) from error
    names = keys(found, network)
    return [(names[stack.name], stack) for stack in found]


def _split(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return layer -> its factors by their letter; and the tensors that are no factors."""
    factors: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.lora_(?:([AB])\.weight|embedding_([AB]))", key)
        if match is not None:
            factors.setdefault(match[1], {})[match[2] or match[3]] = tensor
        elif ".lora_" in key:
            raise ConfigError(
                f"the file has the tensor {key!r}, of a variant of LoRA; pyrolora takes the lora_A "
                "and lora_B of linear layers, convolutions and embeddings"
            )
        else:
            rest[key] = tensor
    return factors, rest


def _take_head(name: str, module: nn.Module, rest: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the state dict of a module of ``modules_to_save`` out of ``rest``."""
    if any(isinstance(part, nn.Embedding) for part in module.modules()):
        raise ConfigError(
            f"the adapter has modules_to_save={name!r}, which holds embeddings, and pyrolora "
            "adapts linear layers and owns task heads; train the adapter without it"
        )
    state = {}
    for key, present in module.state_dict().items():
        tensor = rest.pop(f"{name}.{key}", None)
        if tensor is None:
            raise CheckpointError(
                f"modules_to_save has {name!r}, and the file has no tensor {name}.{key!s}; it is "
                "incomplete, or the adapter of another network"
            )
        _check_shape(f"{name}.{key}", tensor, present.shape)
        if tensor.is_floating_point() is not present.is_floating_point():
            raise CheckpointError(
                f"the tensor {name}.{key} holds {tensor.dtype}, not {present.dtype}; restore it "
                "from a copy"
            )
        state[key] = tensor
    return state


def _layers(
    factors: Mapping[str, Mapping[str, Tensor]],
    heads: Iterable[str],
    network: nn.Module,
    has_parameters: bool,
) -> dict[str, nn.Module]:
    """Return the adapted layers in the network's order; none are needed beside parameters."""
    modules, layers = dict(walk(network)), adaptable_layers(network)
    for name in factors:
        if name not in modules:
            raise CheckpointError(
                f"the adapter has the layer {name!r}, which this {type(network).__name__} has "
                "not; pass the network that it was trained on"
            )
        if name not in layers:
            raise ConfigError(
                f"the adapter has the layer {name!r}, a {type(unwrapped(modules[name])).__name__}; "
                f"pyrolora adapts {TITLES}, and plain {OTHER_TITLES}"
            )
        for head in heads:
            if name == head or name.startswith(f"{head}."):
                raise ConfigError(
                    f"the adapter has modules_to_save={head!r}, and {name!r} in it is an adapted "
                    "layer; a module is one or the other: train the adapter without one of them"
                )
    if not factors and not has_parameters:
        raise CheckpointError("the file has no lora_A and lora_B: it holds no LoRA adapter")
    return {name: layer for name, layer in layers.items() if name in factors}


def _drop_frozen(rest: dict[str, Tensor], network: nn.Module) -> None:
    """Take the frozen weights of embeddings and output layers out of ``rest``: PEFT saves them too.

    It does so where ``target_modules`` names an embedding.
    """
    for name, module in walk(network):
        weight = unwrapped(module)._parameters.get("weight")
        for key in (f"{name}.base_layer.weight", f"{name}.weight"):
            if weight is None or key not in rest or not _is_of_tokens(network, module):
                continue
            tensor = rest.pop(key)
            _check_shape(key, tensor, weight.shape)
            if not tensor.is_meta and not torch.equal(tensor.to(weight), weight):
                raise ConfigError(
                    f"the file has the tensor {key!r}, and this network has another one there: it "
                    "was trained or resized, and pyrolora trains adapters and task heads; train "
                    "the adapter without it"
                )


def _is_of_tokens(network: nn.Module, module: nn.Module) -> bool:
    """Return whether a module is an embedding, or the network's output layer for tokens."""
    output = network.get_output_embeddings() if isinstance(network, PreTrainedModel) else None
    return is_embedding(unwrapped(module)) or (
        output is not None and unwrapped(module) is unwrapped(output)
    )


def _refuse_rest(
    rest: Iterable[str], saved: Iterable[str], network: nn.Module, patterns: Patterns
) -> None:
    """Refuse tensors that belong to no layer and to no head."""
    for key in rest:
        if is_within_saved(saved, key, patterns):
            raise CheckpointError(
                f"the file has the tensor {key!r} of modules_to_save, and this "
                f"{type(network).__name__} has no such module; pass the network that the adapter "
                "was trained on"
            )
        raise ConfigError(
            f"the file has the tensor {key!r}, which belongs to no adapted layer and to none of "
            "modules_to_save; train the adapter without it"
        )


def _check_selection(
    options: Mapping[str, Any], layers: list[str], network: nn.Module, patterns: Patterns
) -> None:
    """Compare the layers in the file with those that the configuration selects, where it does."""
    wanted, excluded = options["target_modules"], options.get("exclude_modules") or []
    if wanted in (None, "all-linear") or options.get("layers_to_transform") is not None:
        return
    saved, parameters = options.get("modules_to_save") or [], options.get("target_parameters") or []
    layers_of = adaptable_layers(network)
    first_names = {id(unwrapped(m)): name for name, m in reversed(layers_of.items())}
    selected = {
        name
        for name in first_names.values()
        if selects(wanted, name, patterns)
        and not selects(excluded, name, patterns)
        and not is_within_saved(saved, name, patterns)
    }
    selected |= {n for n in first_names.values() if selects(parameters, f"{n}.{WEIGHT}", patterns)}
    missing, surplus = sorted(selected - set(layers)), sorted(set(layers) - selected)
    if missing:
        raise CheckpointError(
            f"target_modules selects {listed(missing, most=3)} in this {type(network).__name__}, "
            "for which the file has no tensors; it is incomplete, or the adapter of another network"
        )
    if surplus:
        raise CheckpointError(
            f"the file has tensors for {listed(surplus, most=3)}, which target_modules does not "
            f"select; restore {CONFIG_FILE} and {WEIGHTS_FILE} from one copy"
        )


def _spec(
    name: str,
    place: nn.Module | Stack,
    factors: Mapping[str, Tensor],
    config: AdapterConfig,
    patterns: Patterns,
) -> LayerSpec:
    """Return the layer's adapter, whose matrices have the shapes that the configuration gives.

    Those of all experts of a stack are in one.
    """
    layer = nn.Identity() if isinstance(place, Stack) else unwrapped(place)
    for factor in "AB":
        if factor not in factors:
            raise CheckpointError(
                f"the file has no tensor {tensor_name(layer, name, factor)}; it is incomplete: "
                "restore it from a copy"
            )
    rank = value_of(name, config.rank_pattern, config.r, patterns)
    alpha = value_of(name, config.alpha_pattern, config.lora_alpha, patterns)
    size = place.size if isinstance(place, Stack) else features(layer)
    ranks = rank * (len(place.names) if isinstance(place, Stack) else 1)
    sizes = {"A": (ranks, size[0]), "B": (size[1], ranks)}
    for factor in "AB":
        expected = shape(layer, factor, *sizes[factor])
        _check_shape(tensor_name(layer, name, factor), factors[factor], expected)
    return LayerSpec(name, *size, rank, config.scaling(rank, alpha), is_embedding(layer))


def _check_shape(name: str, tensor: Tensor, expected: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise CheckpointError(
            f"the tensor {name!r} has shape {tuple(tensor.shape)}, and by the configuration and "
            f"this network it is {tuple(expected)}; pass the network that the adapter was "
            "trained on"
        )
