"""Which modules of a network get an adapter, and which are its task head."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pyrolora.adapters.layer import Wrapper
from pyrolora.errors import ConfigError, TargetError, positive, whole_number
from pyrolora.types import AdapterConfig

N = TypeVar("N", int, float)

# The attention projections of query, key and value: where adapters pay most for their size.
AUTO_TARGETS: dict[str, tuple[str, ...]] = {
    "bert": ("query", "key", "value"),
    "roberta": ("query", "key", "value"),
    "xlm-roberta": ("query", "key", "value"),
    "electra": ("query", "key", "value"),
    "distilbert": ("q_lin", "k_lin", "v_lin"),
    "gpt2": ("c_attn",),
    "llama": ("q_proj", "k_proj", "v_proj"),
    "mistral": ("q_proj", "k_proj", "v_proj"),
    "qwen2": ("q_proj", "k_proj", "v_proj"),
    "qwen3": ("q_proj", "k_proj", "v_proj"),
    # ViT named its projections query, key, value before transformers 5.
    "vit": ("q_proj", "k_proj", "v_proj", "query", "key", "value"),
}


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


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, or what a wrapper of ours wraps."""
    return module.base_layer if isinstance(module, Wrapper) else module


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer; ``Conv1D`` stores its weight as (in, out)."""
    module = unwrapped(module)
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    # Of an nn.Module, whose attributes are typed as tensors or modules.
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """``named_modules`` with the names that modules have without our wrappers; a wrapper stands
    for what it wraps."""
    yield prefix, module
    for name, child in unwrapped(module).named_children():
        yield from walk(child, f"{prefix}.{name}" if prefix else name)


def plain_parameters(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """``named_parameters`` with the names that they have without our wrappers."""
    for name, module in walk(network):
        for own, parameter in unwrapped(module).named_parameters(recurse=False):
            yield f"{name}.{own}" if name else own, parameter


def linear_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Name -> linear layer, wrapped or not, in the network's order; not the network itself.

    The projections of ``nn.MultiheadAttention`` are left out: torch reads their weights without
    calling them, so that an adapter there would do nothing.
    """
    opaque = [name for name, m in walk(network) if isinstance(m, nn.MultiheadAttention)]
    return {
        name: module
        for name, module in walk(network)
        if name
        and isinstance(unwrapped(module), nn.Linear | Conv1D)
        and not any(name.startswith(f"{prefix}." if prefix else "") for prefix in opaque)
    }


def find_heads(network: nn.Module, config: AdapterConfig) -> list[str]:
    """Names of the modules that the posterior owns a copy of.

    By default the children of a transformers model beside its backbone: ``classifier``, ``score``,
    ``pre_classifier``. A language-model head is no task head.
    """
    if config.modules_to_save is not None:
        names = [name for name, _ in walk(network) if name]
        found = [name for name in names if _ends_with(name, config.modules_to_save)]
        for wanted in config.modules_to_save:
            if not any(_ends_with(name, [wanted]) for name in found):
                raise TargetError(
                    f"modules_to_save names {wanted!r}, but the network has no such module; "
                    f"its children are {_listing(name for name, _ in network.named_children())}"
                )
        return [n for n in found if not any(n.startswith(f"{other}.") for other in found)]
    if not isinstance(network, PreTrainedModel):
        return []
    output = network.get_output_embeddings()
    return [
        name
        for name, child in network.named_children()
        if name != network.base_model_prefix
        and any(True for _ in child.parameters())
        and (output is None or all(module is not output for _, module in walk(child)))
    ]


def find_targets(
    network: nn.Module, config: AdapterConfig, heads: Iterable[str]
) -> list[LayerSpec]:
    """The layers that ``config`` selects, with their ranks and scalings.

    Raises
    ------
    TargetError
        When nothing matches (the message lists what exists).
    ConfigError
        When a rank exceeds a layer's size.
    """
    heads = list(heads)
    layers = {
        name: module
        for name, module in linear_layers(network).items()
        if not any(name == head or name.startswith(f"{head}.") for head in heads)
    }
    names = _select(network, config, list(layers))
    if config.exclude_modules is not None:
        names = [name for name in names if not _matches(name, config.exclude_modules)]
    if not names:
        raise TargetError(
            f"target_modules={config.target_modules!r}"
            + (f" without {config.exclude_modules!r}" if config.exclude_modules else "")
            + f" matches no linear layer of {type(network).__name__}; "
            f"it has {_listing(_patterns(layers))} ('#' stands for a number). Name some of these, "
            "or use 'all-linear'"
        )
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, option):
            if not any(_pattern_matches(pattern, name) for name in names):
                warnings.warn(
                    f"{option} has the key {pattern!r}, which matches no adapted layer",
                    RuntimeWarning,
                    stacklevel=2,
                )
    return [_spec(name, layers[name], config) for name in names]


def _select(network: nn.Module, config: AdapterConfig, names: list[str]) -> list[str]:
    wanted = config.target_modules
    if wanted == "auto":
        model_type = getattr(getattr(network, "config", None), "model_type", None)
        if model_type in AUTO_TARGETS:
            return [name for name in names if _ends_with(name, AUTO_TARGETS[model_type])]
        if isinstance(network, PreTrainedModel):
            raise TargetError(
                f"target_modules='auto' does not know the architecture {model_type!r}; "
                f"its linear layers are {_listing(_patterns(names))}. Name some of these, "
                "or use 'all-linear'"
            )
    if wanted in ("auto", "all-linear"):
        output = network.get_output_embeddings() if isinstance(network, PreTrainedModel) else None
        output = None if output is None else unwrapped(output)
        return [name for name in names if unwrapped(network.get_submodule(name)) is not output]
    assert wanted is not None
    return [name for name in names if _matches(name, wanted)]


def _matches(name: str, wanted: str | Sequence[str]) -> bool:
    """PEFT's rule: one string is a regular expression for the whole name, a list holds suffixes."""
    if isinstance(wanted, str):
        try:
            return re.fullmatch(wanted, name) is not None or _ends_with(name, [wanted])
        except re.error as error:
            raise ConfigError(f"{wanted!r} is not a regular expression: {error}") from error
    return _ends_with(name, wanted)


def _ends_with(name: str, suffixes: Iterable[str]) -> bool:
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


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


def _patterns(names: Iterable[str]) -> list[str]:
    """Names with their numbers replaced by '#', each once, in order."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "#", n) for n in names))


def _listing(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"
