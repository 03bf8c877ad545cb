"""Modules whose weights no checkpoint had: drawn at random when the network was loaded."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from pyrolora.adapters.kinds import is_dense
from pyrolora.adapters.modules import plain_parameters
from pyrolora.adapters.wrapper import unwrapped

CONTAINERS = (nn.ModuleList, nn.ModuleDict)
LOADED = "_is_hf_initialized"
"""The mark that transformers puts on each parameter that it has read or tied."""


def own_new_weights(network: nn.Module, heads: Iterable[str]) -> list[str]:
    """Return the modules outside of ``heads`` whose weights are all new, and warn of them.

    transformers draws at random what a checkpoint does not have, such as the pooler of a classifier
    that is loaded from a masked language model. Nothing brings these weights back, and nobody has
    trained them: they are to be owned and trained like a task head. Where the network has lost the
    marks of transformers (it was copied, or moved to another device), the names in its checkpoint
    tell, if that is on this machine. For a network that was not loaded the list is empty.
    """
    if not isinstance(network, PreTrainedModel):
        return []
    taken = tuple(f"{head}." for head in heads)
    parameters = dict(plain_parameters(network))
    loaded = {name for name, p in parameters.items() if getattr(p, LOADED, False)}
    unread = parameters.keys() - loaded if loaded else _unnamed(network, parameters)
    # A tied weight has several names, and a checkpoint may have it under any of them.
    read = {id(p) for name, p in parameters.items() if name not in unread}
    unread = {name for name in unread if id(parameters[name]) not in read}
    new = {n for n in unread if not n.startswith(taken) and is_dense(parameters[n])}
    owned = list(_wholly_new(network, "", new))
    inside = tuple(f"{module}." for module in owned)
    rest = sorted(n for n in new if not n.startswith(inside) and parameters[n].unique().numel() > 1)
    if owned:
        warnings.warn(
            f"new weights in {', '.join(owned)}: not in the checkpoint that the network was loaded "
            "from; the posterior owns them and trains them whole, like a task head",
            RuntimeWarning,
            stacklevel=4,
        )
    if rest:
        warnings.warn(
            f"new weights {', '.join(rest[:3])}: not in the checkpoint that the network was loaded "
            "from, and not those of a whole module that the posterior could own; save the network "
            "with save_pretrained(folder), and fit the one in that folder, to load the posterior "
            "again",
            RuntimeWarning,
            stacklevel=4,
        )
    return owned


def _unnamed(network: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Return the parameters below a module whose name no tensor of the checkpoint has.

    Only modules without numbered ones above and below: transformers renames those of older
    checkpoints.
    """
    words = {word for name in _checkpoint(network) for word in name.split(".")[:-1]}
    if not words:
        return set()
    words.add(network.base_model_prefix)
    paths = {name: name.split(".")[:-1] for name in names}
    numbered = {
        ".".join(path[: i + 1])
        for path in paths.values()
        for i in range(len(path))
        if any(word.isdigit() for word in path)
    }
    return {
        name
        for name, path in paths.items()
        for i, word in enumerate(path)
        if word not in words and ".".join(path[: i + 1]) not in numbered
    }


def _checkpoint(network: PreTrainedModel) -> Iterable[str]:
    """Return the names of the tensors in the checkpoint that the network came from, if here."""
    place = network.config._name_or_path
    options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    options |= {"_raise_exceptions_for_gated_repo": False, "local_files_only": True}
    try:
        for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME) if place else ():
            file = cached_file(place, name, **options)
            if file is not None and name == SAFE_WEIGHTS_INDEX_NAME:
                return list(json.loads(Path(file).read_text(encoding="utf-8"))["weight_map"])
            if file is not None:
                with safe_open(file, "pt") as tensors:
                    return list(tensors.keys())
    except (OSError, ValueError, LookupError, SafetensorError):  # not here, or no checkpoint
        return []
    return []


def _wholly_new(module: nn.Module, prefix: str, new: set[str]) -> Iterator[str]:
    """Iterate over the largest modules with new parameters only; containers do not count."""
    for name, child in unwrapped(module).named_children():
        path = f"{prefix}{name}"
        names = {f"{path}.{parameter}" for parameter, _ in plain_parameters(child)}
        if names and names <= new and not isinstance(unwrapped(child), CONTAINERS):
            yield path
        else:
            yield from _wholly_new(child, f"{path}.", new)
