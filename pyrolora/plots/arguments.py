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


def numbers(name: str, values: Any, shape: str, *, finite: bool = True) -> np.ndarray:
    """Return real numbers as an array.

    Parameters
    ----------
    name
        The name of the argument.
    values
        What was passed for it.
    shape
        The shape that it must have, such as ``"(n, C)"``.
    finite
        Whether NaN and infinity, which a plot would leave out, are refused.

    Raises
    ------
    DataError
        For anything else.
    """
    plain = values
    if isinstance(values, torch.Tensor):
        plain = values.detach().cpu()
        plain = plain.float() if plain.dtype == torch.bfloat16 else plain  # NumPy has none
    try:
        found = np.asarray(plain)
    except (TypeError, ValueError, OverflowError):
        found = np.asarray(None)
    if found.dtype.kind not in "biuf" or found.ndim != 1 + shape.count(", "):
        raise DataError(f"{name} must be numbers of the shape {shape}, got {values!r:.60}")
    if finite and not np.isfinite(found).all():
        missing = int((~np.isfinite(found)).sum())
        raise DataError(
            f"{name} must be finite, got NaN or infinity in {missing} of {found.size} numbers; "
            "leave these examples out"
        )
    return found
