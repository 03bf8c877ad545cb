"""A comparison for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table


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

    table = Table("", *map(str, frame.index), *([""] if notes else []))
    for name in frame.columns:
        numbers = map(_number, frame[name])
        note = [notes.get(name, "")] if notes else []
        table.add_row(str(name).replace("_", " "), *numbers, *note)
    return table


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
