"""Adapters written as PEFT reads them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import pad

from pyrolora.adapters import LayerSpec, unwrapped, walk
from pyrolora.adapters.kernels import refused_by_peft
from pyrolora.adapters.kinds import is_transposed
from pyrolora.adapters.names import is_saved, selects
from pyrolora.adapters.other_kinds import is_other
from pyrolora.adapters.parameters import places
from pyrolora.errors import ConfigError, listed
from pyrolora.files import replacing, write_whole
from pyrolora.peft.config import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from pyrolora.peft.patterns import Patterns
from pyrolora.peft.rules import WEIGHT, exact_key, fused_targets, is_within_saved, task_type
from pyrolora.peft.shapes import as_kept, tensor_name
from pyrolora.peft.stacked import joined, keys
from pyrolora.storage import as_json


def write_adapter(
    path: Path,
    specs: Mapping[str, LayerSpec],
    matrices: Mapping[str, tuple[Tensor, Tensor]],
    heads: Mapping[str, nn.Module],
    base: nn.Module,
) -> None:
    """Write an adapter that ``peft.PeftModel.from_pretrained(base, path)`` loads.

    PEFT scales by ``lora_alpha / r`` with the rank of the matrices, so that ``lora_alpha`` is
    ``spec.scaling`` times that rank; layers that differ from the most common pair get entries of
    ``rank_pattern`` and ``alpha_pattern``. Servers that read neither (vLLM, LoRAX) scale all layers
    alike: for them there is `as_uniform`.

    The folder has the older adapter whole, none (it has no configuration), or the new one whole.

    Parameters
    ----------
    path
        The folder: new, empty, or with an adapter that is replaced.
    specs
        The adapted layers; ``scaling`` is used, ``rank`` is not.
    matrices
        Layer -> (A (r, in), B (out, r)), unscaled; r may differ from ``spec.rank``.
    heads
        Modules that take the place of the network's own, by their name in it.
    base
        The network, with or without our wrappers.

    Raises
    ------
    ConfigError
        When the folder holds something else, a layer stands under several names of which PEFT
        knows one, PEFT refuses a layer or finds others beside it, or its rules cannot tell the
        heads from other modules of the network.
    """
    _check_folder(path)
    _check_names(specs, base)
    standing = places(base, list(specs))
    stacks = {p.stack.name: p.stack for p in standing.values() if p.stack is not None}
    pairs = {name: matrices[name] for name in specs if standing[name].stack is None}
    ranks = {name: A.shape[0] for name, (A, _) in pairs.items()}
    scalings = {name: specs[name].scaling for name in pairs}
    files = {name: name for name in pairs} | keys([*stacks.values()], base)
    for name, stack in stacks.items():
        ranks[name] = max(len(matrices[own][0]) for own in stack.names)
        scalings[name] = specs[stack.names[0]].scaling
        pairs[name] = joined(stack, matrices)
    config = as_json(_describe(ranks, scalings, list(heads), base, stacks)).encode()
    tensors: dict[str, Tensor] = {}
    layers = dict(walk(base))
    for name, pair in pairs.items():
        layer = unwrapped(layers.get(name, base))  # a stack is kept as a linear layer is
        for factor, matrix in zip("AB", pair, strict=True):
            kept = as_kept(layer, factor, matrix.float())
            tensors[tensor_name(layer, files[name], factor)] = kept
    for name, head in heads.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in head.state_dict().items()}
    content = save({f"{PREFIX}{key}": _copy(t) for key, t in tensors.items()}, {"format": "pt"})
    path.mkdir(parents=True, exist_ok=True)
    with replacing(path / WEIGHTS_FILE) as scratch:
        scratch.write_bytes(content)
        (path / CONFIG_FILE).unlink(missing_ok=True)  # no adapter, rather than a mixture of two
    write_whole(path / CONFIG_FILE, config)


def as_uniform(
    specs: Mapping[str, LayerSpec], matrices: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[dict[str, LayerSpec], dict[str, tuple[Tensor, Tensor]]]:
    """Return the same updates in matrices of one rank, the largest, and with the scaling 1.

    A gets rows of zeros and B columns of zeros, and s moves into B.
    """
    rank = max(A.shape[0] for A, _ in matrices.values())
    padded = {}
    for name, (A, B) in matrices.items():
        missing = rank - A.shape[0]
        padded[name] = (pad(A, (0, 0, 0, missing)), pad(specs[name].scaling * B, (0, missing)))
    return {name: replace(spec, scaling=1.0) for name, spec in specs.items()}, padded


def _copy(tensor: Tensor) -> Tensor:
    """Return a contiguous copy: the format takes no views, and no tensors that share memory."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _describe(
    ranks: Mapping[str, int],
    scalings: Mapping[str, float],
    heads: list[str],
    base: nn.Module,
    stacks: Collection[str],
) -> dict[str, Any]:
    """Return the content of ``adapter_config.json``; ``stacks`` are parameters, the rest layers."""
    modules = {name: module for name, module in walk(base) if name}
    layers = [name for name in ranks if name not in stacks]
    linear = [name for name in layers if not is_other(unwrapped(modules[name]))]
    _check_heads(heads, list(ranks), list(modules))
    alphas = {name: _alpha(scalings[name], rank) for name, rank in ranks.items()}
    r, lora_alpha = mode((ranks[name], alphas[name]) for name in ranks)
    task = task_type(base, heads, list(modules))
    mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    names: list[str] | str = layers
    if any(selects(names, other) for other in modules.keys() - ranks.keys()):
        names = "|".join(re.escape(name) for name in names)  # PEFT matches it in full
    parameters = _beside_experts(names, layers, base)
    if parameters:
        names = [name for name in names if name not in parameters]
    _check_kernels(layers, base)
    targets = [*(f"{name}.{WEIGHT}" for name in parameters), *stacks]
    return {
        "peft_type": "LORA",
        "task_type": task,
        "auto_mapping": mapping if task is None else None,
        "base_model_name_or_path": getattr(base, "name_or_path", None) or None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": lora_alpha,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "fan_in_fan_out": not stacks and all(is_transposed(unwrapped(modules[n])) for n in linear),
        "target_modules": names,
        "target_parameters": targets or None,
        "rank_pattern": {exact_key(n, parameters): v for n, v in ranks.items() if v != r},
        "alpha_pattern": {
            exact_key(n, parameters): v for n, v in alphas.items() if v != lora_alpha
        },
        "modules_to_save": heads or None,
    }


