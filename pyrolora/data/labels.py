"""Labels of a data set, the names of their classes, and the numbers of these names."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn

from pyrolora.columns import IGNORED, INPUTS, LABELS
from pyrolora.data.examples import (
    TensorExamples,
    as_dict,
    as_numbers,
    first_of,
    is_plain,
    is_text,
    unformatted,
)
from pyrolora.data.target import Target
from pyrolora.errors import DataError


def raw_labels(examples: Any) -> Tensor:
    """Return the labels of training examples, before any network is known."""
    if len(examples) == 0:
        raise DataError("the data is empty: it has 0 examples")
    labels = all_labels(examples, lambda example: as_dict(example, INPUTS))
    if labels is None:
        raise DataError(no_labels([*first_of(examples, INPUTS)]))
    return labels


LABEL = "a column 'labels' or 'label'"


def no_labels(columns: Collection[str], expected: str = LABEL) -> str:
    """Return the message for examples without labels, whose parts have these names."""
    remedy = "add what is missing, or rename the columns that have it (data.rename_column)"
    if "'label'" in expected:
        remedy = (
            "rename the target column, for example data.rename_column('target', 'label') "
            "(--label target on the command line)"
        )
    return f"the data has no labels: expected {expected}, got {sorted(columns)}; {remedy}"


def class_names(examples: Any, least: int = 2) -> list[str] | None:
    """Return the names of the classes of training examples; None where labels are numbers.

    They are those of a ``ClassLabel``, or the labels themselves, sorted, if they are strings.

    Raises
    ------
    DataError
        For fewer classes than ``least``.
    """
    column = _label_column(examples)
    if column is None:
        return None
    feature = examples.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names = list(feature.names)
    elif is_text(feature):
        unique = {str(name) for name in examples.unique(column) if name is not None}
        _check_joined(unique)
        names = sorted(unique, key=int if all(map(str.isdecimal, unique)) else None)
    else:
        return None
    if len(names) < least:
        raise DataError(f"a classification needs two classes, and all labels are {names}")
    return names


def _check_joined(names: set[str]) -> None:
    """Raise `DataError` for a label that joins others, as 'rude,false' does 'rude' and 'false'."""
    for name in sorted(names):
        pieces = [piece.strip() for piece in re.split(r"[,;|]", name)]
        if len(pieces) > 1 and names.issuperset(pieces):
            raise DataError(
                f"the label {name!r} is a class of its own, or the labels {pieces}, which are "
                "classes of the data, too; for several labels per example give each a list of "
                "names (task='multi-label-classification'); if it is a class, give it a name "
                "without ',', ';' and '|'"
            )


def has_class_numbers(examples: Any) -> bool:
    """Return whether the labels are numbers that have names."""
    column = _label_column(examples)
    return column is not None and isinstance(examples.features[column], datasets.ClassLabel)


def has_names(examples: Any, classes: Collection[str]) -> bool:
    """Return whether labels are names, or numbers with some of the names of these classes."""
    if not isinstance(examples, datasets.Dataset):
        return False
    column = _label_column(unformatted(examples))
    feature = None if column is None else examples.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return not {*map(plain_name, classes)}.isdisjoint(map(plain_name, feature.names))
    return is_text(feature)


def has_class_labels(examples: Any) -> bool:
    """Return whether there is one label per example, not one per token."""
    if is_plain(examples):
        column = _label_column(examples)
        return column is not None and not isinstance(
            examples.features[column], datasets.Sequence | datasets.List | datasets.LargeList
        )
    label = first_of(examples, INPUTS).get(LABELS) if len(examples) else None
    return label is not None and np.ndim(label) == 0


def _label_column(examples: Any) -> str | None:
    if not is_plain(examples):
        return None
    return next((name for name in (LABELS, "label") if name in examples.column_names), None)


def numbered(data: datasets.Dataset, network: nn.Module, task: Target) -> datasets.Dataset:
    """Return the data with the numbers of the classes in place of names, or of other numbers.

    The labels are names, or numbers of names in another order than that of the classes. The classes
    are those of the network, or of the fit, for a network without names.

    Raises
    ------
    DataError
        For names of no class, and for labels with two readings.
    """
    stored = unformatted(data)
    column = _label_column(stored)
    classes = class_names_of(network, task) or _made_up_names(network)
    if column is None or not classes:
        return data
    feature = data.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names = list(feature.names)
    elif isinstance(feature, datasets.Value) and feature.dtype == "bool":
        answers = {*map(plain_name, classes.values())} == {"no", "yes"}
        names = ["no", "yes"] if answers else ["False", "True"]
    elif is_plain(data) and is_text(feature):
        names = [str(name) for name in stored.unique(column) if name is not None]
    else:
        if is_plain(data) and isinstance(feature, datasets.Value):
            _check_digits(stored.unique(column), classes)
        return data  # numbers; or a transform that may turn texts into numbers by itself
    numbers = _numbers(names, classes)
    if numbers:
        _check_ids(network)
    if is_text(feature):
        if _unnamed(classes.values()) and not numbers:
            return data  # a network without names says nothing of them
    elif not _say_something(names, numbers, classes):
        return data
    rows = [_name(row, feature, names) for row in stored[column]]
    unknown = sorted({name for name in rows if name is not None and name not in numbers})
    if unknown:
        raise DataError(_unknown_name(unknown[0], classes, None if is_text(feature) else names))
    mapped = [None if name is None else numbers[name] for name in rows]
    return with_column(data, column, mapped)


def with_column(data: datasets.Dataset, column: str, rows: list[Any]) -> datasets.Dataset:
    """Return the data with these rows in place of a column's, in the format of the data."""
    form = data.format
    made = data.with_format(None).remove_columns(column).add_column(column, rows)
    kind, columns, rest = form["type"], form["columns"], form["output_all_columns"]
    return made.with_format(kind, columns, rest, **form["format_kwargs"])


