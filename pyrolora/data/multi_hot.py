"""Several labels per example: lists of classes, lists of a 0 or 1 per class, a column per class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
from torch import nn

from pyrolora.columns import INPUTS, LABELS
from pyrolora.data.columns import TARGETS, check_two_labels, is_list
from pyrolora.data.examples import as_dict, is_plain, is_text
from pyrolora.data.labels import class_names_of, known_names, numbered, with_column
from pyrolora.data.target import Target
from pyrolora.errors import DataError

Reading = Literal["multi-hot", "classes"]
"""A 0 or 1 for each class; the numbers of an example's classes."""


LOOKED_AT = 100
"""The number of examples that show whether a list has a label per token."""


def flat_labels(examples: datasets.Dataset, column: str) -> datasets.Dataset | None:
    """Return the entries of a column of lists, one per row; None where they are no labels."""
    feature = getattr(examples.features[column], "feature", None)
    if not isinstance(feature, datasets.ClassLabel | datasets.Value):
        return None
    lists = examples.with_format("arrow", columns=[column])[:][column].combine_chunks()
    flat = lists.flatten()
    table = pa.table({LABELS: flat, "place": pa.array(range(len(flat)), pa.int64())})
    features = datasets.Features({LABELS: feature, "place": datasets.Value("int64")})
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))


def multi_hot(examples: Any, network: nn.Module, task: Target) -> tuple[Any, list[str] | None]:
    """Return the examples with a 0 or 1 per class as labels, and the names that data give classes.

    Only stored rows are converted. The classes are those of the network, or of the fit; names are
    matched as for one label per example.

    Raises
    ------
    DataError
        For labels that are no lists, lists with two readings or none, and unknown classes.
    """
    if not is_plain(examples):
        return examples, None
    examples = _gathered(examples, network, task)
    column = target_column(examples)
    if column is None or getattr(examples.features[column], "dtype", None) == "null":
        return examples, None
    check_lists(examples, column)
    flat = flat_labels(examples, column)
    if flat is None:
        return examples, None  # lists of lists, which the check of labels refuses
    feature, names = flat.features[LABELS], None
    stored = list(examples.with_format(None)[column])
    if not _is_bool(feature):
        names = known_names(flat, network, task)
        entries = iter(numbered(flat, network, task)[LABELS])
        stored = [None if row is None else [next(entries) for _ in row] for row in stored]
    width = getattr(getattr(network, "config", None), "num_labels", None) or len(names or ())
    width = width or len(class_names_of(network, task)) or None
    if secret(stored) or reading(stored, feature, width) == "multi-hot":
        rows = [None if row is None else [*map(float, row)] for row in stored]
    else:
        rows = [None if row is None else _hot(i, row, width) for i, row in enumerate(stored)]
    return with_column(examples, column, rows), names


def target_column(examples: Any) -> str | None:
    """Return the column of labels, if there is one."""
    if not is_plain(examples):
        return None
    if all(name in examples.column_names for name in TARGETS):
        check_two_labels(examples)
    return next((name for name in TARGETS if name in examples.column_names), None)


def check_lists(examples: datasets.Dataset, column: str) -> None:
    """Raise `DataError` for one label per example, or one text that joins several."""
    feature = examples.features[column]
    if is_list(feature):
        return
    how = "for one label per example use task='classification'"
    if is_text(feature):
        how += (
            "; names that are joined in one text become a list with data.map(lambda row: "
            f"{{{column!r}: row[{column!r}].split(',')}})"
        )
    raise DataError(
        "multi-label classification needs a list per example, of its classes or of a 0 or 1 per "
        f"class, got a column {column!r} of {feature}; {how}"
    )


def secret(rows: Sequence[Any]) -> bool:
    """Return whether all labels are -1, as in test splits whose labels are secret."""
    return {entry for row in rows for entry in row or ()} == {-1}