def _alpha(scaling: float, rank: int) -> float:
    """Return the number that, divided by the rank, is the scaling; a whole one where it exists."""
    alpha = scaling * rank
    return round(alpha) if round(alpha) / rank == scaling else alpha


def _beside_experts(names: list[str] | str, layers: list[str], base: nn.Module) -> list[str]:
    """Return the layers that PEFT would confuse with the fused experts beside them.

    It knows experts by the ends of such names, too. The weights of these layers go into
    ``target_parameters``, which PEFT matches by their names.
    """
    fused = fused_targets(base)
    if fused and isinstance(names, str):  # PEFT reduces it to the ends of the names that it matches
        raise ConfigError(
            f"PEFT knows the layers of a {type(base).__name__} by the ends of their names alone, "
            f"and would adapt more than {listed(layers, most=3)}; export the merged network "
            "(posterior.merge()), or fit layers whose names end alike together"
        )
    return [name for name in layers if name.rpartition(".")[2] in fused]


def _check_folder(path: Path) -> None:
    """Refuse a file, and a folder with anything but an adapter in it."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"an adapter is a folder, and {path} is a file; choose another path")
    if not path.is_dir() or (path / CONFIG_FILE).is_file():
        return
    names = sorted(item.name for item in path.iterdir())
    others = [n for n in names if not n.startswith(".") and n != WEIGHTS_FILE]
    if others:
        raise ConfigError(
            f"{path} is not empty and holds no adapter, but {listed(others, most=3)}; choose a "
            "folder of the adapter's own"
        )


def _check_names(specs: Iterable[str], base: nn.Module) -> None:
    """Refuse later names of a layer that has several: PEFT lists it under the first alone."""
    first: dict[nn.Module, str] = {}
    for name, module in walk(base):
        known = first.setdefault(unwrapped(module), name)
        if name in specs and known != name:
            raise ConfigError(
                f"{known!r} and {name!r} are one layer, which PEFT knows under the first of its "
                f"names alone; fit with exclude_modules=[{name!r}], or use merge()"
            )


def _check_heads(heads: Sequence[str], layers: Iterable[str], modules: Iterable[str]) -> None:
    """Refuse heads that PEFT's rules would confuse with other modules."""
    taken = [n for n in modules if n not in heads and is_saved(heads, n)]
    taken += [n for n in layers if is_within_saved(heads, n, Patterns())]
    if taken:
        raise ConfigError(
            f"PEFT cannot tell the task heads {listed(heads, most=3)} from "
            f"{listed(taken, most=3)}: it knows modules_to_save by the end of their names; export "
            "the merged network instead (posterior.merge()), or give the head a name of its own"
        )


def _check_kernels(layers: list[str], base: nn.Module) -> None:
    """Refuse layers that PEFT refuses."""
    refused = refused_by_peft(layers, base)
    if refused:
        raise ConfigError(
            f"PEFT refuses {listed(refused, most=3)} of a {type(base).__name__}, whose kernels "
            "read such weights without calling the layer; export the merged network "
            "(posterior.merge()), or fit without them in target_modules"
        )
