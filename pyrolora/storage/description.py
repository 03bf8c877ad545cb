"""The description of a saved posterior, ``posterior.json``: every entry, its type and its bounds.

Each entry of a file becomes a value of one of our types here, or a `CheckpointError` that has the
entry, its value and what it should be. Nothing else of the file is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from pyrolora import defaults
from pyrolora.adapters import LayerSpec
from pyrolora.adapters.config import AdapterConfig
from pyrolora.data import TextOptions
from pyrolora.errors import CheckpointError, PyroLoraError
from pyrolora.files import shown
from pyrolora.guides import Guide, from_options, full_name, unregistered
from pyrolora.json_values import finite
from pyrolora.options import check_options
from pyrolora.storage.base import check_description
from pyrolora.storage.schema import (
    Check,
    anything,
    check_plain,
    choice,
    count,
    items,
    mapping,
    number,
    optional,
    record,
    refuse,
    scalar,
    text,
)
from pyrolora.tasks import available

FORMAT = "pyrolora-posterior"
FORMAT_VERSION = 2
DIGEST = "digest"
STATE_NAME = r"adapters-[0-9a-f]{12}\.safetensors"
REGISTRABLE = r"[A-Za-z][A-Za-z0-9_-]{0,79}"
TOKENIZER_NAME = r"tokenizer-[0-9a-f]{12}"

LOGGED = {
    *("step", "epoch", "loss", "elbo", "member"),
    *("r_hat", "effective_sample_size", "divergences", "kl_weight", "prior_precision"),
    *("noise_scale", "anchor_loss", "tolerated", "log_evidence", "head_precision"),
    *("held_back", "width", "temperature"),
}
"""Numbers that a fit adds to the history."""


@dataclass(frozen=True)
class Description:
    """The content of ``posterior.json``, checked and typed.

    Attributes
    ----------
    tokenizer_files
        Name -> SHA-256 of every file of the tokenizer's folder; empty without one.
    base
        The entries by which the network is recognised (`check_description`).
    classes
        The names of the data's classes, if they have names.
    texts
        How texts are read, where the fit was told; none in folders of earlier versions.
    temperature
        The temperature of every prediction; 1 where the file has none, as in earlier versions.
    """

    guide: Guide
    prior: Guide | None
    task: str
    config: AdapterConfig
    specs: list[LayerSpec]
    heads: list[str]
    base: dict[str, Any]
    classes: list[str] | None
    texts: TextOptions | None
    num_examples: int
    settings: dict[str, Any]
    history: list[dict[str, Any]]
    state_file: str
    sha256: str
    tokenizer: str | None
    temperature: float
    tokenizer_files: dict[str, str]


def described(meta: Mapping[str, Any]) -> Description:
    """Return the typed values of a description, whose format is known to be ours.

    Raises
    ------
    CheckpointError
        For an entry that is missing, unknown, or not what it should be.
    """
    check_plain("the description", meta)
    meta = {**EARLIER, **meta}
    record(ENTRIES)("the description", meta)
    check_description(meta["base"])
    guide, prior = _guide("guide", meta["guide"]), None
    if meta["prior"] is not None:
        prior = _guide("prior", meta["prior"])
    specs = [
        _options(f"layers[{i}]", LayerSpec, {**EARLIER_LAYER, **one})
        for i, one in enumerate(meta["layers"])
    ]
    for name, names in {"layers": [s.name for s in specs], "heads": meta["heads"]}.items():
        if len(set(names)) < len(names):
            raise CheckpointError(f"{name} has a module twice")
    if bool(specs) != guide.adapts:
        expected = (
            "no layers" if specs else f"layers, and there are no layers; {guide.name!r} adapts"
        )
        raise CheckpointError(f"layers must be {expected}")
    if (meta["tokenizer"] is None) != (meta["tokenizer_files"] is None):
        raise CheckpointError("of tokenizer and tokenizer_files one is null and the other is not")
    if specs and not meta["base"]["weights"]:
        raise CheckpointError("base has no digests of the network's weights")
    return Description(
        guide=guide,
        prior=prior,
        config=_options("adapter", AdapterConfig, {**EARLIER_ADAPTER, **meta["adapter"]}),
        texts=None if meta["texts"] is None else _options("texts", TextOptions, meta["texts"]),
        specs=specs,
        history=[_logged(entry) for entry in meta["history"]],
        tokenizer_files=meta["tokenizer_files"] or {},
        **{name: meta[name] for name in AS_THEY_ARE},
    )


def check_registered(where: str, meta: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for a guide or a task that is not registered, naming it.

    Entries that no save writes are left to `described`.
    """
    guides = [entry.get("name") for entry in _objects(meta, "guide", "prior")]
    missing = next(filter(None, (unregistered(n) for n in guides if isinstance(n, str))), None)
    if missing is not None:
        _ask_to_register(where, "guide", missing)
    task = meta.get("task")
    if isinstance(task, str) and re.fullmatch(REGISTRABLE, task) and task not in available():
        _ask_to_register(where, "task", task)


def _objects(meta: Mapping[str, Any], *names: str) -> list[dict[str, Any]]:
    return [meta[name] for name in names if isinstance(meta.get(name), dict)]


