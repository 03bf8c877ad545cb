"""PEFT's rules by which names select modules, as PEFT 0.21 has them.

They are those of ``peft/utils/other.py`` and ``peft/tuners/tuners_utils.py``. Whoever passes an
expression says how it is matched: one that the user wrote by Python's ``re``, one that comes out
of a file by `pyrolora.peft.patterns.Patterns`, which takes bounded time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

from pyrolora.errors import ConfigError

N = TypeVar("N", int, float)


class Expressions(Protocol):
    """A matcher of regular expressions against dotted names."""

    def whole(self, pattern: str, name: str) -> bool:
        """Return whether the pattern matches the whole name."""

    def end(self, pattern: str, name: str) -> bool:
        """Return whether it matches the end of the name, from the start of one of its parts."""


class Python:
    """Python's own expressions, for those that the user wrote.

    Raises
    ------
    ConfigError
        For what is no regular expression.
    """

    def whole(self, pattern: str, name: str) -> bool:
        return self._match(pattern, pattern, name)

    def end(self, pattern: str, name: str) -> bool:
        return self._match(rf"(.*\.)?({pattern})", pattern, name)

    def _match(self, expression: str, pattern: str, name: str) -> bool:
        try:
            return re.fullmatch(expression, name) is not None
        except re.error as error:
            raise not_an_expression(pattern, error) from error


PYTHON = Python()


def selects(wanted: str | Iterable[str], name: str, expressions: Expressions = PYTHON) -> bool:
    """Apply the rule of ``target_modules`` and ``exclude_modules``.

    One string is an expression for the whole name; a list holds suffixes.
    """
    if isinstance(wanted, str):
        return expressions.whole(wanted, name)
    return ends_with(name, wanted)


def matches(name: str, wanted: str | Sequence[str]) -> bool:
    """Like `selects`, but one string may also be a suffix, as users expect."""
    return selects(wanted, name) or (isinstance(wanted, str) and ends_with(name, [wanted]))


def ends_with(name: str, suffixes: Iterable[str]) -> bool:
    """Return whether a name is one of the suffixes, or ends with one after a dot."""
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def is_saved(wanted: Iterable[str], name: str) -> bool:
    """Apply the rule of ``modules_to_save``: here a suffix need not follow a dot."""
    return any(name.endswith(suffix) for suffix in wanted)


def value_of(
    name: str, values: Mapping[str, N], default: N, expressions: Expressions = PYTHON
) -> N:
    """Apply the rule of ``rank_pattern`` and ``alpha_pattern``.

    The first key counts that, as an expression, matches the end of the name.
    """
    found = (value for key, value in values.items() if expressions.end(key, name))
    return next(found, default)


def block_of(name: str, behind: str | Sequence[str] | None) -> int | None:
    """Apply the rule of ``layers_to_transform``: return the number of a name's block.

    It is the first part of the name that is a number and has another part before it; with
    ``layers_pattern``, passed as ``behind``, a part of that name. None: the layer is in no block.
    """
    parts = [behind] if isinstance(behind, str) else behind
    for pattern in parts or [r"[^.]*"]:
        prefix = r".*?\." if not parts else r"(?:^|.*?\.)"
        try:
            found = re.match(rf"{prefix}{pattern}\.(\d+)\.", name)
        except re.error as error:
            raise not_an_expression(pattern, error) from error
        if found:
            return int(found[found.re.groups])
    return None


def not_an_expression(pattern: str, error: re.error) -> ConfigError:
    """Return the error for a pattern of the user's that does not parse."""
    return ConfigError(
        f"{pattern!r} is not a regular expression: {error}; correct it, or write the names of the "
        "modules as a list"
    )


def collapsed(names: Iterable[str]) -> list[str]:
    """Replace the numbers in names by '#', and return each result once, in order."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "#", n) for n in names))