def _name(row: Any, feature: Any, names: list[str]) -> str | None:
    """Return the name of a label; None where it is missing."""
    if row is None or (not isinstance(row, str | bool) and row < 0):
        return None
    return row if is_text(feature) else names[int(row)]


def _say_something(names: list[str], numbers: dict[str, int], classes: dict[int, str]) -> bool:
    """Return whether names and numbers of the labels disagree about the classes."""
    if [numbers.get(name) for name in names] == list(range(len(names))):
        return False
    if names in (["False", "True"], [str(i) for i in range(len(names))]) or _unnamed(names):
        return bool(numbers)  # they are their numbers
    return bool(numbers) or not _unnamed(classes.values())


def _numbers(names: Collection[str], classes: dict[int, str]) -> dict[str, int]:
    """Return the class of each name that a class has.

    Case, spaces, '-' and '_' do not matter, unless only they tell two classes apart.
    """
    plain = {plain_name(name): number for number, name in classes.items()}
    exact = {name: number for number, name in classes.items()}
    if len(plain) < len(classes):
        return {name: exact[name] for name in names if name in exact}
    return {name: plain[plain_name(name)] for name in names if plain_name(name) in plain}


def plain_name(name: str) -> str:
    """Return a name without case, spaces, '-' and '_'."""
    return re.sub(r"[\s_-]+", "", str(name)).casefold()


def _unknown_name(name: str, classes: dict[int, str], names: list[str] | None) -> str:
    """Return the message for a label with the name of no class.

    ``names`` are those of labels that are numbers, and could be meant as numbers.
    """
    known = sorted(classes.values())
    if names is None:
        return (
            f"the label {name!r} is none of the network's classes, {known}; rename it, or leave "
            "such examples out"
        )
    return (
        f"the label {name!r} is none of the network's classes, {known}. By number the data's "
        f"classes would be {_pairs(dict(enumerate(names)), classes)}; by name they are others. "
        "Rename them with data.cast_column('label', datasets.ClassLabel(names=[...])), or load the "
        f"network with id2label={dict(enumerate(names))}"
    )


def _pairs(first: dict[int, str], second: dict[int, str]) -> str:
    return ", ".join(f"{first[i]!r} = {second[i]!r}" for i in first if i in second)