def _ask_to_register(where: str, axis: str, name: str) -> NoReturn:
    raise CheckpointError(
        f"{where} was saved with the {axis} {name!r}, and none of that name is registered here; "
        f"call pyrolora.{axis}s.register with the class whose name is {name!r}, and load again "
        "(from a shell: pyrolora --import MODULE ..., the module that does)"
    )


def digest_of(meta: Mapping[str, Any]) -> str:
    """Return the SHA-256 of all entries but the digest itself, as JSON in one spelling."""
    rest = {name: value for name, value in meta.items() if name != DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# The entries -------------------------------------------------------------------------------------


def _task(name: str, value: Any) -> None:
    """Refuse a task that is not registered by now."""
    choice(*available())(name, value)


def _settings(name: str, value: Any) -> None:
    """Check the settings of a fit, of which one is a number that is counted with."""
    mapping(scalar)(name, value)
    if "held_back" in value:
        count(1)(f"{name}.held_back", value["held_back"])


def _history_entry(name: str, value: Any) -> None:
    """Check an entry of the history: values that reports read have to be numbers.

    Null stands for a number that was not finite; a callback may have logged anything else.
    """
    mapping(anything)(name, value)
    for key, part in value.items():
        is_number = isinstance(part, int | float | None) and not isinstance(part, bool)
        if _is_ours(key) and not is_number:
            refuse(f"{name}.{key}", part, "a number")
    for key, needed in (("elbo", "step"), ("r_hat", "effective_sample_size")):
        if key in value and needed not in value:
            raise CheckpointError(f"{name} has {key!r} and no {needed!r}")


def _is_ours(key: str) -> bool:
    """Return whether the entry of a history is one that a fit logs."""
    return key in LOGGED or key.startswith("kl/")


def _logged(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {k: math.nan if v is None and _is_ours(k) else v for k, v in entry.items()}


_HEX = text("[0-9a-f]{64}")
_GUIDE = record({"name": text(), "options": mapping(anything)})
AS_THEY_ARE = (
    *("task", "heads", "base", "classes", "num_examples", "settings"),
    *("state_file", "sha256", "tokenizer", "temperature"),
)
EARLIER = {"temperature": 1.0, "texts": None}
"""Entries that folders of earlier versions do not have, and what they stand for."""
EARLIER_GUIDE = {"head": "point"}
"""The same of the options of each guide."""
EARLIER_TRAINED = {"hold_back": 0.0}
"""The same of those of a guide whose scales are fitted."""
EARLIER_ADAPTER, EARLIER_LAYER = {"target_parameters": None}, {"lookup": False}
"""The same of the entries of ``adapter``, and of each of ``layers``."""
ENTRIES: dict[str, Check] = {
    "format": choice(FORMAT),
    "format_version": choice(FORMAT_VERSION),
    "versions": mapping(text()),
    DIGEST: _HEX,
    "state_file": text(STATE_NAME),
    "sha256": _HEX,
    "tokenizer": optional(text(TOKENIZER_NAME)),
    "tokenizer_files": optional(mapping(_HEX, at_least=1)),
    "guide": _GUIDE,
    "prior": optional(_GUIDE),
    "task": _task,
    "adapter": mapping(anything),
    "layers": items(mapping(anything)),
    "heads": items(text()),
    "base": mapping(anything),
    "classes": optional(items(text())),
    "texts": optional(mapping(anything)),
    "num_examples": count(1),
    "settings": _settings,
    "history": items(_history_entry),
    "temperature": number(*defaults.TEMPERATURES),
}


def _guide(name: str, entry: Mapping[str, Any]) -> Guide:
    options = _with_earlier(entry["options"])
    try:
        guide = from_options(entry["name"], options)
    except PyroLoraError as error:
        raise CheckpointError(f"{name}: {error}") from error
    _check_complete(name, guide, options)
    if full_name(guide) != entry["name"]:
        refuse(f"{name}.name", entry["name"], repr(full_name(guide)))
    return guide


def _with_earlier(options: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the options of a guide, and of the one inside, from an earlier version's file."""
    inner = options.get("inner")
    nested = {"inner": _with_earlier(inner)} if isinstance(inner, dict) else {}
    trained = EARLIER_TRAINED if "scale_updates" in options else {}
    return {**EARLIER_GUIDE, **trained, **options, **nested}


def _options(name: str, kind: Any, values: Mapping[str, Any]) -> Any:
    """Make a dataclass of ours from the JSON of its fields."""
    missing = [field.name for field in dataclasses.fields(kind) if field.name not in values]
    if missing:
        raise CheckpointError(f"{name} has no {missing[0]!r}")
    try:
        check_options(kind, values, f"{name}.")
        made = kind(**values)
    except PyroLoraError as error:
        raise CheckpointError(f"{name}: {error}") from error
    _check_complete(name, made, values)
    return made


def _check_complete(name: str, made: Any, values: Mapping[str, Any]) -> None:
    """Refuse options that the file does not state: a save writes all, and none takes a default."""
    written = finite(dataclasses.asdict(made))
    if written != values:
        missing = [key for key in written if key not in values]
        reason = f"no {missing[0]!r}" if missing else f"not all options, or others: {shown(values)}"
        raise CheckpointError(f"{name} has {reason}")
