"""The modules of a network by the names that they have without our wrappers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from pyrolora.adapters.adapted_linear import is_quantised_layer
from pyrolora.adapters.layer import Wrapper
from pyrolora.errors import ConfigError


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


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D) or is_quantised_layer(module)


def linear_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Name -> linear layer, wrapped or not, in the network's order; not the network itself. A
    quantised one need not be an ``nn.Linear``: it is called.

    The projections of ``nn.MultiheadAttention`` are left out: torch reads their weights without
    calling them, so that an adapter there would do nothing.
    """
    opaque = [name for name, m in walk(network) if isinstance(m, nn.MultiheadAttention)]
    return {
        name: module
        for name, module in walk(network)
        if name
        and is_linear(unwrapped(module))
        and not any(name.startswith(f"{prefix}." if prefix else "") for prefix in opaque)
    }


def read_by_kernels(network: nn.Module) -> list[str]:
    """Names of the linear layers of Mamba's mixers whose weights its fused kernels read without
    calling them, where they run: PEFT adapts none of these."""
    found = {name: unwrapped(module) for name, module in walk(network)}
    mixers = [name for name, module in found.items() if "Mamba" in type(module).__name__]
    read = [f"{name}.out_proj" for name in mixers]
    return [name for name in read if name in found and is_linear(found[name])]


def has_weights(module: nn.Module) -> bool:
    """Whether a module itself, not one inside of it, holds a matrix."""
    module = unwrapped(module)
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(tensor.dim() > 1 for tensor in own)


def matches(name: str, wanted: str | Sequence[str]) -> bool:
    """PEFT's rule: one string is a regular expression for the whole name, a list holds suffixes."""
    if isinstance(wanted, str):
        try:
            return re.fullmatch(wanted, name) is not None or ends_with(name, [wanted])
        except re.error as error:
            raise ConfigError(f"{wanted!r} is not a regular expression: {error}") from error
    return ends_with(name, wanted)


def ends_with(name: str, suffixes: Iterable[str]) -> bool:
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def listing(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"


def patterns(names: Iterable[str]) -> list[str]:
    """Names with their numbers replaced by '#', each once, in order."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "#", n) for n in names))
