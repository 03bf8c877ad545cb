"""Tables for people and other programs: written to a file, or printed as CSV."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrolora.cli.numerals import is_not_finite, is_number
from pyrolora.errors import ConfigError
from pyrolora.files import replacing
from pyrolora.visible import visible

if TYPE_CHECKING:
    import pandas as pd

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


def writer(path: Path) -> Callable[[pd.DataFrame], None]:
    """Return the function that writes a table to ``path``, in the format of its name."""
    writers: dict[str, Callable[[pd.DataFrame, Path], None]] = {
        ".csv": lambda table, file: _write_csv(table, file, ","),
        ".tsv": lambda table, file: _write_csv(table, file, "\t"),
        ".jsonl": lambda table, file: table.to_json(
            file, orient="records", lines=True, date_format="iso"
        ),
        ".parquet": lambda table, file: table.convert_dtypes().to_parquet(file, index=False),
    }
    kind = path.suffix.lower()
    if kind not in writers:
        raise ConfigError(f"cannot tell the format of {path}; name it {', '.join(writers)}")
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {path.parent} to write {path.name} to")

    def write(table: pd.DataFrame) -> None:
        with replacing(path) as scratch:
            writers[kind](table, scratch)

    return write


def _write_csv(table: pd.DataFrame, file: Path, delimiter: str) -> None:
    made = inert(table)
    # Python's csv does not quote a carriage return, which would begin a row for its readers.
    returns = any(isinstance(c, str) and "\r" in c for c in made.to_numpy(dtype=object).flat)
    quoting = csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL
    made.to_csv(file, index=False, sep=delimiter, quoting=quoting)


def print_table(table: pd.DataFrame) -> None:
    """Print a table as CSV that neither a terminal nor a spreadsheet runs."""
    made = inert(table)
    made.columns = [visible(str(name)) for name in made.columns]
    for name, column in made.items():
        if str(column.dtype) in ("object", "str", "string", "category"):
            made[name] = column.map(lambda cell: visible(cell) if isinstance(cell, str) else cell)
    made.to_csv(sys.stdout, index=False)


def inert(table: pd.DataFrame) -> pd.DataFrame:
    """Return a copy in which a spreadsheet finds no formulas.

    An apostrophe stands before each text, and column name, that would be one. Numbers stay, also
    those that are text. Lists and objects become JSON.
    """
    made = table.rename(columns={name: _inert(name) for name in table.columns})
    for place, dtype in enumerate(made.dtypes):
        if str(dtype) in ("object", "str", "string", "category"):
            made.isetitem(place, made.iloc[:, place].astype(object).map(_inert))
    return made


def _inert(cell: Any) -> Any:
    if isinstance(cell, list | dict):
        return json.dumps(cell, ensure_ascii=False, default=str)
    if not isinstance(cell, str) or not cell.startswith(FORMULA_STARTS):
        return cell
    return cell if is_number(cell) or is_not_finite(cell) else f"'{cell}"
