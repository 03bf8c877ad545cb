"""Which modules of a network are its task head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from pyrolora.adapters.config import AdapterConfig
from pyrolora.adapters.left_out import nearest
from pyrolora.adapters.modules import walk
from pyrolora.adapters.names import ends_with
from pyrolora.adapters.wrapper import unwrapped
from pyrolora.errors import TargetError, listed


def find_heads(network: nn.Module, config: AdapterConfig) -> list[str]:
    """Return the names of the modules that the posterior owns a copy of.

    By default they are what a transformers model has beside its backbone: ``classifier``,
    ``score``, ``pre_classifier``. The backbone is the largest of its children, the one that the
    class names so, and every child that is a transformers model or holds embeddings. A network
    with an output layer for tokens has no task head, nor has one that writes text.
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


def _saved(network: nn.Module, entries: Sequence[str]) -> list[str]:
    """Return the modules that ``modules_to_save`` names, without those inside of another one."""
    modules = {name: module for name, module in walk(network) if name}
    for entry in entries:
        named = [name for name in modules if ends_with(name, [entry])]
        if not named:
            children = [name for name, _ in network.named_children()]
            raise TargetError(
                f"modules_to_save names {entry!r}, but the network has no such module"
                f"{nearest(entry, modules)}; its children are {listed(children, most=None)}"
            )
        if not any(True for name in named for _ in modules[name].parameters()):
            raise TargetError(
                f"modules_to_save names {entry!r}, a "
                f"{type(unwrapped(modules[named[0]])).__name__}, which has no parameters to train; "
                "leave it out"
            )
    saved = [name for name in modules if ends_with(name, entries)]
    return [n for n in saved if not any(n.startswith(f"{other}.") for other in saved)]
