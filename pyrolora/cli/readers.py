"""Files of data: one reader per format, which gives rows of plain values."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrolora.errors import DataError

if TYPE_CHECKING:
    import datasets

KINDS = ".jsonl, .json, .csv, .tsv, .parquet, .txt (one text per line)"
TEXT_TABLES = (".csv", ".tsv")
"""Formats whose cells are all text."""
MAX_CELL = 2**31 - 1
"""Most characters of a cell; the csv module's default is shorter than a book."""


def _csv(path: Path, delimiter: str = ",") -> list[dict[str, Any]]:
    """Read a table whose cells are text; an empty one is None."""
    csv.field_size_limit(MAX_CELL)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ValueError(f"the header names a column twice: {header}")
        rows = []
        for cells in reader:
            if len(cells) != len(header):
                raise ValueError(
                    f"line {reader.line_num} has {len(cells)} cells, the header {len(header)}"
                )
            rows.append(dict(zip(header, (cell or None for cell in cells), strict=True)))
    return rows


def _structured(name: str, cells: list[str | None]) -> list[Any]:
    """Return the lists or objects that the cells of a column are, if all of them are such JSON.

    Raises
    ------
    ValueError
        For lists and objects as Python prints them, which are no JSON.
    """
    filled = [cell.strip() for cell in cells if cell is not None]
    if not filled or not all(cell.startswith(("[", "{")) for cell in filled):
        return cells
    try:
        return [None if cell is None else json.loads(cell) for cell in cells]
    except ValueError:
        if all(cell.startswith(("['", '["', "[{", "{'", '{"')) for cell in filled):
            raise ValueError(
                f"the column {name!r} holds lists or objects that are no JSON, such as "
                f"{filled[0]:.30}; write the cells with json.dumps, or the data as .jsonl"
            ) from None
        return cells


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                rows.append(_object(json.loads(line)))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    return rows


def _json(path: Path) -> list[dict[str, Any]]:
    """Read a list of objects, or one object per line."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        return _json_lines(path)
    return [_object(row) for row in json.loads(text)]


def _object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with named fields, got {str(row)[:40]!r}")
    return row


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [{"text": line.removesuffix("\r")} for line in lines if line.strip()]


def _parquet(path: Path) -> list[dict[str, Any]]:
    from pyarrow import parquet

    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows


READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": lambda path: _csv(path, "\t"),
    ".parquet": _parquet,
    ".txt": _lines,
}


def read_file(path: Path) -> datasets.Dataset:
    """Return the data of a file.

    Raises
    ------
    DataError
        When its name does not say what it is, it is not readable as that, or it has no rows.
    """
    import datasets
    import pyarrow

    kind = path.suffix.lower()
    if kind not in READERS:
        raise DataError(f"cannot tell what {path} is; the name of a data file ends in {KINDS}")
    try:
        rows = READERS[kind](path)
        names = list(dict.fromkeys(name for row in rows for name in row))
        columns = {name: [row.get(name) for row in rows] for name in names}
        if kind in TEXT_TABLES:
            columns = {name: _structured(name, cells) for name, cells in columns.items()}
        data = datasets.Dataset.from_dict(columns)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not encoded in UTF-8; convert it first") from error
    except (pyarrow.ArrowException, ValueError, TypeError, csv.Error, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not readable as {kind[1:]}: {reason[:200]}") from error
    if not rows or not names:
        raise DataError(f"the file {path} has no rows")
    return data
