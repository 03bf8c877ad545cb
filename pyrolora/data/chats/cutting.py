"""Rows of tokens cut to a length."""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc

from pyrolora.data.encoding import TOO_LONG, Encoder
from pyrolora.data.examples import TensorExamples, is_nested, is_plain, mapped
from pyrolora.data.tokenising import warn_cut
from pyrolora.errors import DataError

IDS = "input_ids"


def cut_rows(examples: Any, encoder: Encoder, most: int | None) -> Any:
    """Return the examples with their first tokens, as many as the encoder's limit.

    Raises
    ------
    DataError
        For examples that are made on the fly, if there is a limit of the user's, ``most``.
    """
    if encoder.limit >= TOO_LONG:
        return examples
    limit = int(encoder.limit)
    if isinstance(examples, TensorExamples):
        return _cut_tensors(examples, limit, encoder.source)
    if not is_plain(examples) and most is None:
        return examples
    if not is_plain(examples):
        raise DataError(
            f"max_length={most} cuts the rows of a datasets.Dataset, a list of dicts or a tensor, "
            f"and {type(examples).__name__} makes its rows on the fly; cut them there, and pass "
            "TextOptions(max_length=None, ...)"
        )
    if IDS not in examples.column_names or is_nested(examples.with_format(None)[0][IDS]):
        return examples
    table = examples.select_columns([IDS]).with_format("arrow")[:]
    long = pc.greater(pc.list_value_length(table[IDS]), limit).to_pylist()
    if not any(long):
        return examples
    warn_cut(sum(long), len(long), limit, encoder.source)
    return mapped(examples, _cut, fn_kwargs={"limit": limit}, desc="cutting")


def _cut(row: dict[str, Any], limit: int) -> dict[str, Any]:
    size = len(row[IDS])
    per_token = (n for n, v in row.items() if isinstance(v, list) and len(v) == size)
    return {name: row[name][:limit] for name in per_token}


def _cut_tensors(examples: TensorExamples, limit: int, source: str) -> TensorExamples:
    ids = examples.columns.get(IDS)
    if ids is None or ids.dim() != 2 or ids.shape[1] <= limit:
        return examples
    warn_cut(len(ids), len(ids), limit, source)
    return TensorExamples(
        {
            name: tensor[:, :limit] if tensor.shape[:2] == ids.shape else tensor
            for name, tensor in examples.columns.items()
        }
    )
