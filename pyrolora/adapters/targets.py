"""Which modules of a network get an adapter, and which are its task head."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from pyrolora.adapters.config import EVERY_LAYER, AdapterConfig
from pyrolora.adapters.depth import in_blocks
from pyrolora.adapters.left_out import (
    check_names,
    names_layers,
    nearest,
    warn_of_left_out,
    warn_of_matches,
)
from pyrolora.adapters.modules import (
    ends_with,
    features,
    linear_layers,
    listing,
    matches,
    patterns,
    read_by_kernels,
    unwrapped,
    walk,
)
from pyrolora.adapters.projections import model_type, projections
from pyrolora.checks import positive, whole_number
from pyrolora.errors import BindingError, ConfigError, TargetError, listed

N = TypeVar("N", int, float)


@dataclass(frozen=True)
class LayerSpec:
    """One adapted layer: its place in the network and the shape of its adapter."""

    name: str
    in_features: int
    out_features: int
    rank: int
    scaling: float

    def __post_init__(self) -> None:
        for size in ("in_features", "out_features", "rank"):
            whole_number(f"{size} of layer {self.name!r}", getattr(self, size), at_least=1)
        positive(f"scaling of layer {self.name!r}", self.scaling)


def find_heads(network: nn.Module, config: AdapterConfig) -> list[str]:
    """Names of the modules that the posterior owns a copy of.

    By default what a transformers model has beside its backbone: ``classifier``, ``score``,
    ``pre_classifier``. The backbone is the largest of its children, the one that the class names
    so, and every child that is a transformers model or holds embeddings; a network with an output
    layer for tokens has no task head, nor has one that writes text.
    """
    if config.modules_to_save is not None:
        return _saved(network, config.modules_to_save)
    if not isinstance(network, PreTrainedModel):
        return []
    if network.get_output_embeddings() is not None or network.can_generate():
        return []
    sizes = {
        name: sum(p.numel() for p in child.parameters())
        for name, child in network.named_children()
        if any(True for _ in child.parameters())
    }
    backbone = {network.base_model_prefix, max(sizes, key=lambda name: sizes[name], default="")}
    inner = (PreTrainedModel, nn.Embedding)
    return [
        name
        for name in sizes
        if name not in backbone
        and not any(isinstance(unwrapped(m), inner) for _, m in walk(network.get_submodule(name)))
    ]


def _saved(network: nn.Module, wanted: Sequence[str]) -> list[str]:
    """The modules that ``modules_to_save`` names, each without those inside of it."""
    modules = {name: module for name, module in walk(network) if name}
    found = [name for name in modules if ends_with(name, wanted)]
    for own in wanted:
        named = [name for name in found if ends_with(name, [own])]
        if not named:
            raise TargetError(
                f"modules_to_save names {own!r}, but the network has no such module"
                f"{nearest(own, modules)}; its children are "
                f"{listing(name for name, _ in network.named_children())}"
            )
        if not any(True for name in named for _ in modules[name].parameters()):
            raise TargetError(
                f"modules_to_save names {own!r}, a {type(unwrapped(modules[named[0]])).__name__}, "
                "which has no parameters to train; leave it out"
            )
    return [n for n in found if not any(n.startswith(f"{other}.") for other in found)]


def find_targets(
    network: nn.Module, config: AdapterConfig, heads: Iterable[str]
) -> list[LayerSpec]:
    """The layers that ``config`` selects, with their ranks and scalings.

    A name of a list has to select a layer. Of what a pattern selects, what is no linear layer, or
    is smaller than the rank, is left out with a warning.

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
        for name, module in linear_layers(network).items()
        if not any(name == head or name.startswith(f"{head}.") for head in heads)
    }
    selected = _select(network, config, list(layers))
    names = _without_excluded(network, config, in_blocks(selected, config))
    if not names:
        raise TargetError(
            f"target_modules={config.target_modules!r}"
            + (f" without {config.exclude_modules!r}" if config.exclude_modules else "")
            + f" matches no linear layer of {type(network).__name__}; "
            f"it has {listing(patterns(layers))} ('#' stands for a number). Name some of these, "
            "or use 'all-linear'"
        )
    if names_layers(config):
        check_names(network, config, selected, names, heads)
    elif config.target_modules not in EVERY_LAYER:
        warn_of_matches(network, config, names)
    elif selected == _every_layer(network, list(layers)):
        warn_of_left_out(network, names, heads, config)
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, option):
            if not any(_pattern_matches(pattern, name) for name in names):
                warnings.warn(
                    f"{option} has the key {pattern!r}, which matches no adapted layer",
                    RuntimeWarning,
                    stacklevel=2,
                )
    return [_spec(name, layers[name], config) for name in _wide_enough(names, layers, config)]


def check_uncalled(config: AdapterConfig, uncalled: Sequence[str], adapted: Sequence[str]) -> None:
    """Warn of adapted layers that the network does not call, and that are left out; raise
    `TargetError` where no layer is left, or none of a name that was listed."""
    called = [name for name in adapted if name not in uncalled]
    why = (
        "its code reads their weights directly, or does not use them for such inputs; leave them "
        "out with exclude_modules"
    )
    wanted = config.target_modules if names_layers(config) else []
    assert wanted is not None
    idle = [own for own in wanted if not any(ends_with(name, [own]) for name in called)]
    if idle or not called:
        what = f"of {listed(idle)} in target_modules" if idle else listed(uncalled)
        raise BindingError(f"the network calls no layer {what}: {why}, or from the list")
    warnings.warn(
        f"{len(uncalled)} of {len(adapted)} selected layers have no adapter, as the network does "
        f"not call them: {listed(patterns(uncalled))} ('#' stands for a number); {why}",
        UserWarning,
        stacklevel=2,
    )


