"""Output of commands: tables for people, JSON for programs."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyrolora.visible import visible


def program() -> str:
    """Return the name to type for this program; its path, if no environment is activated."""
    path = Path(sys.executable).with_name("pyrolora")
    if shutil.which("pyrolora") == str(path):
        return "pyrolora"
    inside = path.is_relative_to(Path.cwd())
    return shlex.quote(str(path.relative_to(Path.cwd()) if inside else path))


def tell(text: str) -> None:
    """Print text, with control characters of a terminal made visible."""
    print(visible(text))


def say(message: str) -> None:
    """Print a line about progress to standard error."""
    print(visible(message), file=sys.stderr, flush=True)


def print_json(result: Mapping[str, Any]) -> None:
    """Print a result as one JSON object."""
    from pyrolora.storage import as_json

    print(as_json(result), end="")


def metrics_table(
    columns: Mapping[str, Mapping[str, float]], notes: Mapping[str, str] | None = None
) -> None:
    """Print a table with one row per metric, one column per posterior, and a note."""
    import pandas as pd
    from rich.console import Console

    from pyrolora.report import as_table

    Console().print(as_table(pd.DataFrame.from_dict(columns, orient="index"), notes))
