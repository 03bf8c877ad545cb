"""The labels of a causal language model's tokens: which of them count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyrolora.columns import IGNORED
from pyrolora.data.columns import TOKEN_MASKS
from pyrolora.data.padding import MASK
from pyrolora.errors import DataError


def token_labels(row: Mapping[str, Any], labels: Any, made: list[int] | None) -> Any:
    """The labels of a causal language model's example, as `Collator.example` says.

    ``made`` is the attention mask of a row that came without one: there a label that is padding
    does not count.
    """
    ids = torch.as_tensor(row["input_ids"])
    mask = row.get(MASK, made)
    seen = torch.ones_like(ids).bool() if mask is None else torch.as_tensor(mask) != 0
    counted = _counted(row, len(ids))
    if labels is None:
        seen[1:] &= seen[:-1].clone()
        if is_packed(row):  # what begins a text is not predicted by the one before
            seen &= torch.as_tensor(row["position_ids"]) != 0
        if counted is not None:
            seen &= counted
        return ids.masked_fill(~seen, IGNORED).tolist()
    given = torch.as_tensor(labels)
    if given.dim() == 1 and len(given) != len(ids):
        raise DataError(
            f"an example has {len(ids)} tokens and {len(given)} labels; a causal language model "
            "has a label per token of its input, -100 where it does not count"
        )
    if given.shape != ids.shape:
        return labels
    if counted is not None and not torch.equal((given != IGNORED)[1:], (counted & seen)[1:]):
        raise DataError(
            "'labels' and the mask of the completion say different things about which tokens "
            "count; leave one of them out"
        )
    unread = given.eq(ids) & ~seen if made is not None else torch.zeros_like(seen)
    return given.masked_fill(unread, IGNORED).tolist()


def _counted(row: Mapping[str, Any], size: int) -> Tensor | None:
    """Which tokens count, where a mask says so."""
    masks = {n: torch.as_tensor(row[n]) != 0 for n in TOKEN_MASKS if row.get(n) is not None}
    if not masks:
        return None
    first, *others = masks.values()
    if any(mask.shape != (size,) for mask in masks.values()):
        raise DataError(f"{sorted(masks)} must have a number per token, {size} of them")
    if not all(torch.equal(first, other) for other in others):
        raise DataError(
            f"{sorted(masks)} say different things about which tokens count; keep one of them"
        )
    return first


def is_packed(row: Mapping[str, Any]) -> bool:
    """Whether several texts stand in one row, each with positions of its own.

    Raises
    ------
    DataError
        With an ``attention_mask``, under which the texts would see each other.
    """
    if row.get("position_ids") is None:
        return False
    positions = torch.as_tensor(row["position_ids"])
    seen = torch.as_tensor(row.get(MASK, torch.ones_like(positions))) != 0
    if positions.dim() != 1 or seen.shape != positions.shape:
        return False
    jumps = (positions.diff() != 1) & seen[1:] & seen[:-1]
    if jumps.any() and MASK in row:
        raise DataError(
            "an example packs several texts (its position_ids start again), and with an "
            "attention_mask they would see each other; leave attention_mask out"
        )
    return bool(jumps.any())
