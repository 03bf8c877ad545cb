"""Checks of JSON that somebody may have edited: types, bounds, and which entries there are.

A check takes the name of an entry and its value, and raises a `CheckpointError` that has the entry,
its value and what it should be.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from pyrolora.errors import CheckpointError
from pyrolora.files import shown

LONGEST_NAME = 1000
LONGEST_TEXT = 100_000
DEEPEST = 20
MOST_COUNT = 2**53
"""Whole numbers beyond are not exact in every reader of JSON."""

Check = Callable[[str, Any], None]
"""Raises `CheckpointError` unless the value of the entry of that name is one that it can have."""


def refuse(name: str, value: Any, expected: str) -> NoReturn:
    """Raise the error for an entry that is not what is expected."""
    raise CheckpointError(f"{name} must be {expected}, got {shown(value)}")


def text(pattern: str | None = None) -> Check:
    """Return a check for a text that is not empty, and has the form of ``pattern``."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, str) or not 0 < len(value) <= LONGEST_NAME:
            refuse(name, value, f"a text of 1 to {LONGEST_NAME} characters")
        elif pattern is not None and re.fullmatch(pattern, value) is None:
            refuse(name, value, f"a text of the form {pattern}")

    return check


def count(at_least: int) -> Check:
    """Return a check for a whole number."""

    def check(name: str, value: Any) -> None:
        if type(value) is not int or not at_least <= value <= MOST_COUNT:
            refuse(name, value, f"a whole number from {at_least} to {MOST_COUNT}")

    return check


def number(low: float, high: float) -> Check:
    """Return a check for a number from ``low`` to ``high``."""

    def check(name: str, value: Any) -> None:
        if type(value) not in (int, float) or not low <= value <= high:
            refuse(name, value, f"a number from {low} to {high}")

    return check


def choice(*choices: Any) -> Check:
    """Return a check for one of several values."""

    def check(name: str, value: Any) -> None:
        if not any(type(value) is type(one) and value == one for one in choices):
            refuse(name, value, " or ".join(map(repr, choices)))

    return check


def optional(inner: Check) -> Check:
    """Return a check that lets null through, and leaves other values to ``inner``."""

    def check(name: str, value: Any) -> None:
        if value is not None:
            inner(name, value)

    return check


def items(item: Check) -> Check:
    """Return a check for a list, each of whose items passes ``item``."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, list):
            refuse(name, value, "a list")
        for i, part in enumerate(value):
            item(f"{name}[{i}]", part)

    return check


def mapping(item: Check, at_least: int = 0) -> Check:
    """Return a check for an object with any names, each of whose values passes ``item``."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, dict) or len(value) < at_least:
            refuse(name, value, "an object with named values")
        for key, part in value.items():
            item(f"{name}.{key[:80]}", part)

    return check


def record(entries: Mapping[str, Check]) -> Check:
    """Return a check for an object with exactly these entries."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, dict):
            refuse(name, value, "an object with named values")
        for key in entries:
            if key not in value:
                raise CheckpointError(f"{name} has no {key!r}")
        for key, part in value.items():
            if key not in entries:
                raise CheckpointError(f"{name} has the unknown entry {shown(key)}")
            entries[key](key, part)

    return check


def scalar(name: str, value: Any) -> None:
    """Check for a number, a text, true, false or null."""
    if not isinstance(value, str | int | float | bool | None):
        refuse(name, value, "a number, a text, true, false or null")


def anything(name: str, value: Any) -> None:
    """Let everything through that `check_plain` does."""


def check_plain(
    name: str, value: Any, *, deepest: int = DEEPEST, longest: int = LONGEST_TEXT
) -> None:
    """Refuse values that no save writes anywhere in its JSON.

    They are texts without an encoding or of more than ``longest`` characters, nests of more than
    ``deepest`` levels, and numbers that are not finite or that readers would round.
    """
    if deepest < 0:
        raise CheckpointError(f"{name[:80]} is nested too deeply")
    if isinstance(value, str):
        if len(value) > longest or not _is_encodable(value):
            refuse(name, value, f"a text of Unicode of at most {longest:,} characters")
    elif isinstance(value, dict):
        for key, part in value.items():
            if len(key) > LONGEST_NAME or not _is_encodable(key):
                refuse(f"a name in {name}", key, f"of at most {LONGEST_NAME} characters")
            check_plain(key, part, deepest=deepest - 1, longest=longest)
    elif isinstance(value, list):
        for part in value:
            check_plain(name, part, deepest=deepest - 1, longest=longest)
    elif isinstance(value, int) and not -MOST_COUNT <= value <= MOST_COUNT:
        refuse(name, value, f"at most {MOST_COUNT}")
    elif isinstance(value, float) and not abs(value) < float("inf"):
        refuse(name, value, "a finite number")
    elif not isinstance(value, int | float | None):
        refuse(name, value, "a value that JSON has")


def _is_encodable(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
