"""Exceptions of pyrolora: each says what was wrong, what was received, what to do."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any


class PyroLoraError(Exception):
    """Base of every error that pyrolora raises on purpose."""

    def __init__(self, *args: Any) -> None:
        # Pyro raises errors of a traced model anew, with a table of its sites below the text.
        super().__init__(*(_without_sites(arg) if isinstance(arg, str) else arg for arg in args))


class ConfigError(PyroLoraError, ValueError):
    """An option, or a combination of options, that cannot be used."""


class DataError(PyroLoraError, ValueError):
    """Data that cannot be trained or predicted on."""


class TargetError(PyroLoraError, LookupError):
    """A model in which the requested adapter targets cannot be found or wrapped."""


class UnknownNameError(PyroLoraError, LookupError):
    """A name that its registry does not hold."""


class BindingError(PyroLoraError, RuntimeError):
    """Adapted layers were run in a way that would silently use no, or the wrong, factors."""


class CheckpointError(PyroLoraError, ValueError):
    """A saved posterior that is damaged, or that belongs to another model or version."""


class SaveError(PyroLoraError, OSError):
    """A file that could not be written.

    Where a fit wanted it, ``posterior`` is the posterior, of the step at which that happened or of
    the finished fit; save it elsewhere. Otherwise it is None.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.posterior: Any = None


class NonFiniteError(PyroLoraError, ArithmeticError):
    """Training that met a NaN or an infinity, or a network that predicts nothing else.

    Training stops before the parameters are touched; ``posterior`` is then the usable posterior of
    the last good step, or None where there was none.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.posterior: Any = None


def listed(names: Collection[str], most: int | None = 4) -> str:
    """Return names for a message: ``most`` of them and the number of the rest; None: all."""
    shown = ", ".join(repr(name) for name in list(names)[:most])
    if most is not None and len(names) > most:
        return f"{shown} and {len(names) - most} more"
    return shown or "none"


def _without_sites(message: str) -> str:
    return re.split(r"\n\s*Trace Shapes:", message, maxsplit=1)[0]
