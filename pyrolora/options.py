"""Options read from JSON, compared with the annotations of the dataclass that has them."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from pyrolora.errors import ConfigError
from pyrolora.files import shown


def check_options(kind: type, values: Mapping[str, Any], prefix: str = "") -> None:
    """Raise `ConfigError` for a name that ``kind`` has no field for, or a value of another type."""
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    for name, value in values.items():
        if name not in names:
            listed = f"; it has {', '.join(names)}" if len(names) < 40 else ""
            raise ConfigError(f"{prefix}{short(name)}: {kind.__name__} has no such option{listed}")
        if not fits(value, hints[name]):
            expected = getattr(hints[name], "__name__", str(hints[name]).replace("typing.", ""))
            raise ConfigError(f"{prefix}{name}: expected {expected}, got {shown(value)}")


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value of JSON can be one of the annotated type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in arguments)
    if origin is typing.Literal:  # which of its values: `checks.check_choices` says that better
        return any(type(value) is type(choice) for choice in arguments)
    if hint in (None, type(None)):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    kind = origin or hint
    if not isinstance(kind, type):
        return True
    if issubclass(kind, Enum):
        return isinstance(value, str)
    if issubclass(kind, Mapping):
        items = arguments[1:] or (Any,)
        return isinstance(value, dict) and all(fits(part, items[0]) for part in value.values())
    if issubclass(kind, Sequence):
        items = arguments or (Any,)
        return isinstance(value, list) and all(fits(part, items[0]) for part in value)
    return not dataclasses.is_dataclass(kind)


def changed_numbers(options: Any) -> list[str]:
    """Return ``name=value`` of each number that is not the default, of options within, too."""
    changed = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            changed += changed_numbers(value)
        elif isinstance(value, int | float | Mapping) and value not in (field.default, {}):
            changed.append(f"{field.name}={shown(value)}")
    return changed


def short(name: str) -> str:
    """Return a name as an error message quotes it."""
    return name if len(name) < 80 and name.isprintable() else shown(name)
