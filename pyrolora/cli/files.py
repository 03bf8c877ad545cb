"""Data from files, folders and the hub; tables to files."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrolora.errors import ConfigError, DataError
from pyrolora.files import replacing
from pyrolora.visible import visible

if TYPE_CHECKING:
    import datasets
    import pandas as pd

KINDS = ".jsonl, .json, .csv, .tsv, .parquet, .txt (a text a line)"
LABELS = ("label", "labels")
CHOICES = "choices"
TEXT_TABLES = (".csv", ".tsv")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
MAX_CELL = 2**31 - 1  # characters; the csv module's own limit is less than a book


def read_data(source: str, split: str | None, defaults: Sequence[str]) -> datasets.Dataset:
    """The data set that a source holds.

    Parameters
    ----------
    source
        A file (`KINDS`), a folder written by ``save_to_disk``, or ``name`` or ``name:config`` of a
        data set on the hub.
    split
        Which split of a source that has several; None: the first of ``defaults`` that there is.

    Raises
    ------
    DataError, ConfigError
        In one line: no such file, no such split, not readable as what its name says.
    """
    path = Path(source)
    if path.is_dir():
        data = _from_folder(path)
    elif path.is_file():
        data = _from_file(path)
    elif path.suffix.lower() in _READERS or path.is_absolute() or source.startswith("."):
        raise DataError(f"there is no file {source!r} (seen from {Path.cwd()})")
    else:
        data = _from_hub(source)
    if not isinstance(data, dict):
        if split is not None:
            raise ConfigError(f"{source} has no splits; leave out --split {split}")
        return data
    names = defaults if split is None else [split]
    for name in names:
        if name in data:
            return data[name]
    raise ConfigError(
        f"{source} has no split {' or '.join(map(repr, names))}; it has {sorted(data)}: choose one "
        "with --split"
    )


def with_columns(
    data: datasets.Dataset, text: Sequence[str], label: str | None, source: str
) -> datasets.Dataset:
    """The data with the chosen columns under the names that `pyrolora.fit` knows.

    ``text`` names the column of the text, or the two of a pair; ``label`` that of the target. With
    ``text`` no other column is input, but for ``choices``, which belong to it; with ``label`` no
    other is the target.
    """
    if len(text) > 2 or len(set(text)) < len(text):
        raise ConfigError(f"--text takes one column, or the two of a pair; got {list(text)}")
    for name in (*text, *([] if label is None else [label])):
        if name not in data.column_names:
            raise DataError(f"{source} has no column {name!r}; it has {data.column_names}")
    new = dict(zip(text, ("text", "text_pair"), strict=False))
    if label in new:
        raise ConfigError(f"--text and --label are the same column, {label!r}")
    if label is not None:
        new[label] = "label"
    if not text and Path(source).suffix.lower() in TEXT_TABLES:
        data = _numbers_apart(data, {*LABELS, label})
    kept = [
        name
        for name in data.column_names
        if name in (*new, CHOICES) or (label is None if name in LABELS else not text)
    ]
    return data.select_columns(kept).rename_columns(
        {old: name for old, name in new.items() if old != name}
    )


def _numbers_apart(data: datasets.Dataset, targets: Collection[str | None]) -> datasets.Dataset:
    """A table of text whose columns of numbers are numbers, beside others that are text: they are
    no text to read."""
    columns = {name: data[name][:] for name in data.column_names if name not in targets}
    numbers = [
        name
        for name, cells in columns.items()
        if any(cells) and all(cell is None or _NUMBER.fullmatch(cell.strip()) for cell in cells)
    ]
    if len(numbers) == len(columns):
        return data
    for name in numbers:
        values = [None if cell is None else float(cell) for cell in columns[name]]
        data = data.remove_columns(name).add_column(name, values)
    return data


def labelled(
    source: str,
    split: str | None,
    defaults: Sequence[str],
    text: Sequence[str],
    label: str | None,
    names: Collection[str] = (),
) -> datasets.Dataset:
    """`read_data` in its chosen columns, its labels `as_told`."""
    data = with_columns(read_data(source, split, defaults), text, label, source)
    return as_told(data, source, names)


def as_told(data: datasets.Dataset, source: str, names: Collection[str]) -> datasets.Dataset:
    """The data with numbers for labels where a table of text, CSV or TSV, has numbers alone, and
    none of them is among ``names``, those of classes that are known."""
    if Path(source).suffix.lower() not in TEXT_TABLES or label_names(data) & {*names}:
        return data
    return numbers_as_numbers(data)


def label_names(data: datasets.Dataset) -> set[str]:
    """The labels that are text."""
    return {
        cell
        for name in LABELS
        if name in data.column_names
        for cell in data.unique(name)
        if isinstance(cell, str)
    }


def fingerprint(source: str, data: datasets.Dataset) -> str:
    """What tells whether the data is the same as at an earlier run."""
    path = Path(source)
    if path.is_file():
        with path.open("rb") as stream:
            return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()
    return f"datasets:{data._fingerprint}"


def writer(path: Path) -> Callable[[pd.DataFrame], None]:
    """What writes a table to a file, by the file's name."""
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
    # Python's csv does not quote a carriage return, which begins a row where the file is read.
    returns = any(isinstance(c, str) and "\r" in c for c in made.to_numpy(dtype=object).flat)
    quoting = csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL
    made.to_csv(file, index=False, sep=delimiter, quoting=quoting)