def reading(rows: Sequence[Any], feature: Any, width: int | None) -> Reading:
    """Return how lists of labels are to be read.

    Names, and numbers with names, are classes; booleans and real numbers say 0 or 1 per class.
    Whole numbers are a 0 or 1 per class where every list is as long as there are classes and has
    no other number; they are the numbers of classes where no list has one twice. ``width`` is
    the number of classes, None where any will do.

    Raises
    ------
    DataError
        For whole numbers that can be read in both ways, and lists that can be read in neither.
    """
    if is_text(feature) or isinstance(feature, datasets.ClassLabel):
        _check_numbered(rows)
        return "classes"
    given = [row for row in rows if row is not None]
    sizes = {len(row) for row in given}
    binary = {entry for row in given for entry in row} <= {0, 1}
    hot = binary and len(sizes) == 1 and width in (None, *sizes)
    real = feature.dtype.startswith(("float", "double", "decimal"))
    distinct = not real and not _is_bool(feature) and all(len({*r}) == len(r) for r in given)
    if hot and distinct:
        raise DataError(
            f"the labels of an example are {given[0]}, and all are like it, which has two "
            "readings: a 0 or 1 for each class, or the numbers of its classes; write the first as "
            "real numbers or booleans, [0.0, 1.0], and the second as names, or as "
            "datasets.List(datasets.ClassLabel(names=[...]))"
        )
    if hot:
        return "multi-hot"
    if distinct:
        return "classes"
    classes = "each as long as the others" if width is None else f"of {width} classes"
    wrong = next((row for row in given if {*row} - {0, 1} or len(row) != width), given[0])
    several = ""
    if not binary and real:
        several = "; several real targets per example are not supported, a regression has one"
    raise DataError(
        f"multi-label classification needs lists of a 0 or 1 per class ({classes}), or of the "
        f"numbers of the classes that an example has, none twice, got {wrong}{several}"
    )


def _check_numbered(rows: Sequence[Any]) -> None:
    """Raise `DataError` for names that the network has no number for."""
    name = next((entry for row in rows for entry in row or () if isinstance(entry, str)), None)
    if name is not None:
        raise DataError(
            f"the labels are names, such as {name!r}, and the network has no names for its "
            "classes; load it with id2label={0: ..., 1: ...}, or pass its name in place of the "
            "network"
        )


def _hot(example: int, row: Sequence[Any], width: int | None) -> list[float]:
    """Return a 0 or 1 per class for the numbers of an example's classes."""
    if width is None:
        raise DataError(
            f"the labels of example {example} are the classes {list(row)}, and the network does "
            "not say how many classes there are; give lists of a 0 or 1 per class"
        )
    wrong = [c for c in row if c is None or not 0 <= c < width]
    if wrong:
        raise DataError(
            f"the labels of example {example} are the classes {list(row)}, and the network has "
            f"{width}, from 0 to {width - 1}; load it with num_labels= as many as there are, or "
            "leave the others out"
        )
    return [float(c in row) for c in range(width)]


def _gathered(data: datasets.Dataset, network: nn.Module, task: Target) -> datasets.Dataset:
    """Return data with one column of lists in place of a column of 0 and 1 per class."""
    names = list(class_names_of(network, task).values())
    there = [name for name in names if _is_number(data.features.get(name))]
    if target_column(data) is not None or not there:
        return data
    if missing := [name for name in names if name not in there]:
        raise DataError(
            f"the data has a column of numbers for each of the classes {there}, and none for "
            f"{missing}; add them, or make one column 'labels' with the list of classes of each "
            "example"
        )
    stored = data.with_format(None)
    columns = [stored[name] for name in names]
    rows = [None if None in row else [*map(float, row)] for row in zip(*columns, strict=True)]
    made = data.remove_columns(names[1:]).rename_column(names[0], LABELS)
    return with_column(made, LABELS, rows)


def has_label_lists(examples: Any) -> bool:
    """Return whether the labels are a list per example, and not one per token.

    Labels of tokens are whole numbers, as many as there are tokens.
    """
    for i in range(min(len(examples), LOOKED_AT)):
        row = as_dict(examples[i], INPUTS)
        labels, ids = row.get(LABELS), row.get("input_ids")
        if labels is None or np.ndim(labels) > 1:
            continue
        kind = np.asarray(labels).dtype.kind
        if ids is None or kind not in "iu" or len(labels) != len(ids):
            return True
    return False


def indicator_columns(data: Any) -> list[str]:
    """Return the columns that have nothing but 0 and 1, or False and True."""
    if not is_plain(data):
        return []
    stored = data.with_format(None)
    names = [n for n in data.column_names if _is_number(data.features[n]) and n not in TARGETS]
    return [name for name in names if {*stored.unique(name)} <= {0, 1}]


def _is_bool(feature: Any) -> bool:
    return getattr(feature, "dtype", None) == "bool"


def _is_number(feature: Any) -> bool:
    """Return whether a column holds numbers or booleans, one per row."""
    return isinstance(feature, datasets.Value | datasets.ClassLabel) and feature.dtype.startswith(
        ("bool", "int", "uint", "float", "double")
    )
