"""Errors and warnings about weights without an adapter, and names that select no layer."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence

from torch import nn
from transformers import PreTrainedModel

from pyrolora.adapters.config import AdapterConfig
from pyrolora.adapters.kernels import read_by_kernels
from pyrolora.adapters.kinds import features, is_linear
from pyrolora.adapters.modules import adaptable_layers, has_weights, linear_layers, walk
from pyrolora.adapters.names import collapsed, ends_with, matches
from pyrolora.adapters.other_kinds import CONVOLUTIONS, refusal
from pyrolora.adapters.wrapper import Wrapper, unwrapped
from pyrolora.errors import ConfigError, TargetError, listed


def names_layers(config: AdapterConfig) -> bool:
    """Return whether the targets are a list of names, each of which has to select a layer."""
    return not isinstance(config.target_modules, str)


def refuse_foreign(network: nn.Module) -> None:
    """Raise `ConfigError` for a network in which another library has put adapters."""
    foreign = {name: module for name, module in walk(network) if _is_foreign(module)}
    if foreign:
        layers = [name for name, module in foreign.items() if hasattr(module, "base_layer")]
        places = layers or [*foreign]
        raise ConfigError(
            f"this {type(network).__name__} holds adapters of PEFT's or of another library, in "
            f"{listed([name or 'the network itself' for name in places])}; merge them into its "
            "weights or take them out first (PEFT: peft_model.merge_and_unload() or .unload(); "
            "transformers: model.delete_adapter(name)), or read a saved one with "
            "pyrolora.from_peft(folder, base)"
        )


def _is_foreign(module: nn.Module) -> bool:
    return not isinstance(module, Wrapper) and (
        type(module).__module__.partition(".")[0] == "peft"
        or (hasattr(module, "lora_A") and hasattr(module, "base_layer"))
    )


def check_names(
    network: nn.Module,
    config: AdapterConfig,
    selected: Sequence[str],
    adapted: Sequence[str],
    heads: Sequence[str],
) -> None:
    """Raise `TargetError` for entries of ``target_modules`` that give no adapter.

    The message says what each of them is. Warn of other weights that an entry stands for, too.
    """
    entries = config.target_modules
    assert entries is not None
    idle = [entry for entry in entries if not any(ends_with(n, [entry]) for n in adapted)]
    if idle:
        reasons = [f"{name!r} {_what_is(network, name, config, selected, heads)}" for name in idle]
        raise TargetError(
            f"target_modules names what gets no adapter: {'; '.join(reasons)}. Leave out what is "
            "no linear layer, and write the others as the network has them"
        )
    warn_of_matches(network, config)


def warn_of_matches(network: nn.Module, config: AdapterConfig) -> None:
    """Warn of modules with weights that the targets name, and that have no adapter."""
    wanted = config.target_modules
    assert wanted is not None
    layers = adaptable_layers(network)
    others = [
        f"{name} ({type(unwrapped(module)).__name__})"
        for name, module in walk(network)
        if name and name not in layers and has_weights(module) and matches(name, wanted)
    ]
    if others:
        _warn(
            f"target_modules={wanted!r} selects modules that are no linear layers, which get no "
            f"adapter: {listed(collapsed(others))} ('#' stands for a number)"
        )


def warn_of_left_out(
    network: nn.Module,
    adapted: Collection[str],
    parameters: Collection[str],
    heads: Sequence[str],
    config: AdapterConfig,
) -> None:
    """Warn of weights without an adapter that multiply as those of linear layers do.

    They are fused experts and routers that ``target_parameters`` does not name, the projections of
    ``nn.MultiheadAttention``, and linear layers that kernels read. ``parameters`` are those that
    are adapted, beside the ``adapted`` layers.
    """
    read = read_by_kernels(network)
    left = {
        name: f"{name} ({type(unwrapped(module)).__name__})"
        for name, module in walk(network)
        if name and not _is_within(name, heads) and name not in adapted
        if _multiplies(module, name, parameters) or name in read
    }
    if config.exclude_modules is not None:
        left = {n: what for n, what in left.items() if not matches(n, config.exclude_modules)}
    if left:
        share = _share(network, {*adapted, *parameters}, heads)
        _warn(
            f"{config.target_modules!r} adapts linear layers, here {share:.0%} of the weights "
            "beside embeddings and heads; without an adapter are "
            f"{listed(collapsed(left.values()))} ('#' stands for a number). "
            + _advice(network, left, parameters)
        )


def nearest(wanted: str, names: Iterable[str]) -> str:
    """Return a hint at names that look like ``wanted``, if there are any."""
    known = {part for name in names for part in (name, name.rpartition(".")[2])}
    similar = difflib.get_close_matches(wanted, sorted(known), n=3)
    return f" (like it: {listed(similar)})" if similar else ""


def refused_by_name(network: nn.Module, config: AdapterConfig) -> str:
    """Return what is said of convolutions and embeddings that the targets match in vain, or ''."""
    wanted = config.target_modules
    modules = {name: unwrapped(module) for name, module in walk(network) if name}
    found = [
        f"; {name!r} is of the class {type(module).__name__}, and {refusal(module)}"
        for name, module in modules.items()
        if isinstance(module, (*CONVOLUTIONS, nn.Embedding))
        and refusal(module)
        and wanted is not None
        and matches(name, wanted)
    ]
    return found[0] if found else ""


def _what_is(
    network: nn.Module,
    entry: str,
    config: AdapterConfig,
    selected: Sequence[str],
    heads: Sequence[str],
) -> str:
    """Return why an entry of ``target_modules`` selects nothing, as the rest of a sentence."""
    modules = {name: unwrapped(module) for name, module in walk(network) if name}
    named = [name for name in modules if ends_with(name, [entry])]
    if any(ends_with(name, [entry]) for name in selected):
        options = ("exclude_modules", "layers_to_transform")
        excluding = [name for name in options if getattr(config, name) is not None]
        return f"is excluded by {' and '.join(excluding)}"
    if not named:
        parameters = [n for n, _ in network.named_parameters() if ends_with(n, [entry])]
        if parameters:
            owner = type(network.get_submodule(parameters[0].rpartition(".")[0])).__name__
            return f"is a parameter of a {owner}, no layer (name it in target_parameters)"
        return f"is no module of {type(network).__name__}{nearest(entry, modules)}"
    if all(_is_within(name, heads) for name in named):
        return "belongs to a task head, which is trained in full (see modules_to_save)"
    classes = dict.fromkeys(type(modules[name]).__name__ for name in named)
    if isinstance(modules[named[0]], (*CONVOLUTIONS, nn.Embedding)):
        return f"is of the class {'/'.join(classes)}, and {refusal(modules[named[0]])}"
    if all(_of_attention(network, name) for name in named):
        return f"is of the class {'/'.join(classes)}, whose weights are read without calling it"
    inside = [
        n for n in linear_layers(network) if any(n.startswith(f"{outer}.") for outer in named)
    ]
    more = f" (inside of it: {listed(_endings(inside))})" if inside else ""
    parameters = [f"{entry}.{n}" for n in _matrices(modules[named[0]])]
    if parameters:
        more = f" (name its parameters in target_parameters: {listed(parameters)})"
    return f"is of the class {'/'.join(classes)}, no linear layer{more}"


def _endings(names: Iterable[str]) -> list[str]:
    return [*dict.fromkeys(name.rpartition(".")[2] for name in names)]


def _of_attention(network: nn.Module, name: str) -> bool:
    outer = name.rpartition(".")[0]
    owners = (name, outer) if outer else (name,)
    return any(
        isinstance(unwrapped(network.get_submodule(n)), nn.MultiheadAttention) for n in owners
    )


def _is_within(name: str, outer: Iterable[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in outer)


def _advice(network: nn.Module, left: Iterable[str], adapted: Collection[str]) -> str:
    """Return what to do about modules without an adapter."""
    modules = {place: unwrapped(network.get_submodule(place)) for place in left}
    names = [
        f"{place}.{name}".rpartition(".layers.")[2].partition(".")[2] or f"{place}.{name}"
        for place, module in modules.items()
        for name in _matrices(module)
        if f"{place}.{name}" not in adapted and "Attention" not in type(module).__name__
    ]
    if not names:
        return "pyrolora has none for projections that torch or a kernel reads without calling them"
    return f"Experts and routers are adapted by name: target_parameters={[*dict.fromkeys(names)]}"


def _multiplies(module: nn.Module, place: str, adapted: Collection[str]) -> bool:
    """Return whether a module, though no linear layer, multiplies with matrices as those do."""
    module = unwrapped(module)
    names = [name for name in _matrices(module) if f"{place}.{name}" not in adapted]
    return isinstance(module, nn.MultiheadAttention) or bool(names)


def _matrices(module: nn.Module) -> list[str]:
    """Return the parameters of a module, without wrapper, that multiply as linear layers do."""
    if is_linear(module) or type(module).__module__.startswith("torch.nn.modules."):
        return []
    if isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
        return []
    flat = "Expert" in type(module).__name__  # DBRX has its experts below one another
    return [
        name
        for name, tensor in module.named_parameters(recurse=False)
        if (tensor.dim() == 3 and min(tensor.shape) > 1)
        or (tensor.dim() == 2 and (flat or name == "weight"))
    ]


def _share(network: nn.Module, adapted: Collection[str], heads: Sequence[str]) -> float:
    """Return the adapted share of all matrices that are neither embeddings nor in heads."""
    output = network.get_output_embeddings() if isinstance(network, PreTrainedModel) else None
    output = None if output is None else unwrapped(output)
    covered = total = 0
    for name, module, size in _sizes(network):
        if module is not output and not _is_within(name, heads):
            total += size
            covered += size if name in adapted else 0
    return covered / max(total, 1)


def _sizes(network: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Iterate over the modules that hold matrices, with the number of their entries."""
    for name, wrapped in walk(network):
        module = unwrapped(wrapped)
        if is_linear(module):
            inputs, outputs = features(module)
            yield name, module, inputs * outputs
        elif not isinstance(module, nn.Embedding):
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 1:
                    yield f"{name}.{own}", module, parameter.numel()


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)
