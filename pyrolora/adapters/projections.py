"""The query, key and value projections of attention, found by their names and places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from pyrolora.adapters.kinds import is_linear
from pyrolora.adapters.modules import has_weights, model_type, walk
from pyrolora.adapters.names import collapsed, matches
from pyrolora.adapters.wrapper import unwrapped

QUERY, KEY, VALUE = "query", "key", "value"
_ROLES: Mapping[str, tuple[str, ...]] = {
    "q": (QUERY,),
    "k": (KEY,),
    "v": (VALUE,),
    "kv": (KEY, VALUE),
    "qk": (QUERY, KEY),
    "qkv": (QUERY, KEY, VALUE),
    "query": (QUERY,),
    "key": (KEY,),
    "value": (VALUE,),
    "wq": (QUERY,),
    "wk": (KEY,),
    "wv": (VALUE,),
    "wqkv": (QUERY, KEY, VALUE),
}
_BESIDE = {"proj", "projection", "project", "lin", "linear", "to", "attn", "self", "head"}
_BESIDE |= {"current", "delayed"}
"""Words in the name of a projection that do not tell to what it projects.

The last two are those of the halves of Zaya's values.
"""
_LOW_RANK = {"a", "b", "with", "mqa"}
"""Words for the two factors that DeepSeek's attention has in place of one matrix."""
_SHELL = ".linear"
"""The name of the layer inside of a projection in Moshi and Gemma 4: ``q_proj.linear``."""
_FUSED_IN_ATTENTION = ("c_attn", "in_proj", "att_proj")
"""Names of all three in one layer, in a module of attention: GPT-2, DeBERTa, Bark.

Mamba's in_proj is none of them, and stands in no attention.
"""


def projections(network: nn.Module) -> list[str]:
    """Return the names of the query, key and value projections, in the network's order.

    They need not be linear layers. A module is attention if its children are projections to all
    three, each or together. PEFT's table of targets, where PEFT is installed and its table has the
    architecture, says in which modules they are; key projections, which it mostly leaves out, are
    added to the others, and entries outside of attention are left out, so that the layers are the
    same without PEFT. Only where no such module is found are they those of the table. In a network
    that writes text after reading more than text, such as pictures, they are those of its language
    model.
    """
    network = unwrapped(network)
    structural = _by_structure(network)
    listed = _of_peft(network)
    places = {_outer(name) for name in listed}
    within = [name for name in structural if _outer(name) in places] or listed or structural
    parts = _language_models(network)
    return [n for n in within if not parts or any(n.startswith(f"{part}.") for part in parts)]


def roles(name: str, outer_class: str = "") -> tuple[str, ...]:
    """Return to what a module projects by the last part of its name.

    ``outer_class`` is the name of the class of the module that it is in. A name that says something
    else, too, such as ``pos_key_proj``, has no role.
    """
    last = name.rpartition(".")[2]
    if last in _FUSED_IN_ATTENTION and "Attention" in outer_class:
        return (QUERY, KEY, VALUE)
    words = [word for word in last.lower().split("_") if word not in _BESIDE]
    if words and words[0] in _ROLES:
        words = [words[0], *(word for word in words[1:] if word not in _LOW_RANK)]
    if not words or any(word not in _ROLES for word in words):
        return ()
    return tuple(dict.fromkeys(role for word in words for role in _ROLES[word]))


def _by_structure(network: nn.Module) -> list[str]:
    """Return the projections of every module that has all three.

    Modules in its place in other blocks count, too: these may share keys and values.
    """
    groups: dict[str, dict[str, tuple[str, ...]]] = {}
    classes = {name: type(unwrapped(module)).__name__ for name, module in walk(network)}
    for name, module in walk(network):
        place = _outer(name)
        known = name and (is_linear(unwrapped(module)) or has_weights(module))
        projected = roles(name.removesuffix(_SHELL), classes[place]) if known else ()
        if projected:
            groups.setdefault(place, {})[name] = projected
    whole = [
        place
        for place, group in groups.items()
        if {role for projected in group.values() for role in projected} >= {QUERY, KEY, VALUE}
    ]
    places = collapsed(whole)
    return [
        name for place, group in groups.items() if collapsed([place])[0] in places for name in group
    ]


def _of_peft(network: nn.Module) -> list[str]:
    """Return the modules that PEFT's table of targets selects; none without PEFT."""
    try:
        from peft.utils import constants
    except ImportError:
        return []
    table: Mapping[str, str | Sequence[str]] = getattr(
        constants, "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", {}
    )
    wanted = table.get(str(model_type(network)))
    if wanted is None:
        return []
    return [n for n, m in walk(network) if n and has_weights(m) and matches(n, wanted)]


def _language_models(network: nn.Module) -> list[str]:
    """Return the language models inside of a larger network that writes text.

    They are the parts with the configuration of one; none where the network is one itself, or has
    several such configurations.
    """
    if not isinstance(network, PreTrainedModel) or not network.can_generate():
        return []
    try:
        wanted = type(network.config.get_text_config())
    except ValueError:  # an encoder and a decoder, two language models
        return []
    if isinstance(network.config, wanted):
        return []
    inner = {name: unwrapped(module) for name, module in walk(network)}
    models = {name: part for name, part in inner.items() if isinstance(part, PreTrainedModel)}
    return [name for name, part in models.items() if type(part.config) is wanted]


def _outer(name: str) -> str:
    """Return the name of the module that a projection belongs to."""
    return name.removesuffix(_SHELL).rpartition(".")[0]
