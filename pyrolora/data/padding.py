"""Padding: its token, rows that have it without a mask, and rows that get it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq

from pyrolora.columns import LABELS
from pyrolora.data.examples import as_numbers
from pyrolora.errors import DataError

MASK = "attention_mask"
# The columns that transformers' tokenizers pad by themselves.
PADDED_BY_TOKENIZER = ("input_ids", MASK, "token_type_ids", "special_tokens_mask", LABELS)


@dataclass(frozen=True)
class Padding:
    """The tokens that fill up rows.

    ``sure`` ones are padding wherever a row begins or ends with them; ``unsure`` ones have another
    meaning as well, such as the end of a text.
    """

    sure: frozenset[int]
    unsure: frozenset[int]

    def mask(self, ids: Any) -> list[int] | None:
        """Return an attention mask for a row that has none; None where the row has no padding.

        Raises
        ------
        DataError
            For a row of padding alone, or where a run of tokens may be padding or not.
        """
        ids = ids.tolist() if isinstance(ids, Tensor | np.ndarray) else list(ids)
        if not ids or not {ids[0], ids[-1]} & (self.sure | self.unsure):
            return None
        left, right = _run(ids), _run(ids[::-1])
        for token, run in ((ids[0], left), (ids[-1], right)):
            if token in self.unsure and run > 1:
                raise DataError(
                    f"an example begins or ends with {run} times the token {token}, and has no "
                    "attention_mask: that is padding, which does not count, or text, since the "
                    "token has a meaning of its own; pass attention_mask beside input_ids, as a "
                    "list of dicts or a datasets.Dataset"
                )
        start = left if ids[0] in self.sure else 0
        stop = len(ids) - right if ids[-1] in self.sure else len(ids)
        if start >= stop:
            raise DataError(
                f"an example is padding alone, {len(ids)} times the token {ids[0]}; leave it out"
            )
        if (start, stop) == (0, len(ids)):
            return None
        return [int(start <= i < stop) for i in range(len(ids))]


def _run(ids: list[int]) -> int:
    """Return how often the first token is repeated at the beginning."""
    return next((i for i, token in enumerate(ids) if token != ids[0]), len(ids))


def padding_of(network: nn.Module, tokenizer: Any) -> Padding:
    """Return the padding of a network and its tokenizer; EOS where none is known, as is usual."""
    config = getattr(network, "config", None)
    sources = [tokenizer, config, getattr(config, "text_config", None)]
    pads = _ids(sources, "pad_token_id")
    ends = _ids(sources, "eos_token_id")
    others = ends | _ids(sources, "bos_token_id") | _ids([tokenizer], "unk_token_id")
    return Padding(pads - others, (pads & others) or (frozenset() if pads else ends))


def _ids(sources: list[Any], name: str) -> frozenset[int]:
    ids: set[Any] = set()
    for source in sources:
        value = getattr(source, name, None)
        ids |= set(value) if isinstance(value, list | tuple) else {value}
    return frozenset(value for value in ids if isinstance(value, int) and value >= 0)


def _are_of_examples(labels: Any) -> bool:
    """Return whether labels are one number or real ones; those of tokens are whole numbers."""
    return np.ndim(labels) == 0 or as_numbers(labels).is_floating_point()


def padded(rows: list[dict[str, Any]], tokenizer: Any, *, right: bool) -> dict[str, Tensor]:
    """Return rows of several lengths as one batch.

    Columns with a number per token are padded as the tokens are: labels by -100, others by 0.
    """
    if tokenizer is None:
        raise DataError(
            "the token sequences differ in length and there is no tokenizer to pad them; "
            "pass tokenizer="
        )
    if getattr(tokenizer, "pad_token", None) is None:
        raise DataError(
            "the tokenizer has no padding token; set tokenizer.pad_token = tokenizer.eos_token"
        )
    if right and tokenizer.padding_side != "right":
        tokenizer = copy.copy(tokenizer)
        tokenizer.padding_side = "right"
    apart = [name for name in rows[0] if name not in PADDED_BY_TOKENIZER]
    if LABELS in rows[0] and _are_of_examples(rows[0][LABELS]):
        apart.append(LABELS)
    columns = {name: [row[name] for row in rows] for name in apart}
    sizes = [len(row["input_ids"]) for row in rows]
    left = [{name: value for name, value in row.items() if name not in apart} for row in rows]
    made = DataCollatorForSeq2Seq(tokenizer)(left)
    batch = {name: tensor for name, tensor in made.items() if tensor is not None}
    for name, values in columns.items():
        tensors = [as_numbers(value) for value in values]
        if all(t.dim() == 1 and len(t) == n for t, n in zip(tensors, sizes, strict=True)):
            side = tokenizer.padding_side
            batch[name] = nn.utils.rnn.pad_sequence(tensors, True, 0, padding_side=side)
        else:
            batch[name] = torch.stack(tensors)
    return batch
