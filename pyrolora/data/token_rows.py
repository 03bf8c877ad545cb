"""Rows that come as tokens: checks of one example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pyrolora.data.examples import is_nested
from pyrolora.data.padding import MASK
from pyrolora.errors import DataError


def check_tokens(row: Mapping[str, Any], reader: str, longest: int | None, *, nested: bool) -> None:
    """Raise `DataError` for ``input_ids`` that a network cannot read, and masks of others.

    Parameters
    ----------
    row
        The example.
    reader
        The name of the network.
    longest
        The most tokens that its table of positions has room for, None without a table.
    nested
        Whether an example is several rows of tokens.
    """
    ids = row.get("input_ids")
    if ids is None:
        return
    _check_rows(ids, reader, nested)
    size = max(map(len, ids)) if is_nested(ids) else len(ids)
    if size == 0:
        raise DataError("an example has no token: its input_ids are empty; leave it out")
    if longest is not None and size > longest:
        raise DataError(
            f"an example has {size} tokens, and {reader} has {longest} positions; tokenise with "
            f"truncation=True, max_length={longest}, or pass the raw text"
        )
    if not is_nested(ids) and is_real(ids[0].item() if hasattr(ids, "dtype") else ids[0]):
        raise DataError(
            f"input_ids are whole numbers, and here real ones, {ids[0]!r}; convert them, or "
            "pass embeddings under the name 'inputs_embeds'"
        )
    if MASK in row and not is_nested(ids):
        _check_mask(row[MASK], size)


def is_real(value: Any) -> bool:
    """Return whether the first number of nested lists is a real one."""
    while isinstance(value, list | tuple) and len(value):
        value = value[0]
    return isinstance(value, float)


def _check_rows(ids: Any, reader: str, nested: bool) -> None:
    """Raise `DataError` for tokens that are a text, one number, or several rows."""
    if isinstance(ids, str):
        raise DataError(
            f"the input of an example is a text, {ids[:40]!r}, and {reader} takes tokens; raw text "
            "is read from a datasets.Dataset, a list of dicts, or a tuple (texts, labels), with a "
            "tokenizer"
        )
    if not hasattr(ids, "__len__") or getattr(ids, "ndim", 1) == 0:
        raise DataError(
            f"the input_ids of an example are the number {ids!r}, and {reader} takes a row of "
            "tokens, (T,): of one text make a batch of one, ids[None]"
        )
    if is_nested(ids) and not nested:
        sizes = [len(part) for part in ids]
        shape = f"({len(sizes)}, {sizes[0]})" if len({*sizes}) == 1 else f"lists of {sizes}"
        raise DataError(
            f"the input_ids of an example are {shape}, and {reader} takes one row of tokens, (T,): "
            "tokenizer(..., return_tensors='pt') adds a dimension of 1; leave return_tensors out, "
            "or take ids.squeeze(0), of the attention_mask too"
        )


def _check_mask(mask: Any, size: int) -> None:
    """Raise `DataError` for an attention mask of another length, or of zeros alone."""
    if mask is None:
        return
    if np.shape(mask)[-1:] != (size,):
        raise DataError(
            f"an example has {size} tokens, and its attention_mask is {np.shape(mask)}; it "
            "says of each token whether it counts, (T,)"
        )
    if not np.any(np.asarray(mask)):
        raise DataError(
            "an example has an attention_mask of zeros alone: none of its tokens counts; leave "
            "it out"
        )
