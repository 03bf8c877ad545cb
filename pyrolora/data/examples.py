"""Data in any form that is accepted, as examples with ``len`` and ``[i]``."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset
from torch.utils.data import Dataset as TorchDataset

from pyrolora.columns import INPUTS, LABELS, TAGS
from pyrolora.data.media.pictures import is_picture, stored
from pyrolora.errors import DataError

TABLES = ("pandas", "polars", "arrow")
"""Formats in which a row of a ``datasets.Dataset`` is a table in place of a dict."""


def as_examples(data: Any, input_name: str, splits: Sequence[str]) -> Any:
    """Return the data as something with ``len`` and ``[i]``."""
    if isinstance(data, DataLoader):
        return as_examples(data.dataset, input_name, splits)
    if isinstance(data, datasets.Dataset) and data.format["type"] in TABLES:
        return data.with_format(None, data.format["columns"])
    if isinstance(data, Subset) and isinstance(data.dataset, datasets.Dataset):
        return as_examples(data.dataset.select(data.indices), input_name, splits)
    if isinstance(data, datasets.DatasetDict):
        for split in splits:
            if split in data:
                return as_examples(data[split], input_name, splits)
        raise DataError(
            f"the DatasetDict has no split {' or '.join(map(repr, splits))}; it has "
            f"{sorted(data)}: pass one of them, as data['{next(iter(data), 'name')}']"
        )
    if isinstance(data, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise DataError(
            "a streamed data set is read in a fit alone (with num_examples= and max_steps), whose "
            "steps take what they need; make it a datasets.Dataset, for example with "
            "datasets.Dataset.from_list(list(data.take(n)))"
        )
    data = _texts_as_list(data)
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, Tensor):
        data = (data,)
    if isinstance(data, tuple):
        return _from_tuple(data, input_name)
    if isinstance(data, list):
        return _from_list(data, input_name)
    if isinstance(data, TensorExamples):
        return data
    if isinstance(data, str):
        raise DataError(
            f"one text is no data set; write it as a list: [{data[:40]!r}]. A file is read with "
            "datasets.Dataset.from_json or from_csv"
        )
    if is_picture(data):
        raise DataError("one picture is no data set; write it as a list: [picture]")
    indexable = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    indexable = indexable and getattr(data, "ndim", 1) != 0  # an array of one number looks so, too
    if indexable and not isinstance(data, str | bytes | Mapping) and not hasattr(data, "columns"):
        return data
    raise DataError(
        "data must be a datasets.Dataset or DatasetDict, a torch Dataset or DataLoader, a list of "
        f"dicts, texts or pictures, or a tuple of tensors, got {type(data).__name__}; a table of "
        "columns becomes one with datasets.Dataset.from_dict(...) or from_pandas(...)"
    )


def _texts_as_list(data: Any) -> Any:
    """Return a list for a column of texts, such as ``data["text"]`` of a ``datasets.Dataset``."""
    column = isinstance(data, datasets.Column | np.ndarray | pd.Series)
    rows = list(data) if column and getattr(data, "ndim", 1) > 0 else []
    return rows if rows and all(isinstance(row, str) for row in rows) else data


def _from_list(rows: list[Any], input_name: str) -> datasets.Dataset:
    column = _column_of(rows, input_name)
    if column is not None:
        return _stored({column: rows})
    if not all(isinstance(row, Mapping) for row in rows):
        kinds = sorted({type(row).__name__ for row in rows})
        raise DataError(f"a list must hold dicts or texts, or pictures, got {' and '.join(kinds)}")
    names = dict.fromkeys(name for row in rows for name in row)  # later rows may have more
    return _stored({name: [row.get(name) for row in rows] for name in names})


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value


# The columns of texts that are paths, for networks with these inputs.
_OF_PATHS = {"pixel_values": "image", "input_values": "audio", "input_features": "audio"}


def _column_of(rows: Sequence[Any], input_name: str) -> str | None:
    """Return the column of a list of inputs: texts, paths, pictures or sounds; None for others."""
    if not len(rows):
        return None
    if isinstance(rows[0], str) and all(isinstance(row, str | None) for row in rows):
        return _OF_PATHS.get(input_name, "text")
    if all(map(is_picture, rows)) or (input_name == "pixel_values" and all(map(_is_pixels, rows))):
        return "image"
    if all(isinstance(row, list) and row and _is_message(row[0]) for row in rows):
        return "messages"
    sounds = all(isinstance(row, Mapping) and {*row} == {"array", "sampling_rate"} for row in rows)
    return "audio" if sounds else None


def _is_pixels(value: Any) -> bool:
    """Return whether a value is an array of pixels of eight bits, which no network takes as is."""
    eight = isinstance(value, np.ndarray | Tensor) and value.dtype in (np.uint8, torch.uint8)
    return eight and value.ndim in (2, 3)


def _stored(columns: Mapping[str, list[Any]]) -> datasets.Dataset:
    """Return columns as a data set, which decodes pictures of PIL as they were."""
    plain = {name: stored(_alike(rows)) for name, rows in columns.items()}
    try:
        data = datasets.Dataset.from_dict(plain)
    except pa.ArrowException as error:
        raise DataError(
            f"the rows do not make one table of the columns {[*columns]}: {error}; give each "
            "column values of one type"
        ) from error
    for name, rows in columns.items():
        if any(map(is_picture, rows)):
            data = data.cast_column(name, datasets.Image())
    return data


def _alike(rows: list[Any]) -> list[Any]:
    """Return chats with lists of contents in all messages, where a message has one.

    A column holds texts or lists, and people write the message with a picture as a list alone.
    """
    chats = [row for row in rows if isinstance(row, list | tuple)]
    messages = [m for chat in chats for m in chat if isinstance(m, Mapping)]
    if not any(isinstance(message.get("content"), list) for message in messages):
        return rows
    return [
        row
        if row is None
        else [
            {**m, "content": [{"type": "text", "text": m["content"]}]}
            if isinstance(m.get("content"), str)
            else m
            for m in row
        ]
        for row in rows
    ]


def _from_tuple(parts: tuple[Any, ...], input_name: str) -> Any:
    if not 1 <= len(parts) <= 2:
        raise DataError(
            f"a tuple must be (inputs, labels) or (inputs,), got {len(parts)} entries; "
            "for more inputs pass a list of dicts or a datasets.Dataset"
        )
    parts = tuple(map(_texts_as_list, parts))
    batch = isinstance(parts[0], np.ndarray | Tensor) and parts[0].ndim > 2
    raw = _column_of(parts[0], input_name) if batch or isinstance(parts[0], list | tuple) else None
    names = (raw or input_name, LABELS)
    if any(isinstance(part, Tensor) and (part.is_nested or part.dim() == 0) for part in parts):
        raise DataError(
            "a tuple must hold tensors (n, ...), or lists of numbers or texts, no nested tensor "
            "and no single number; of rows with different lengths make a list of dicts: "
            "[{'input_ids': ids, 'labels': label}, ...]"
        )
    sizes = {name: len(part) for name, part in zip(names, parts, strict=False)}
    if len(set(sizes.values())) > 1:
        raise DataError(f"inputs and labels differ in length: {sizes}")
    if raw is not None:
        return _stored(dict(zip(names, map(list, parts), strict=False)))
    try:
        tensors = [as_numbers(part) for part in parts]
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"a tuple must hold tensors or lists of numbers: {error}") from error
    return TensorExamples(dict(zip(names, tensors, strict=False)))


def as_numbers(value: Any) -> Tensor:
    """Return a tensor of these numbers; Python's real ones in float32, whatever torch's default."""
    tensor = torch.as_tensor(value)
    if tensor.is_floating_point() and not isinstance(value, Tensor | np.ndarray | np.generic):
        return torch.as_tensor(value, dtype=torch.float32)
    return tensor


class TensorExamples(TorchDataset[dict[str, Tensor]]):
    """Named tensors as examples."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self.columns.items()}


