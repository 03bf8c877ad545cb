"""Preferences as TRL's users have them, ``chosen`` and ``rejected`` texts or chats, to tokens."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import datasets

from pyrolora.columns import MARGIN
from pyrolora.data.chats.chat import OF_TEMPLATE, ChatTemplate, messages_of, template_options
from pyrolora.data.chats.dialogues import ASKED
from pyrolora.data.columns import PREFERENCES
from pyrolora.data.encoding import Encoder, last_tokens
from pyrolora.data.examples import mapped
from pyrolora.data.padding import MASK
from pyrolora.data.tokenising import warn_cut
from pyrolora.errors import DataError

(CHOSEN, REJECTED), IDS = PREFERENCES
PROMPT = "prompt"
SINGLES = ("text", "messages")
"""The columns with one text per example, whose reward is asked for."""


def encode_preferences(
    data: datasets.Dataset, encoder: Encoder
) -> tuple[datasets.Dataset, tuple[str, ...]]:
    """Return tokens (2, T) per example, those of the chosen text first, or (1, T) of single texts.

    As in TRL's ``RewardTrainer``, a ``prompt`` stands before both texts, and messages are written
    by the tokenizer's chat template. EOS ends texts that are not messages. Of a text that is too
    long the last tokens stay.

    Returns
    -------
    datasets.Dataset
        ``input_ids``, ``attention_mask``, and ``margin`` where the data have it.
    tuple
        The columns that were read.
    """
    names, texts = data.column_names, _columns(data)
    beside = [name for name in (PROMPT, *OF_TEMPLATE) if name in names and texts[0] == CHOSEN]
    margin = [MARGIN] if MARGIN in names and texts[0] != SINGLES[0] else []
    _check_prompt(data, (*texts, *beside))
    limit, encoder = encoder.limit, replace(encoder, limit=math.inf)

    def encode(row: dict[str, Any], number: int) -> dict[str, Any]:
        try:
            whole = [_tokens(row, name, encoder) for name in texts]
        except DataError as error:
            raise DataError(f"example {number}: {error}") from error
        ids = [last_tokens(tokens, limit) for tokens in whole]
        made = {
            "input_ids": ids,
            MASK: [[1] * len(tokens) for tokens in ids],
            "cut": any(len(a) < len(b) for a, b in zip(ids, whole, strict=True)),
        }
        return {**made, MARGIN: _margin(row[MARGIN], number)} if margin else made

    made = mapped(data, encode, with_indices=True, remove_columns=names, desc="tokenising")
    warn_cut(sum(made["cut"]), len(made), limit, encoder.source)
    return made.remove_columns("cut"), (*texts, *beside, *margin)


def _check_prompt(data: datasets.Dataset, read: Collection[str]) -> None:
    """Raise `DataError` for prompts of the chosen and the rejected texts under other names."""
    left = [name for name in data.column_names if name in ("system", *ASKED) and name not in read]
    if left and CHOSEN in read and PROMPT not in read:
        raise DataError(
            f"the data has {left} beside 'chosen' and 'rejected', and they may stand before both; "
            f"rename one, data.rename_column({left[-1]!r}, 'prompt'), join several to one column "
            f"'prompt', or drop them, data.remove_columns({left})"
        )


def _columns(data: datasets.Dataset) -> tuple[str, ...]:
    """Return the columns with the texts of an example, one or two."""
    names = data.column_names
    for pair in PREFERENCES:
        if all(name in names for name in pair):
            return pair
    single = [name for name in SINGLES if name in names]
    if len(single) == 1 and not {CHOSEN, REJECTED} & {*names}:
        return (single[0],)
    raise DataError(
        "reward modelling reads 'chosen' and 'rejected' (texts, or messages), with a 'prompt' "
        "before both if there is one, and predicts the reward of a single 'text' or of "
        f"'messages', too; got the columns {names}"
    )


def _tokens(row: Mapping[str, Any], name: str, encoder: Encoder) -> list[int]:
    """Return the tokens of one text of an example, however many."""
    value, prompt = row[name], row.get(PROMPT) if name in (CHOSEN, REJECTED) else None
    if value is None:
        raise DataError(f"{name!r} has no value; fill it, or leave the example out")
    if name in IDS:
        return [int(token) for token in value]
    if prompt is not None and isinstance(prompt, str) != isinstance(value, str):
        kinds = [("messages", "a text")[isinstance(v, str)] for v in (prompt, value)]
        raise DataError(
            f"'prompt' is {kinds[0]} and {name!r} is {kinds[1]}; give both in one form, or, where "
            f"{name!r} begins with the prompt, drop it: data.remove_columns('prompt')"
        )
    if not isinstance(value, str):
        chat = [*messages_of(prompt), *messages_of(value)] if prompt else messages_of(value)
        return ChatTemplate(encoder.tokenizer).closed(chat, **template_options(row))
    if encoder.tokenizer is None:
        raise DataError(
            f"{name!r} is a text and there is no tokenizer; pass "
            "tokenizer=AutoTokenizer.from_pretrained(...)"
        )
    (ids,) = encoder([f"{prompt or ''}{value}"])["input_ids"]
    if not ids:
        raise DataError(f"{name!r} is empty; leave the example out")
    return [*ids]


def _margin(value: Any, number: int) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(
            f"the margin of example {number} is {value!r}; give the number by which the chosen "
            "text is better, 0 where it is not known"
        )
    return float(value)
