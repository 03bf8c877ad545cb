"""The modules of a network, by the names that they have without our wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from pyrolora.adapters.kinds import is_linear
from pyrolora.adapters.other_kinds import is_other
from pyrolora.adapters.wrapper import unwrapped


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Iterate as ``named_modules`` does, with the names that modules have without our wrappers.

    A wrapper comes under the name of the module that it wraps.
    """
    yield prefix, module
    for name, child in unwrapped(module).named_children():
        yield from walk(child, f"{prefix}.{name}" if prefix else name)


def plain_parameters(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Iterate as ``named_parameters`` does, with the names without our wrappers."""
    for path, module in walk(network):
        for name, parameter in unwrapped(module).named_parameters(recurse=False):
            yield f"{path}.{name}" if path else name, parameter


def linear_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return name -> linear layer, wrapped or not, in the network's order.

    The network itself does not count. A quantised layer counts, whatever its class, since it is
    called. The projections of ``nn.MultiheadAttention`` do not: torch reads their weights without
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


def adaptable_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return name -> linear layer, convolution or embedding, in the network's order."""
    linear = linear_layers(network)
    return {
        name: module
        for name, module in walk(network)
        if name in linear or (name and is_other(unwrapped(module)))
    }


def has_weights(module: nn.Module) -> bool:
    """Return whether a module itself, rather than one inside of it, holds a matrix."""
    module = unwrapped(module)
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(tensor.dim() > 1 for tensor in tensors)


def model_type(network: nn.Module) -> Any:
    """Return transformers' name of the architecture; None for a network that has none."""
    return getattr(getattr(network, "config", None), "model_type", None)
