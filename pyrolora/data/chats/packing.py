"""Several texts per row: best fit first, the longest text first, with positions from 0 for each."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import torch

from pyrolora.columns import IGNORED, LABELS
from pyrolora.data.padding import MASK
from pyrolora.errors import DataError

POSITIONS = "position_ids"


def packed_rows(
    examples: Any, as_row: Callable[[Any], Mapping[str, Any]], size: int
) -> datasets.Dataset:
    """Return rows of at most ``size`` tokens, each with several texts.

    A text's first token, which nothing predicts, is labelled -100, so that the sum of log p over
    all rows is that over all texts. Rows with the most texts come first.

    Parameters
    ----------
    examples
        The texts.
    as_row
        Returns the tokens and labels of an example.
    size
        The most tokens of a row; no text is longer.
    """
    texts = [_text(as_row(examples[i]), i) for i in range(len(examples))]
    rows = best_fit([len(ids) for ids, _ in texts], size)
    rows.sort(key=len, reverse=True)  # a stable order; a fit checks its first rows
    return datasets.Dataset.from_list([_row([texts[i] for i in members]) for members in rows])


def best_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Return rows with the numbers of the texts in each, by best-fit decreasing.

    The longest text that is left goes to the row in which it leaves the least room, or to a new
    one (Johnson 1973; as TRL's ``"bfd"``).
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # the room that is left in a row, sorted, and its number
    for number in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        place = bisect.bisect_left(spaces, (sizes[number], -1))
        left, row = spaces.pop(place) if place < len(spaces) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        bisect.insort(spaces, (left - sizes[number], row))
    return rows


def _text(row: Mapping[str, Any], number: int) -> tuple[list[int], list[int]]:
    """Return the tokens of a text without padding, and its labels."""
    beside = sorted({*row} - {"input_ids", LABELS, MASK})
    if beside or "input_ids" not in row:
        raise DataError(
            f"example {number} has {beside or sorted(row)}, and packing=True packs tokens alone; "
            "leave packing out, or the other columns"
        )
    ids, labels = (torch.as_tensor(row[name]) for name in ("input_ids", LABELS))
    seen = torch.as_tensor(row.get(MASK, torch.ones_like(ids))) != 0
    labels = labels.clone()
    labels[:1] = IGNORED
    return ids[seen].tolist(), labels[seen].tolist()


def _row(texts: Sequence[tuple[list[int], list[int]]]) -> dict[str, list[int]]:
    return {
        "input_ids": [token for ids, _ in texts for token in ids],
        LABELS: [label for _, labels in texts for label in labels],
        POSITIONS: [place for ids, _ in texts for place in range(len(ids))],
    }