def _select(network: nn.Module, config: AdapterConfig, names: list[str]) -> list[str]:
    wanted = config.target_modules
    if wanted == "auto" and model_type(network) is not None:
        found = projections(network)
        if found:
            return _all_linear(network, found, names)
        if isinstance(network, PreTrainedModel):
            raise TargetError(
                f"target_modules='auto' adapts linear layers that project to the queries, keys and "
                f"values of attention, and the architecture {model_type(network)!r} has none that "
                f"are modules; its linear layers are {listing(patterns(names))}. Name some of "
                "these, or use 'all-linear'"
            )
    if wanted in EVERY_LAYER:
        return _every_layer(network, names)
    assert wanted is not None
    return [name for name in names if matches(name, wanted)]


def _every_layer(network: nn.Module, names: list[str]) -> list[str]:
    """All but the output layer for tokens, as in PEFT, and what kernels read."""
    read = read_by_kernels(network)
    output = network.get_output_embeddings() if isinstance(network, PreTrainedModel) else None
    output = None if output is None else unwrapped(output)
    return [
        name
        for name in names
        if unwrapped(network.get_submodule(name)) is not output and name not in read
    ]


def _all_linear(network: nn.Module, found: list[str], names: list[str]) -> list[str]:
    """The projections, each of which has to be a linear layer."""
    others = {
        name: type(unwrapped(network.get_submodule(name))).__name__
        for name in found
        if name not in names
    }
    if others:
        raise TargetError(
            "target_modules='auto' adapts the projections of attention, and "
            f"{listed([*others])} cannot be adapted: {listing(dict.fromkeys(others.values()))} "
            "is no linear layer that pyrolora knows; name the layers to adapt in target_modules, "
            "or load the network without that quantisation"
        )
    return found


def _without_excluded(network: nn.Module, config: AdapterConfig, names: Sequence[str]) -> list[str]:
    """The names that are not excluded; each entry of ``exclude_modules`` has to exclude something,
    or be a layer that is not selected anyway."""
    excluded = config.exclude_modules
    if excluded is None:
        return [*names]
    modules = {name: unwrapped(module) for name, module in walk(network) if name}
    for own in [excluded] if isinstance(excluded, str) else excluded:
        wanted = own if isinstance(excluded, str) else [own]
        found = [name for name in modules if matches(name, wanted)]
        if not found:
            raise TargetError(
                f"exclude_modules names {own!r}, and {type(network).__name__} has no such module"
                f"{nearest(own, modules)}"
            )
        inside = [n for n in names if any(n.startswith(f"{outer}.") for outer in found)]
        if inside and not any(n in found for n in names):
            raise TargetError(
                f"exclude_modules names {own!r}, a {type(modules[found[0]]).__name__} with layers "
                f"inside ({listed(patterns(inside))}), and would exclude none of them, as in "
                f"PEFT; name the layers, or write a regular expression: '.*{re.escape(own)}.*'"
            )
    return [name for name in names if not matches(name, excluded)]


def _wide_enough(
    names: Sequence[str], layers: Mapping[str, nn.Module], config: AdapterConfig
) -> list[str]:
    """The layers whose size allows their rank; that of a layer which is named has to."""
    small = {
        name: rank
        for name in names
        if (rank := _lookup(name, config.rank_pattern, config.r)) > min(features(layers[name]))
    }
    asked = [n for n in small if any(_pattern_matches(key, n) for key in config.rank_pattern)]
    if names_layers(config) or asked or len(small) == len(names):
        return [*names]  # `_spec` says which is too small
    if small:
        first = next(iter(small))
        sizes = features(layers[first])
        warnings.warn(
            f"{len(small)} of {len(names)} selected layers have no adapter, as they are smaller "
            f"than its rank: {listed(patterns(small))} ('#' stands for a number; {first!r} is "
            f"{sizes[0]} to {sizes[1]}); give them a rank of their own with rank_pattern",
            UserWarning,
            stacklevel=2,
        )
    return [name for name in names if name not in small]


def _spec(name: str, module: nn.Module, config: AdapterConfig) -> LayerSpec:
    in_features, out_features = features(module)
    rank = _lookup(name, config.rank_pattern, config.r)
    alpha = _lookup(name, config.alpha_pattern, config.lora_alpha)
    if rank > min(in_features, out_features):
        raise ConfigError(
            f"rank {rank} is above the size of layer {name!r} (in {in_features}, out "
            f"{out_features}); choose r <= {min(in_features, out_features)}, or give this layer "
            "its own rank with rank_pattern"
        )
    scaling = alpha / (rank**0.5 if config.use_rslora else rank)
    return LayerSpec(name, in_features, out_features, rank, scaling)


def _lookup(name: str, patterns: Mapping[str, N], default: N) -> N:
    """PEFT's rule: the first key that, as a regular expression, matches the end of the name."""
    for pattern, value in patterns.items():
        if _pattern_matches(pattern, name):
            return value
    return default


def _pattern_matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None
    except re.error as error:
        raise ConfigError(f"{pattern!r} is not a regular expression: {error}") from error
