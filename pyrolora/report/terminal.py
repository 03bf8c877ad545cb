"""A comparison for the terminal."""

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
    """A comparison as a rich table: a row a metric, a column a posterior.

    ``rich.print(as_table(pyrolora.compare({...}, data)))`` shows it.

    Parameters
    ----------
    frame
        A row a posterior, a column a metric.
    notes
        Metric -> what is said beside it.
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
    """A name as it is: rich reads markup in texts, and a terminal what it cannot show."""
    from rich.text import Text

    return Text(visible(str(name)))


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