def without_labels(data: Any, input_name: str, splits: Sequence[str]) -> Any:
    """Return the data without its labels, which may be of other classes."""
    rows = as_examples(data, input_name, splits)
    if is_plain(rows):
        return rows.remove_columns([n for n in rows.column_names if _is_target(rows.features, n)])
    if isinstance(rows, TensorExamples):
        return tuple(t for n, t in rows.columns.items() if n != LABELS)
    examples = (as_dict(rows[i], input_name) for i in range(len(rows)))
    return [
        {n: v.tolist() if isinstance(v, Tensor) else v for n, v in row.items() if n != LABELS}
        for row in examples
    ]


def _is_target(features: Mapping[str, Any], name: str) -> bool:
    """Return whether a column has labels of examples, or tags of words."""
    lists = datasets.Sequence | datasets.List | datasets.LargeList
    tags = name in TAGS and isinstance(features[name], lists)
    return tags or name in (LABELS, "label")


def as_dict(example: Any, input_name: str) -> dict[str, Any]:
    """Return one example as a dict with ``labels``; x of a pair (x, y) is the main input.

    Or it is the picture or sound of which a processor makes that.
    """
    if isinstance(example, Mapping):
        example = dict(example)
        if "label" in example and LABELS not in example:
            example[LABELS] = example.pop("label")
        return example
    if isinstance(example, tuple | list) and 1 <= len(example) <= 2:
        raw = _column_of(example[:1], input_name)
        name = input_name if raw in (None, "text", "messages") else raw
        return dict(zip((name, LABELS), example, strict=False))
    raise DataError(
        f"an example must be a dict or an (input, label) pair, got {type(example).__name__}"
    )


