"""The query, key and value projections of attention, found by their names and where they stand."""

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
"""Words of a projection's name that say nothing of what it projects to."""
_LOW_RANK = {"a", "b", "with", "mqa"}
"""Those of the two factors that DeepSeek's attention has in place of one matrix."""
_SHELL = ".linear"
"""What Moshi and Gemma 4 have the layer of a projection in: ``q_proj.linear``."""
_FUSED_IN_ATTENTION = ("c_attn", "in_proj", "att_proj")
"""All three in one, where a module of attention has it: GPT-2, DeBERTa, Bark. Mamba has an in_proj,
too, which is none."""


def projections(network: nn.Module) -> list[str]:
    """Names of the query, key and value projections, in the network's order, be they linear layers
    or not.

    A module is attention if its children are projections to all three, each or together. PEFT's
    table of targets, where PEFT is installed and its table has the architecture, says in which
    modules they are; the key projections, which it mostly leaves out, are taken beside the others,
    and of what it lists outside of attention nothing, so that the layers are the same without PEFT.
    Only where no such module is found are they those of the table. In a network that writes text
    after more than text, such as pictures, they are those of its language model.
    """
    network = unwrapped(network)
    found = _by_structure(network)
    listed = _of_peft(network)
    places = {_outer(name) for name in listed}
    within = [name for name in found if _outer(name) in places] or listed or found
    parts = _language_models(network)
    return [n for n in within if not parts or any(n.startswith(f"{own}.") for own in parts)]


def roles(name: str, kind: str = "") -> tuple[str, ...]:
    """What the last part of a module's name says that it projects to, in a module whose class is
    called ``kind``; nothing where it says something else, too, as in ``pos_key_proj``."""
    last = name.rpartition(".")[2]
    if last in _FUSED_IN_ATTENTION and "Attention" in kind:
        return (QUERY, KEY, VALUE)
    words = [word for word in last.lower().split("_") if word not in _BESIDE]
    if words and words[0] in _ROLES:
        words = [words[0], *(word for word in words[1:] if word not in _LOW_RANK)]
    if not words or any(word not in _ROLES for word in words):
        return ()
    return tuple(dict.fromkeys(role for word in words for role in _ROLES[word]))


def _by_structure(network: nn.Module) -> list[str]:
    """The projections of every module that has all three, and of those that stand in its place in
    other blocks: these may share keys and values."""
    groups: dict[str, dict[str, tuple[str, ...]]] = {}
    kinds = {name: type(unwrapped(module)).__name__ for name, module in walk(network)}
    for name, module in walk(network):
        place = _outer(name)
        known = name and (is_linear(unwrapped(module)) or has_weights(module))
        own = roles(name.removesuffix(_SHELL), kinds[place]) if known else ()
        if own:
            groups.setdefault(place, {})[name] = own
    whole = [
        place
        for place, group in groups.items()
        if {role for own in group.values() for role in own} >= {QUERY, KEY, VALUE}
    ]
    places = collapsed(whole)
    return [
        name for place, group in groups.items() if collapsed([place])[0] in places for name in group
    ]


def _of_peft(network: nn.Module) -> list[str]:
    """What PEFT's table of targets selects; nothing without PEFT."""
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
    """The parts with the configuration of a language model inside of a larger network that writes
    text; none where the network is one itself, or has several configurations of that kind."""
    if not isinstance(network, PreTrainedModel) or not network.can_generate():
        return []
    try:
        wanted = type(network.config.get_text_config())
    except ValueError:  # an encoder and a decoder, of two models of language
        return []
    if isinstance(network.config, wanted):
        return []
    inner = {name: unwrapped(module) for name, module in walk(network)}
    models = {name: part for name, part in inner.items() if isinstance(part, PreTrainedModel)}
    return [name for name, part in models.items() if type(part.config) is wanted]


def _outer(name: str) -> str:
    """The module that a projection is of."""
    return name.removesuffix(_SHELL).rpartition(".")[0]