def _check_digits(rows: list[Any], classes: dict[int, str]) -> None:
    """Raise `DataError` for numbers that are names of other classes: 1 to 5 stars, for example."""
    if not all(name.isdecimal() for name in classes.values()):
        return
    names = {int(name): number for number, name in classes.items()}
    used = [row for row in rows if isinstance(row, int)]
    if (
        used
        and any(names.get(row, row) != row for row in used)
        and all(row in names and row in classes for row in used)
    ):
        raise DataError(
            f"the labels {sorted(used)} are numbers, and the network's classes are called "
            f"{classes}: a label is the number of a class or its name; give them names, with "
            "data.cast_column('label', datasets.ClassLabel(names=[...])), or make them strings"
        )


def _check_ids(network: nn.Module) -> None:
    """Raise `DataError` where the network's two tables of names disagree."""
    config = getattr(network, "config", None)
    table = {str(name): int(i) for name, i in (getattr(config, "label2id", None) or {}).items()}
    names = network_classes(network)
    if table and names and not _unnamed(table) and table != {n: i for i, n in names.items()}:
        raise DataError(
            f"the network's config has id2label={names} and label2id={table}, which disagree, and "
            "the labels are names; set both alike"
        )


def known_names(examples: Any, network: nn.Module, task: Target) -> list[str] | None:
    """Return the names of the classes that a fit takes over from its data.

    They are those of numbered classes, where neither the network nor an earlier fit has names.
    """
    feature = examples.features.get(_label_column(unformatted(examples)) or "")
    named = isinstance(feature, datasets.ClassLabel) and not _unnamed(feature.names)
    if not named or class_names_of(network, task):
        return None
    count = getattr(getattr(network, "config", None), "num_labels", None) or len(feature.names)
    rest = [f"LABEL_{i}" for i in range(len(feature.names), count)]
    return [*feature.names, *rest][:count]


def network_classes(network: nn.Module) -> dict[int, str]:
    """Return the network's names of its classes, by number.

    There are none where transformers has made them up.
    """
    names = _made_up_names(network)
    return {} if _unnamed(names.values()) else names


def class_names_of(network: nn.Module, task: Target) -> dict[int, str]:
    """Return the names of the classes by number; none where neither network nor data have any.

    They are the network's, or those of the data that it was fitted to.
    """
    return network_classes(network) or dict(enumerate(task.class_names or ()))


def _made_up_names(network: nn.Module) -> dict[int, str]:
    """Return the names in the network's config, whoever made them up."""
    id2label = getattr(getattr(network, "config", None), "id2label", None) or {}
    return {int(number): str(name) for number, name in id2label.items()}


def _unnamed(ids: Collection[str]) -> bool:
    """Return whether these are the names that transformers makes up."""
    return set(ids) == {f"LABEL_{i}" for i in range(len(ids))}


def all_labels(
    examples: Any,
    as_row: Callable[[Any], Mapping[str, Any]],
    *,
    partly: bool = False,
    changed: bool = False,
    check: Callable[[Mapping[str, Any], int], None] | None = None,
) -> Tensor | None:
    """Return all labels, (n,), or (n, T) for sequences, with ragged ones filled with -100.

    None without labels, or, if ``partly`` is allowed, where some examples have none. ``changed``
    labels are those of the rows, not those of the data. ``check`` is given each row that is made
    for its labels, with its number.
    """
    if isinstance(examples, TensorExamples) and LABELS in examples.columns and not changed:
        return examples.columns[LABELS]
    if is_plain(examples) and LABELS in examples.column_names and not changed:
        rows = list(unformatted(examples)[LABELS])
    elif LABELS not in as_row(examples[0]):
        return None
    else:
        rows = []
        for i in range(len(examples)):
            row = as_row(examples[i])
            if check is not None:
                check(row, i)
            rows.append(row.get(LABELS))
    missing = [i for i, row in enumerate(rows) if row is None]
    if missing and partly:
        return None
    if missing:
        raise DataError(f"{len(missing)} examples have no label, the first is example {missing[0]}")
    try:
        tensors = [as_numbers(row) for row in rows]
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"labels must be numbers, got {rows[0]!r}; map class names to 0..C-1, or give the "
            "network their names (config.id2label). (A regression has real numbers; several "
            "classes per example are task='multi-label-classification'.)"
        ) from error
    if tensors[0].dim() == 1:
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=IGNORED)
    return torch.stack(tensors)
