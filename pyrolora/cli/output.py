"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def program() -> str:
    """What to type for this program: its path, where an environment is not activated."""
    path = Path(sys.executable).with_name("pyrolora")
    if shutil.which("pyrolora") == str(path):
        return "pyrolora"
    inside = path.is_relative_to(Path.cwd())
    return shlex.quote(str(path.relative_to(Path.cwd()) if inside else path))


def print_json(result: Mapping[str, Any]) -> None:
    """Print a result as one JSON object."""
    from pyrolora.storage import as_json

    print(as_json(result), end="")


def metrics_table(
    columns: Mapping[str, Mapping[str, float]], notes: Mapping[str, str] | None = None
) -> None:
    """Print a table: a row a metric, a column for each of what is compared, and a note."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", *columns, *([""] if notes else []))
    for name in dict.fromkeys(name for metrics in columns.values() for name in metrics):
        numbers = (_number(metrics.get(name)) for metrics in columns.values())
        table.add_row(name.replace("_", " "), *numbers, *([notes.get(name, "")] if notes else []))
    Console().print(table)


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
