"""Checks of the arguments of plots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyrolora.checks import text_or_none
from pyrolora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def check_axes(ax: Axes, label: str | None = None) -> None:
    """Raise `ConfigError` unless a plot can be drawn on ``ax``, under this label."""
    from matplotlib.axes import Axes

    if not isinstance(ax, Axes):
        advice = "pass one of them" if isinstance(ax, Iterable) else "figure, ax = plt.subplots()"
        raise ConfigError(f"ax must be matplotlib axes, got {ax!r:.60}; {advice}")
    text_or_none("label", label)


def check_history(history: Any) -> None:
    """Raise `ConfigError` unless ``history`` is a list of mappings."""
    if not isinstance(history, list | tuple) or not all(isinstance(e, Mapping) for e in history):
        raise ConfigError(
            f"history must be the log of a fit, posterior.history, got {history!r:.60}"
        )


def numbers(name: str, values: Any, shape: str) -> np.ndarray:
    """Return real numbers as an array.

    Parameters
    ----------
    name
        The name of the argument.
    values
        What was passed for it.
    shape
        The shape that it must have, such as ``"(n, C)"``.

    Raises
    ------
    DataError
        For anything else.
    """
    values = values.detach().cpu() if isinstance(values, torch.Tensor) else values
    try:
        found = np.asarray(values)
    except (TypeError, ValueError, OverflowError):
        found = np.asarray(None)
    if found.dtype.kind not in "biuf" or found.ndim != 1 + shape.count(", "):
        raise DataError(f"{name} must be numbers of the shape {shape}, got {values!r:.60}")
    return found
