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


def as_table(frame: pd.DataFrame, notes: Mapping[str, str] | None = None) -> Table:
    """Return a comparison as a rich table: one row per metric, one column per posterior.

    ``rich.print(as_table(pyrolora.compare({...}, data)))`` shows it.

    Parameters
    ----------
    frame
        One row per posterior, one column per metric.
    notes
        Metric -> a note beside it.
    """
    from rich.table import Table

    table = Table("")
    for name in [*frame.index, *([""] if notes else [])]:
        table.add_column(_plain(name))
    for name in frame.columns:
        numbers = map(_number, frame[name])
        note = [notes.get(name, "")] if notes else []
        table.add_row(_plain(str(name).replace("_", " ")), *numbers, *note)
    return table


def _plain(name: object) -> Text:
    """Return a name that neither rich reads as markup nor a terminal as a command."""
    from rich.text import Text

    return Text(visible(str(name)))


def _number(value: float) -> str:
    """Format a number with three digits; "-" where there is none."""
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
