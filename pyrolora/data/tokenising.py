"""Columns of texts, of choices or of words to columns of tokens."""

from __future__ import annotations

import string
import warnings
from collections.abc import Mapping
from itertools import chain
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from pyrolora.columns import LABELS
from pyrolora.data.columns import CHOICES, check_text, context_columns
from pyrolora.data.encoding import OWN_LIMIT, Encoder
from pyrolora.data.examples import mapped
from pyrolora.errors import DataError


def encode_texts(
    data: datasets.Dataset, text: tuple[str, ...], encoder: Encoder
) -> datasets.Dataset:
    """Return the tokens of a column of texts, or of two columns as pairs."""
    check_text(data, text, encoder.tokenizer)
    made = mapped(
        data,
        lambda rows: encoder(*(rows[name] for name in text)),
        batched=True,
        remove_columns=[name for name in data.column_names if name != LABELS],
        desc="tokenising",
    )
    lengths = pc.list_value_length(made.with_format("arrow")[:]["input_ids"]).to_numpy()
    _check_empty(lengths)
    warn_cut(sum(made["cut"]), len(made), encoder.limit, encoder.source)
    return made.remove_columns("cut")


def encode_choices(data: datasets.Dataset, encoder: Encoder) -> datasets.Dataset:
    """Return the tokens of pairs (context, choice), in the nesting of the choices."""
    if CHOICES not in data.column_names:
        raise DataError(
            f"multiple choice needs a column {CHOICES!r} with a list of texts per example, or "
            f"tokens (choices, T) as 'input_ids', got the columns {data.column_names}"
        )
    context = context_columns(data)
    check_text(data, context, encoder.tokenizer)

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        choices = [choice_texts(texts) for texts in rows[CHOICES]]
        contexts = [" ".join(parts) for parts in zip(*(rows[c] for c in context), strict=True)]
        encoded = encoder(
            [text for text, texts in zip(contexts, choices, strict=True) for _ in texts],
            list(chain.from_iterable(choices)),
        )
        made: dict[str, list[Any]] = {}
        for name, values in encoded.items():
            flat = iter(values)
            made[name] = [[next(flat) for _ in texts] for texts in choices]
        if LABELS in rows:
            pairs = zip(rows[LABELS], rows[CHOICES], strict=True)
            made[LABELS] = [choice_number(label, texts) for label, texts in pairs]
        return made

    made = mapped(data, encode, batched=True, remove_columns=data.column_names, desc="tokenising")
    _check_empty(np.array([min(map(len, rows)) for rows in made["input_ids"]]))
    warn_cut(sum(map(any, made["cut"])), len(made), encoder.limit, encoder.source)
    return made.remove_columns("cut")


def choice_texts(choices: Any) -> list[str]:
    """Return the texts of an example's choices, a list or ARC's {"text": [...], "label": [...]}."""
    texts = choices.get("text") if isinstance(choices, Mapping) else choices
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise DataError(
            f"{CHOICES!r} must be a list of at least one text per example, or a dict with such a "
            f"list as 'text', got {choices!r}"
        )
    return texts


def choice_number(label: Any, choices: Any) -> Any:
    """Return the number of the right choice, from its number, its name, its letter or its text.

    ARC names its choices ("A" to "E", or "1" to "5"); elsewhere a label that is a text is the
    letter of a choice, "A" the first, its number, "0" the first, or its text.

    Raises
    ------
    DataError
        For a text that is none of these, or several.
    """
    if not isinstance(label, str):
        return label
    texts = choice_texts(choices)
    names = choices.get("label") if isinstance(choices, Mapping) else None
    letters = [*string.ascii_uppercase[: len(texts)]] if names is None else names
    found = {i for i, letter in enumerate(letters) if letter == label}
    if names is None or not found:
        found |= {i for i, text in enumerate(texts) if text == label}
    if names is None:
        found |= {i for i in range(len(texts)) if str(i) == label}
    if len(found) != 1:
        raise DataError(
            f"the label {label!r} is {'none' if not found else f'several, {sorted(found)},'} of "
            f"its example's choices, {texts}, which are called {letters}; give the number of the "
            "right one, counted from 0"
        )
    return found.pop()


def no_tokens(examples: list[int], need: str = "no token") -> str:
    """Return the message for examples whose texts are too short."""
    return (
        f"{len(examples)} examples have {need}, such as example "
        f"{', '.join(map(str, examples[:5]))}; leave them out, for example with "
        "data.filter(lambda row: row['text'].strip())"
    )


def warn_cut(
    count: int, total: int, limit: float, source: str = OWN_LIMIT, what: str = "texts"
) -> None:
    """Warn that ``count`` of the texts were cut; ``source`` says where the limit comes from."""
    if count:
        warnings.warn(
            f"{count} of {total} {what} have more than {int(limit)} tokens and are cut there, "
            f"{source}",
            stacklevel=2,
        )


def _check_empty(lengths: np.ndarray) -> None:
    empty = np.flatnonzero(lengths == 0).tolist()
    if empty:
        raise DataError(no_tokens(empty))
