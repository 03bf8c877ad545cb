"""Checks of the values of options; each raises `ConfigError`."""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

from pyrolora.errors import ConfigError

LARGEST = 2**31 - 1
"""The largest number of anything that there is to be memory for."""
SINGLE = (2.0**-126, (2 - 2.0**-23) * 2.0**127)
"""The smallest and the largest normal number of single precision."""


def whole_number(name: str, value: Any, *, at_least: int, at_most: float = LARGEST) -> None:
    """Raise `ConfigError` unless ``value`` is a whole number from ``at_least`` to ``at_most``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < at_least:
        raise ConfigError(f"{name} must be a whole number >= {at_least}, got {value!r}")
    if int(value) > at_most:
        raise ConfigError(f"{name} must be at most {at_most}, got {value!r}")


def positive(name: str, value: Any, *, or_zero: bool = False) -> None:
    """Raise `ConfigError` unless ``value`` is a finite number > 0 (or 0, where that is allowed).

    Fits compute in single precision, in which numbers outside of `SINGLE` are zero or infinite.
    """
    if not _is_number(value) or not _is_finite(value) or value < 0 or (value == 0 and not or_zero):
        expected = ">= 0" if or_zero else "> 0"
        raise ConfigError(f"{name} must be a finite number {expected}, got {value!r}")
    if value != 0 and not SINGLE[0] <= value <= SINGLE[1]:
        raise ConfigError(
            f"{name} must be a number that single precision holds, from {SINGLE[0]:.2g} to "
            f"{SINGLE[1]:.2g}, got {value!r}"
        )


def share(name: str, value: Any, within: str) -> None:
    """Raise `ConfigError` unless ``value`` is a number in ``within``.

    That is ``"(0, 1)"``, with a square bracket where an end belongs to it.
    """
    lowest, highest = within[0] == "[", within[-1] == "]"
    inside = _is_number(value) and (
        0 < value < 1 or (value == 0 and lowest) or (value == 1 and highest)
    )
    if not inside:
        raise ConfigError(f"{name} must be a number in {within}, got {value!r}")


def true_or_false(name: str, value: Any) -> None:
    """Raise `ConfigError` unless ``value`` is a boolean: any text would count as true."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {value!r}")


def path_like(name: str, value: Any) -> None:
    """Raise `ConfigError` unless ``value`` is a text or a `pathlib.Path`."""
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(f"{name} must be a path, a text or a pathlib.Path, got {value!r:.60}")


def text_or_none(name: str, value: Any) -> None:
    """Raise `ConfigError` unless ``value`` is a text or None."""
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{name} must be a text or None, got {value!r:.60}")


def is_listed(value: Any) -> bool:
    """Return whether a value is a collection; arrays and tensors of no dimension only look so."""
    return isinstance(value, Collection) and getattr(value, "ndim", 1) > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number or a fraction that no float holds
        return False


def one_of(name: str, value: Any, choices: Any) -> None:
    """Raise `ConfigError` unless ``value`` is one of ``choices``, a ``Literal`` or a collection."""
    allowed = literals(choices) or tuple(choices)
    if not any(
        value is choice or (type(value) is type(choice) and value == choice) for choice in allowed
    ):
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def is_redefined(old: type, new: type) -> bool:
    """Return whether ``new`` is the class ``old``, or the same statement run again (a notebook)."""
    return (old.__module__, old.__qualname__) == (new.__module__, new.__qualname__)


def check_choices(options: Any) -> None:
    """Raise `ConfigError` unless each choice among the options holds a value of its type.

    Choices are the fields of the dataclass that are annotated with ``Literal``, or with
    ``Literal | None``.
    """
    hints = typing.get_type_hints(type(options))
    for field in dataclasses.fields(options):
        if literals(hints[field.name]):
            one_of(field.name, getattr(options, field.name), hints[field.name])


def literals(hint: Any) -> tuple[Any, ...]:
    """Return the values that a ``Literal``, or a ``Literal | None``, allows; () for other types."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return arguments
    if origin in (typing.Union, types.UnionType):
        parts = [literals(part) for part in arguments if part is not type(None)]
        if len(parts) == 1 and parts[0] and len(arguments) == 2:
            return (*parts[0], None)
    return ()
