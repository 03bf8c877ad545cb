"""Columns of data: which are text and target, and which hold numbers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrolora.cli.numerals import is_not_finite, is_number
from pyrolora.cli.readers import TEXT_TABLES
from pyrolora.cli.reading import read_data
from pyrolora.columns import PICTURE_PATHS, PICTURES, SOUND_PATHS, SOUNDS
from pyrolora.errors import ConfigError, DataError

if TYPE_CHECKING:
    import datasets

LABELS = ("label", "labels")
CHOICES = "choices"
PAIR = ("text", "text_pair")
MEDIA = (*PICTURES, *SOUNDS, *PICTURE_PATHS, *SOUND_PATHS)
"""Names that say that a column has pictures or sounds; it keeps them."""


def labelled(
    source: str,
    split: str | None,
    defaults: Sequence[str],
    text: Sequence[str],
    label: str | None,
    names: Collection[str] = (),
) -> datasets.Dataset:
    """Read data, choose their columns, and turn labels into numbers (`as_told`)."""
    data = with_columns(read_data(source, split, defaults), text, label, source)
    return as_told(data, source, names)


def with_columns(
    data: datasets.Dataset, text: Sequence[str], label: str | None, source: str
) -> datasets.Dataset:
    """Return data with the chosen columns under the names that `pyrolora.fit` knows.

    ``text`` names the column with the text or the chat, or the two with a pair; ``label`` that of
    the target; ``translation.en`` is a part of a column of objects. With ``text`` no other column
    is an input, except ``choices``, which belong to it; with ``label`` no other column is the
    target.
    """
    if len(text) > 2 or len(set(text)) < len(text):
        raise ConfigError(f"--text takes one column, or the two of a pair; got {list(text)}")
    wanted = (*text, *([] if label is None else [label]))
    if any("." in name and name not in data.column_names for name in wanted):
        data = data.flatten()  # of a column of dicts, as translation.en
    for name in wanted:
        if name not in data.column_names:
            raise DataError(f"{source} has no column {name!r}; it has {data.column_names}")
    names: Sequence[str] = PAIR
    if len(text) == 1:
        chat = _is_chat(data.features[text[0]])
        names = ("messages",) if chat else text if text[0] in MEDIA else PAIR
    new = dict(zip(text, names, strict=False))
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


def _is_chat(feature: Any) -> bool:
    """Return whether a column holds lists of messages."""
    part = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return isinstance(part, dict)


def _is_nested(feature: Any) -> bool:
    """Return whether a column holds lists or objects."""
    return isinstance(feature, list | dict) or hasattr(feature, "feature")


def as_told(data: datasets.Dataset, source: str, names: Collection[str]) -> datasets.Dataset:
    """Turn the labels of a CSV or TSV file into numbers, if all of them are.

    They stay text if one of them is in ``names``, which are those of known classes.
    """
    if Path(source).suffix.lower() not in TEXT_TABLES or label_names(data) & {*names}:
        return data
    return numbers_as_numbers(data)


def label_names(data: datasets.Dataset) -> set[str]:
    """Return the labels that are text."""
    return {
        cell
        for name in LABELS
        if "string" in getattr(data.features.get(name), "dtype", "")  # lists have none
        for cell in data.unique(name)
        if isinstance(cell, str)
    }


def numbers_as_numbers(data: datasets.Dataset) -> datasets.Dataset:
    """Turn a text column of labels into whole or real numbers, if every label is a number.

    The columns of CSV files are text. NaN and infinity count as numbers beside other numbers.
    """
    for name in LABELS:
        cells = data[name][:] if name in data.column_names else []
        filled = [cell for cell in cells if cell is not None]
        if not filled or not all(isinstance(cell, str) for cell in filled):
            continue
        rest = [cell for cell in filled if not is_number(cell.strip())]
        if len(rest) == len(filled) or not all(is_not_finite(cell.strip()) for cell in rest):
            continue  # these are names, though Python would read 'nan' and '1_0' as numbers
        for kind in (int, float):
            try:
                values = [None if cell is None else kind(cell) for cell in cells]
            except ValueError:
                continue
            return data.remove_columns(name).add_column(name, values)
    return data


def _numbers_apart(data: datasets.Dataset, targets: Collection[str | None]) -> datasets.Dataset:
    """Turn the columns of numbers in a table of text into numbers, which are no text to read.

    A table of numbers alone stays as it is.
    """
    columns = {
        name: data[name][:]
        for name, feature in data.features.items()
        if name not in targets and not _is_nested(feature)
    }
    numbers = [
        name
        for name, cells in columns.items()
        if any(cells) and all(cell is None or is_number(cell.strip()) for cell in cells)
    ]
    if len(numbers) == len(columns):
        return data
    for name in numbers:
        values = [None if cell is None else float(cell) for cell in columns[name]]
        data = data.remove_columns(name).add_column(name, values)
    return data