def first_of(examples: Any, input_name: str) -> dict[str, Any]:
    """Return the first example as a dict; pictures and sounds of a data set are not decoded."""
    if is_plain(examples):
        kinds = datasets.Image | datasets.Audio
        media = {n: f for n, f in examples.features.items() if isinstance(f, kinds)}
        examples = examples.select([0]) if media else examples
        for name, feature in media.items():
            examples = examples.cast_column(name, replace(feature, decode=False))
    return as_dict(examples[0], input_name)


def first_row(data: Any, network: Any) -> dict[str, Any]:
    """Return the first example of training data; an empty dict where it is not stored by names."""
    if not isinstance(data, list | datasets.Dataset | datasets.DatasetDict):
        return {}
    name = getattr(network, "main_input_name", INPUTS)
    rows = as_examples(data, name, ("train",))
    return first_of(rows, name) if is_plain(rows) and len(rows) else {}


def is_plain(examples: Any) -> bool:
    """Return whether the rows of a ``datasets.Dataset`` are stored, not made by a transform."""
    return isinstance(examples, datasets.Dataset) and examples.format["type"] != "custom"


def unformatted(data: datasets.Dataset) -> datasets.Dataset:
    """Return a data set whose rows have all columns, in Python's types."""
    form = data.format
    bare = form["type"] is None and form["columns"] == data.column_names
    return data if bare else data.with_format(None)


def mapped(data: datasets.Dataset, function: Callable[..., Any], **options: Any) -> Any:
    """Return ``data.map(function, **options)`` of the unformatted data.

    The result has a fingerprint by which a later call finds it on the disk. Data in memory are not
    written there, and go without: that of a function with a tokenizer of 30,000 words takes a
    tenth of a second.
    """
    mark = None if data.cache_files else secrets.token_hex(8)
    return unformatted(data).map(function, new_fingerprint=mark, **options)


def is_text(feature: Any) -> bool:
    """Return whether a column's feature is a text."""
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def is_nested(value: Any) -> bool:
    """Return whether a value is a list of lists."""
    try:
        return len(value) > 0 and len(value[0]) >= 0
    except TypeError:  # for a number, or a tensor of one
        return False
