"""A table of metrics for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pyrolora.visible import visible

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table
    from rich.text import Text

ERROR = "_se"
CHANCE = "_more_than_chance"


def as_table(frame: pd.DataFrame, notes: Mapping[str, str] | None = None) -> Table:
    """Return a comparison as a rich table: one row per metric, one column per posterior.

    ``rich.print(as_table(pyrolora.compare({...}, data)))`` shows it.

    Parameters
    ----------
    frame
        One row per posterior, one column per metric; standard errors stand beside their metrics.
    notes
        Metric -> a note beside it.
    """
    from rich.table import Table

    differ = [name for name in frame.columns if str(name).endswith(CHANCE)]
    caption = None
    if differ:
        caption = "± standard error over examples; * the difference is more than chance"
    elif any(_is_error(name, frame) for name in frame.columns):
        caption = "± standard error over examples"
    table = Table("", caption=caption, caption_justify="left")
    for name in [*frame.index, *([""] if notes else [])]:
        table.add_column(_plain(name))
    for name in frame.columns:
        if name in differ or _is_error(name, frame):
            continue
        note = [notes.get(name, "")] if notes else []
        table.add_row(_plain(str(name).replace("_", " ")), *_cells(frame, str(name)), *note)
    return table


def _is_error(name: object, frame: pd.DataFrame) -> bool:
    """Return whether a column has the standard errors of another."""
    return str(name).endswith(ERROR) and str(name).removesuffix(ERROR) in frame.columns


def _cells(frame: pd.DataFrame, name: str) -> list[str]:
    """Return the numbers of a metric, with their standard errors and marks, if there are any."""
    cells = [*map(_number, frame[name])]
    if name + ERROR in frame.columns:
        errors = map(_number, frame[name + ERROR])
        cells = [f"{cell} ± {error}" for cell, error in zip(cells, errors, strict=True)]
    chance = name.removesuffix("_difference") + CHANCE
    if name.endswith("_difference") and chance in frame.columns:
        marks = (" *" if mark else "" for mark in frame[chance] == True)  # noqa: E712
        cells = [cell + mark for cell, mark in zip(cells, marks, strict=True)]
    return cells


def _plain(name: object) -> Text:
    """Return a name that neither rich reads as markup nor a terminal as a command."""
    from rich.text import Text

    return Text(visible(str(name)))


def _number(value: float) -> str:
    """Format a number with three digits; "-" where there is none."""
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
