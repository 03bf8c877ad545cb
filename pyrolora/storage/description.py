"""The description of a saved posterior, ``posterior.json``: every entry, its type and its bounds.

What a file says becomes a value of one of our types here, or a `CheckpointError` that names the
entry, what it holds and what it should. Nothing else of the file is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from pyrolora import defaults
from pyrolora.adapters import LayerSpec
from pyrolora.adapters.config import AdapterConfig
from pyrolora.errors import CheckpointError, PyroLoraError
from pyrolora.files import shown
from pyrolora.guides import Guide, from_options, full_name, unregistered
from pyrolora.options import check_options
from pyrolora.storage.base import check_description
from pyrolora.storage.numbers import finite
from pyrolora.tasks import available

FORMAT = "pyrolora-posterior"
FORMAT_VERSION = 2
DIGEST = "digest"
STATE_NAME = r"adapters-[0-9a-f]{12}\.safetensors"
REGISTRABLE = r"[A-Za-z][A-Za-z0-9_-]{0,79}"
TOKENIZER_NAME = r"tokenizer-[0-9a-f]{12}"

LONGEST_NAME = 1000
LONGEST_TEXT = 100_000
DEEPEST = 20
MOST_COUNT = 2**53
"""Whole numbers beyond are not exact in every reader of JSON."""

LOGGED = {
    *("step", "epoch", "loss", "elbo", "member"),
    *("r_hat", "effective_sample_size", "divergences", "kl_weight", "prior_precision"),
    *("noise_scale", "anchor_loss", "tolerated", "log_evidence"),
}
"""Numbers that a fit adds to the history."""

Check = Callable[[str, Any], None]
"""Raises `CheckpointError` unless the value of the entry of that name is one that it can have."""


@dataclass(frozen=True)
class Description:
    """What ``posterior.json`` says.

    Attributes
    ----------
    tokenizer_files
        Name -> SHA-256 of every file of the tokenizer's folder; empty without one.
    base
        What recognises the network, by `check_description`.
    classes
        The names of the data's classes, if they have names.
    temperature
        Of every prediction; 1 where the file has none, as those of earlier versions.
    """

    guide: Guide
    prior: Guide | None
    task: str
    config: AdapterConfig
    specs: list[LayerSpec]
    heads: list[str]
    base: dict[str, Any]
    classes: list[str] | None
    num_examples: int
    settings: dict[str, Any]
    history: list[dict[str, Any]]
    state_file: str
    sha256: str
    tokenizer: str | None
    temperature: float
    tokenizer_files: dict[str, str]


def described(meta: Mapping[str, Any]) -> Description:
    """The typed values of a description, whose format is known to be ours.

    Raises
    ------
    CheckpointError
        For an entry that is missing, unknown, or not what it should be.
    """
    _check_plain(meta)
    meta = {**EARLIER, **meta}
    _record(ENTRIES)("the description", meta)
    check_description(meta["base"])
    guide, prior = _guide("guide", meta["guide"]), None
    if meta["prior"] is not None:
        prior = _guide("prior", meta["prior"])
    specs = [_options(f"layers[{i}]", LayerSpec, one) for i, one in enumerate(meta["layers"])]
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
        config=_options("adapter", AdapterConfig, meta["adapter"]),
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
        f"call pyrolora.{axis}s.register with the class whose name is {name!r}, and load again"
    )


def digest_of(meta: Mapping[str, Any]) -> str:
    """The SHA-256 of all entries but the digest itself, as JSON in one spelling."""
    rest = {name: value for name, value in meta.items() if name != DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# The entries -------------------------------------------------------------------------------------


def _refuse(name: str, value: Any, expected: str) -> None:
    raise CheckpointError(f"{name} must be {expected}, got {shown(value)}")


def _text(pattern: str | None = None) -> Check:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, str) or not 0 < len(value) <= LONGEST_NAME:
            _refuse(name, value, f"a text of 1 to {LONGEST_NAME} characters")
        elif pattern is not None and re.fullmatch(pattern, value) is None:
            _refuse(name, value, f"a text of the form {pattern}")

    return check


def _count(at_least: int) -> Check:
    def check(name: str, value: Any) -> None:
        if type(value) is not int or not at_least <= value <= MOST_COUNT:
            _refuse(name, value, f"a whole number from {at_least} to {MOST_COUNT}")

    return check


def _temperature(name: str, value: Any) -> None:
    low, high = defaults.TEMPERATURES
    if type(value) not in (int, float) or not low <= value <= high:
        _refuse(name, value, f"a number from {low} to {high}")


def _one_of(*choices: Any) -> Check:
    def check(name: str, value: Any) -> None:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            _refuse(name, value, " or ".join(map(repr, choices)))

    return check


def _task(name: str, value: Any) -> None:
    _one_of(*available())(name, value)  # with the tasks that are registered by now


def _optional(inner: Check) -> Check:
    def check(name: str, value: Any) -> None:
        if value is not None:
            inner(name, value)

    return check


def _list(item: Check) -> Check:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, list):
            _refuse(name, value, "a list")
        for i, part in enumerate(value):
            item(f"{name}[{i}]", part)

    return check


def _mapping(item: Check, at_least: int = 0) -> Check:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, dict) or len(value) < at_least:
            _refuse(name, value, "an object with named values")
        for key, part in value.items():
            item(f"{name}.{key[:80]}", part)

    return check


def _record(entries: Mapping[str, Check]) -> Check:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, dict):
            _refuse(name, value, "an object with named values")
        for key in entries:
            if key not in value:
                raise CheckpointError(f"{name} has no {key!r}")
        for key, part in value.items():
            if key not in entries:
                raise CheckpointError(f"{name} has the unknown entry {shown(key)}")
            entries[key](key, part)

    return check


def _scalar(name: str, value: Any) -> None:
    if not isinstance(value, str | int | float | bool | None):
        _refuse(name, value, "a number, a text, true, false or null")


def _anything(name: str, value: Any) -> None:
    """What `_check_plain` lets through."""


def _history_entry(name: str, value: Any) -> None:
    """What reports read has to be a number (null: one that was not finite); a callback may have
    logged anything else."""
    _mapping(_anything)(name, value)
    for key, part in value.items():
        number = isinstance(part, int | float | None) and not isinstance(part, bool)
        if _is_ours(key) and not number:
            _refuse(f"{name}.{key}", part, "a number")
    for key, needed in (("elbo", "step"), ("r_hat", "effective_sample_size")):
        if key in value and needed not in value:
            raise CheckpointError(f"{name} has {key!r} and no {needed!r}")


def _is_ours(key: str) -> bool:
    """Whether the entry of a history is one that a fit logs."""
    return key in LOGGED or key.startswith("kl/")


def _logged(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {k: math.nan if v is None and _is_ours(k) else v for k, v in entry.items()}


_HEX = _text("[0-9a-f]{64}")
_GUIDE = _record({"name": _text(), "options": _mapping(_anything)})
AS_THEY_ARE = (
    *("task", "heads", "base", "classes", "num_examples", "settings"),
    *("state_file", "sha256", "tokenizer", "temperature"),
)
EARLIER = {"temperature": 1.0}
"""Entries that folders of earlier versions do not have, and what they stand for."""
ENTRIES: dict[str, Check] = {
    "format": _one_of(FORMAT),
    "format_version": _one_of(FORMAT_VERSION),
    "versions": _mapping(_text()),
    DIGEST: _HEX,
    "state_file": _text(STATE_NAME),
    "sha256": _HEX,
    "tokenizer": _optional(_text(TOKENIZER_NAME)),
    "tokenizer_files": _optional(_mapping(_HEX, at_least=1)),
    "guide": _GUIDE,
    "prior": _optional(_GUIDE),
    "task": _task,
    "adapter": _mapping(_anything),
    "layers": _list(_mapping(_anything)),
    "heads": _list(_text()),
    "base": _mapping(_anything),
    "classes": _optional(_list(_text())),
    "num_examples": _count(1),
    "settings": _mapping(_scalar),
    "history": _list(_history_entry),
    "temperature": _temperature,
}


def _check_plain(value: Any, name: str = "the description", depth: int = 0) -> None:
    """Refuse what no save writes anywhere: texts without an encoding, endless ones, deep nests."""
    if depth > DEEPEST:
        raise CheckpointError(f"{name[:80]} is nested too deeply")
    if isinstance(value, str):
        if len(value) > LONGEST_TEXT or not _is_encodable(value):
            _refuse(name, value, f"a text of Unicode of at most {LONGEST_TEXT:,} characters")
    elif isinstance(value, dict):
        for key, part in value.items():
            if len(key) > LONGEST_NAME or not _is_encodable(key):
                _refuse(f"a name in {name}", key, f"of at most {LONGEST_NAME} characters")
            _check_plain(part, key, depth + 1)
    elif isinstance(value, list):
        for part in value:
            _check_plain(part, name, depth + 1)
    elif isinstance(value, int) and not -MOST_COUNT <= value <= MOST_COUNT:
        _refuse(name, value, f"at most {MOST_COUNT}")


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _guide(name: str, entry: Mapping[str, Any]) -> Guide:
    try:
        guide = from_options(entry["name"], entry["options"])
    except PyroLoraError as error:
        raise CheckpointError(f"{name}: {error}") from error
    _check_complete(name, guide, entry["options"])
    if full_name(guide) != entry["name"]:
        _refuse(f"{name}.name", entry["name"], repr(full_name(guide)))
    return guide


def _options(name: str, kind: Any, values: Mapping[str, Any]) -> Any:
    """A dataclass of ours from the JSON of its fields."""
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
    """A save writes every option: none may take a default that the file does not state."""
    written = finite(dataclasses.asdict(made))
    if written != values:
        missing = [key for key in written if key not in values]
        reason = f"no {missing[0]!r}" if missing else f"not all options, or others: {shown(values)}"
        raise CheckpointError(f"{name} has {reason}")
