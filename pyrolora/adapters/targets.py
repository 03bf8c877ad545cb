"""Which layers of a network get an adapter, and of what rank and scaling."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel

from pyrolora.adapters.config import EVERY_LAYER, AdapterConfig
from pyrolora.adapters.depth import in_blocks
from pyrolora.adapters.kernels import read_by_kernels
from pyrolora.adapters.kinds import features, is_linear
from pyrolora.adapters.left_out import (
    check_names,
    names_layers,
    nearest,
    refused_by_name,
    warn_of_left_out,
    warn_of_matches,
)
from pyrolora.adapters.modules import adaptable_layers, model_type, walk
from pyrolora.adapters.names import PYTHON, collapsed, ends_with, matches, value_of
from pyrolora.adapters.other_kinds import is_embedding
from pyrolora.adapters.parameters import named_parameters
from pyrolora.adapters.projections import projections
from pyrolora.adapters.wrapper import unwrapped
from pyrolora.checks import positive, whole_number
from pyrolora.errors import BindingError, ConfigError, TargetError, listed


@dataclass(frozen=True)
class LayerSpec:
    """One adapted layer: its place in the network and the shape of its adapter.

    ``lookup`` says that its input is the number of a column of A, as an embedding's is: an output
    then sums one number of A, not ``in_features``.
    """

    name: str
    in_features: int
    out_features: int
    rank: int
    scaling: float
    lookup: bool = False

    def __post_init__(self) -> None:
        for size in ("in_features", "out_features", "rank"):
            whole_number(f"{size} of layer {self.name!r}", getattr(self, size), at_least=1)
        positive(f"scaling of layer {self.name!r}", self.scaling)


def find_targets(
    network: nn.Module, config: AdapterConfig, heads: Iterable[str]
) -> list[LayerSpec]:
    """Return the layers that ``config`` selects, with their ranks and scalings.

    Each name of a list has to select a layer. A pattern may select more: whatever is no linear
    layer, or is smaller than the rank, is left out with a warning. The matrices of
    ``target_parameters`` come after the layers, each expert's with its number.

    Raises
    ------
    TargetError
        When nothing matches (the message lists what exists), or a name selects no layer.
    ConfigError
        When a rank exceeds the size of a layer that is named.
    """
    heads = list(heads)
    layers = {
        name: module
        for name, module in adaptable_layers(network).items()
        if not any(name == head or name.startswith(f"{head}.") for head in heads)
    }
    stacks, weights = named_parameters(network, config, heads)
    selected = _select(network, config, layers)
    selected += [name for name in layers if name in weights and name not in selected]
    chosen = _without_excluded(network, config, in_blocks([*selected, *stacks], config))
    names = [name for name in chosen if name not in stacks]
    stacks = {name: stack for name, stack in stacks.items() if name in chosen}
    if not chosen:
        raise TargetError(
            f"target_modules={config.target_modules!r}"
            + (f" without {config.exclude_modules!r}" if config.exclude_modules else "")
            + f" matches no linear layer of {type(network).__name__}"
            + refused_by_name(network, config)
            + f"; it has {listed(collapsed(_linear(layers)), most=None)} ('#' stands for a "
            "number). Name some of these, or use 'all-linear'"
        )
    if names_layers(config):
        check_names(network, config, selected, names, heads)
    elif config.target_modules not in EVERY_LAYER:
        warn_of_matches(network, config)
    elif selected == _every_layer(network, _linear(layers)):
        warn_of_left_out(network, names, list(stacks), heads, config)
    _warn_of_idle_keys(config, chosen)
    specs = [
        _spec(name, features(layers[name]), config, is_embedding(unwrapped(layers[name])))
        for name in _wide_enough(names, layers, config)
    ]
    for stack in stacks.values():
        spec = _spec(stack.name, stack.size, config)
        specs += [replace(spec, name=name) for name in stack.names]
    return specs


def check_uncalled(config: AdapterConfig, uncalled: Sequence[str], adapted: Sequence[str]) -> None:
    """Warn of adapted layers that the network does not call, and that are left out.

    Raises
    ------
    BindingError
        When no layer is left, or none for a name of the list in ``target_modules``.
    """
    called = [name for name in adapted if name not in uncalled]
    why = (
        "its code reads their weights directly, or does not use them for such inputs; leave them "
        "out with exclude_modules"
    )
    entries = config.target_modules if names_layers(config) else []
    assert entries is not None
    idle = [entry for entry in entries if not any(ends_with(name, [entry]) for name in called)]
    if idle or not called:
        what = f"of {listed(idle)} in target_modules" if idle else listed(uncalled)
        raise BindingError(f"the network calls no layer {what}: {why}, or from the list")
    warnings.warn(
        f"{len(uncalled)} of {len(adapted)} selected layers have no adapter, as the network does "
        f"not call them: {listed(collapsed(uncalled))} ('#' stands for a number); {why}",
        UserWarning,
        stacklevel=2,
    )


def _linear(layers: Mapping[str, nn.Module]) -> list[str]:
    """Return the linear layers: rules take these alone, and names others, too."""
    return [name for name, layer in layers.items() if is_linear(unwrapped(layer))]


def _select(
    network: nn.Module, config: AdapterConfig, layers: Mapping[str, nn.Module]
) -> list[str]:
    """Return those of ``layers`` that ``target_modules`` selects."""
    wanted, names = config.target_modules, _linear(layers)
    if wanted == "auto" and model_type(network) is not None:
        projecting = projections(network)
        if projecting:
            return _all_linear(network, projecting, names)
        if isinstance(network, PreTrainedModel):
            raise TargetError(
                "target_modules='auto' adapts linear layers that project to the queries, keys and "
                f"values of attention, and the architecture {model_type(network)!r} has none that "
                f"are modules; its linear layers are {listed(collapsed(names), most=None)}. Name "
                "some of these, or use 'all-linear'"
            )
    if wanted in EVERY_LAYER:
        return _every_layer(network, names)
    assert wanted is not None
    return [name for name in layers if matches(name, wanted)]


def _every_layer(network: nn.Module, names: list[str]) -> list[str]:
    """Return all but the output layer for tokens, as PEFT does, and what kernels read."""
    read = read_by_kernels(network)
    output = network.get_output_embeddings() if isinstance(network, PreTrainedModel) else None
    output = None if output is None else unwrapped(output)
    return [
        name
        for name in names
        if unwrapped(network.get_submodule(name)) is not output and name not in read
    ]


def _all_linear(network: nn.Module, projecting: list[str], names: list[str]) -> list[str]:
    """Return the projections, each of which has to be a linear layer."""
    others = {
        name: type(unwrapped(network.get_submodule(name))).__name__
        for name in projecting
        if name not in names
    }
    if others:
        classes = listed([*dict.fromkeys(others.values())], most=None)
        raise TargetError(
            "target_modules='auto' adapts the projections of attention, and "
            f"{listed([*others])} cannot be adapted: {classes} is no linear layer that pyrolora "
            "knows; name the layers to adapt in target_modules, or load the network without that "
            "quantisation"
        )
    return projecting


def _without_excluded(network: nn.Module, config: AdapterConfig, names: Sequence[str]) -> list[str]:
    """Return the names that are not excluded.

    Each entry of ``exclude_modules`` has to exclude something, or be a layer that is not selected
    anyway.
    """
    excluded = config.exclude_modules
    if excluded is None:
        return [*names]
    modules = {name: unwrapped(module) for name, module in walk(network) if name}
    for entry in [excluded] if isinstance(excluded, str) else excluded:
        wanted = entry if isinstance(excluded, str) else [entry]
        matching = [name for name in modules if matches(name, wanted)]
        matching += [name for name in names if name not in modules and matches(name, wanted)]
        if not matching:
            raise TargetError(
                f"exclude_modules names {entry!r}, and {type(network).__name__} has no such module"
                f"{nearest(entry, modules)}"
            )
        inside = [n for n in names if any(n.startswith(f"{outer}.") for outer in matching)]
        if inside and not any(n in matching for n in names):
            raise TargetError(
                f"exclude_modules names {entry!r}, a {type(modules[matching[0]]).__name__} with "
                f"layers inside ({listed(collapsed(inside))}), and would exclude none of them, as "
                f"in PEFT; name the layers, or write a regular expression: '.*{re.escape(entry)}.*'"
            )
    return [name for name in names if not matches(name, excluded)]


def _warn_of_idle_keys(config: AdapterConfig, names: Sequence[str]) -> None:
    """Warn of keys of ``rank_pattern`` and ``alpha_pattern`` that match no adapted layer."""
    for option in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, option):
            if not any(PYTHON.end(key, name) for name in names):
                warnings.warn(
                    f"{option} has the key {key!r}, which matches no adapted layer",
                    RuntimeWarning,
                    stacklevel=3,
                )


def _wide_enough(
    names: Sequence[str], layers: Mapping[str, nn.Module], config: AdapterConfig
) -> list[str]:
    """Return the layers whose size allows their rank.

    Layers that are named are returned whatever their size; `_spec` then says which is too small.
    """
    small = {
        name: rank
        for name in names
        if (rank := value_of(name, config.rank_pattern, config.r)) > min(features(layers[name]))
    }
    asked = [n for n in small if any(PYTHON.end(key, n) for key in config.rank_pattern)]
    if names_layers(config) or asked or len(small) == len(names):
        return [*names]
    if small:
        first = next(iter(small))
        sizes = features(layers[first])
        warnings.warn(
            f"{len(small)} of {len(names)} selected layers have no adapter, as they are smaller "
            f"than its rank: {listed(collapsed(small))} ('#' stands for a number; {first!r} is "
            f"{sizes[0]} to {sizes[1]}); give them a rank of their own with rank_pattern",
            UserWarning,
            stacklevel=2,
        )
    return [name for name in names if name not in small]


def _spec(
    name: str, size: tuple[int, int], config: AdapterConfig, lookup: bool = False
) -> LayerSpec:
    in_features, out_features = size
    rank = value_of(name, config.rank_pattern, config.r)
    alpha = value_of(name, config.alpha_pattern, config.lora_alpha)
    if rank > min(in_features, out_features):
        raise ConfigError(
            f"rank {rank} is above the size of layer {name!r} (in {in_features}, out "
            f"{out_features}); choose r <= {min(in_features, out_features)}, or give this layer "
            "its own rank with rank_pattern"
        )
    return LayerSpec(name, in_features, out_features, rank, config.scaling(rank, alpha), lookup)
