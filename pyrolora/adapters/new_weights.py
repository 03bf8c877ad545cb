"""Modules whose weights no checkpoint had: drawn at random when the network was loaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

from torch import nn
from transformers import PreTrainedModel

from pyrolora.adapters.modules import plain_parameters, unwrapped

CONTAINERS = (nn.ModuleList, nn.ModuleDict)
LOADED = "_is_hf_initialized"  # transformers marks each parameter that it has read or tied


def own_new_weights(network: nn.Module, heads: Iterable[str]) -> list[str]:
    """Return the modules outside of ``heads`` whose weights are all new, and warn of them.

    transformers draws at random what a checkpoint does not have, such as the pooler of a classifier
    that is loaded from a masked language model. Nothing brings these weights back, and nobody has
    trained them: they are to be owned and trained like a task head. Of a network that was not
    loaded, or has lost the marks of transformers (copied, or moved to another device after it was
    loaded), nothing is known, and nothing returned.
    """
    taken = tuple(f"{head}." for head in heads)
    parameters = dict(plain_parameters(network))
    loaded = {name for name, p in parameters.items() if getattr(p, LOADED, False)}
    new = {name for name in parameters.keys() - loaded if not name.startswith(taken)}
    if not isinstance(network, PreTrainedModel) or not new or not loaded:
        return []
    owned = list(_wholly_new(network, "", new))
    inside = tuple(f"{own}." for own in owned)
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


def _wholly_new(module: nn.Module, prefix: str, new: set[str]) -> Iterator[str]:
    """The largest modules all of whose parameters are new; a list of modules is none."""
    for name, child in unwrapped(module).named_children():
        path = f"{prefix}{name}"
        names = {f"{path}.{own}" for own, _ in plain_parameters(child)}
        if names and names <= new and not isinstance(unwrapped(child), CONTAINERS):
            yield path
        else:
            yield from _wholly_new(child, f"{path}.", new)