def print_table(table: pd.DataFrame) -> None:
    """Print a table as CSV, without effect on the terminal or on a spreadsheet."""
    made = inert(table)
    made.columns = [visible(str(name)) for name in made.columns]
    for name, column in made.items():
        if str(column.dtype) in ("object", "str", "string", "category"):
            made[name] = column.map(lambda cell: visible(cell) if isinstance(cell, str) else cell)
    made.to_csv(sys.stdout, index=False)


def inert(table: pd.DataFrame) -> pd.DataFrame:
    """A copy with an apostrophe before each text, a column's name too, that a spreadsheet would run
    as a formula; numbers stay, those that are text, too."""
    made = table.rename(columns={name: _inert(name) for name in table.columns})
    for place, dtype in enumerate(made.dtypes):
        if str(dtype) in ("object", "str", "string", "category"):
            made.isetitem(place, made.iloc[:, place].astype(object).map(_inert))
    return made


def _inert(cell: Any) -> Any:
    if not isinstance(cell, str) or not cell.startswith(FORMULA_STARTS):
        return cell
    is_number = _NUMBER.fullmatch(cell) or _NOT_FINITE.fullmatch(cell)
    return cell if is_number else f"'{cell}"


# Readers: rows of plain values, as they stand in the file ------------------------------------


def _csv(path: Path, delimiter: str = ",") -> list[dict[str, Any]]:
    """Every cell is text; an empty one is None."""
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
    """A list of objects, or an object a line."""
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


_READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": lambda path: _csv(path, "\t"),
    ".parquet": _parquet,
    ".txt": _lines,
}


def _from_file(path: Path) -> datasets.Dataset:
    import datasets
    import pyarrow

    kind = path.suffix.lower()
    if kind not in _READERS:
        raise DataError(f"cannot tell what {path} is; the name of a data file ends in {KINDS}")
    try:
        rows = _READERS[kind](path)
        names = list(dict.fromkeys(name for row in rows for name in row))
        columns = {name: [row.get(name) for row in rows] for name in names}
        data = datasets.Dataset.from_dict(columns)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not encoded in UTF-8; convert it first") from error
    except (pyarrow.ArrowException, ValueError, TypeError, csv.Error, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not readable as {kind[1:]}: {reason[:200]}") from error
    if not rows or not names:
        raise DataError(f"the file {path} has no rows")
    return data


def numbers_as_numbers(data: datasets.Dataset) -> datasets.Dataset:
    """A text column of labels turned to whole or real numbers, if every one is a number (NaN and
    infinity are, beside others): the columns of CSV files are text."""
    for name in LABELS:
        cells = data[name][:] if name in data.column_names else []
        filled = [cell for cell in cells if cell is not None]
        if not filled or not all(isinstance(cell, str) for cell in filled):
            continue
        rest = [cell for cell in filled if not _NUMBER.fullmatch(cell.strip())]
        if len(rest) == len(filled) or not all(
            _NOT_FINITE.fullmatch(cell.strip()) for cell in rest
        ):
            continue  # names, though Python would read 'nan' and '1_0' as numbers
        for kind in (int, float):
            try:
                values = [None if cell is None else kind(cell) for cell in cells]
            except ValueError:
                continue
            return data.remove_columns(name).add_column(name, values)
    return data


def _from_folder(path: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # damaged in any way
        raise DataError(
            f"the folder {path} holds no data set written by save_to_disk, or a damaged one; pass "
            f"such a folder, or a file ({KINDS})"
        ) from error


def _from_hub(source: str) -> Any:
    import datasets

    name, _, config = source.partition(":")
    try:
        return datasets.load_dataset(name, config or None)
    except Exception as error:  # of the network, the hub, the loader: whatever it is, it is no data
        reason = " ".join(str(error).split())
        raise DataError(
            f"{source!r} is no file or folder here, and no data set within reach: {reason[:200]}"
        ) from error
