"""Columns of texts, or of choices, to columns of tokens."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import chain
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from pyrolora.columns import INPUTS, LABELS
from pyrolora.data.collate import MODEL_INPUTS, ChoiceCollator, Collator
from pyrolora.data.columns import (
    CHOICES,
    check_columns,
    check_nested,
    check_one_text,
    check_task,
    check_text,
    check_two_labels,
    context_columns,
    text_columns,
    unread,
)
from pyrolora.errors import DataError


def tokenised(data: datasets.Dataset, collate: Collator) -> tuple[datasets.Dataset, list[str]]:
    """Text turned to tokens, and columns that are no input dropped; and the names of those."""
    if not collate.labels_are_tokens:
        check_two_labels(data)
        if "label" in data.column_names and LABELS not in data.column_names:
            data = data.rename_column("label", LABELS)
    check_task(data.column_names)
    read: tuple[str, ...] = ()
    names = data.column_names
    if not any(name in names for name in (*MODEL_INPUTS, INPUTS)):
        if isinstance(collate, ChoiceCollator):
            read = (CHOICES, *(context_columns(data) if CHOICES in names else ()))
            data = _tokenise_choices(data, collate)
        else:
            check_nested(data)
            if collate.copies_tokens:
                check_one_text(data)
            if read := text_columns(data):
                data = _tokenise(data, read, collate)
    kept = [name for name in data.column_names if name in {*collate.read, LABELS}]
    if not set(kept) - {LABELS}:
        check_columns(data)
        raise DataError(
            f"none of the columns {data.column_names} is an input of {collate.network_name}; "
            f"it takes {sorted(collate.taken)}, or raw text with a tokenizer"
        )
    of_texts = [name for name in names if collate.labels_are_tokens and name == "label"]
    if data.format["type"] is not None:  # a format with columns has chosen among them
        names = [name for name in names if name in data.format["columns"]]
    left = unread(names, read or kept, tokens=collate.labels_are_tokens)
    return data.select_columns(kept), [*of_texts, *left]


def _tokenise(data: datasets.Dataset, text: tuple[str, ...], collate: Collator) -> datasets.Dataset:
    check_text(data, text, collate.tokenizer)
    encoder = collate.encoder
    made = data.with_format(None).map(
        lambda rows: encoder(*(rows[name] for name in text)),
        batched=True,
        remove_columns=[name for name in data.column_names if name != LABELS],
        desc="tokenising",
    )
    lengths = pc.list_value_length(made.with_format("arrow")[:]["input_ids"]).to_numpy()
    _check_empty(lengths)
    warn_cut(sum(made["cut"]), len(made), encoder.limit)
    return made.remove_columns("cut")


def _check_empty(lengths: np.ndarray) -> None:
    empty = np.flatnonzero(lengths == 0).tolist()
    if empty:
        raise DataError(no_tokens(empty))


def no_tokens(examples: list[int], need: str = "no token") -> str:
    """What to say of examples whose texts are too short."""
    return (
        f"{len(examples)} examples have {need}, such as example "
        f"{', '.join(map(str, examples[:5]))}; leave them out, for example with "
        "data.filter(lambda row: row['text'].strip())"
    )


def warn_cut(count: int, total: int, limit: float) -> None:
    """Warn of texts that were cut."""
    if count:
        warnings.warn(
            f"{count} of {total} texts have more than {int(limit)} tokens and are cut there, where "
            "the network's or the tokenizer's limit is",
            stacklevel=2,
        )


def _tokenise_choices(data: datasets.Dataset, collate: Collator) -> datasets.Dataset:
    """Pairs (context, choice), in the nesting of the choices."""
    if CHOICES not in data.column_names:
        raise DataError(
            f"multiple choice needs a column {CHOICES!r} with a list of texts an example, or "
            f"tokens (choices, T) as 'input_ids', got the columns {data.column_names}"
        )
    context = context_columns(data)
    check_text(data, context, collate.tokenizer)
    encoder = collate.encoder

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        choices = [choice_texts(own) for own in rows[CHOICES]]
        contexts = [" ".join(parts) for parts in zip(*(rows[c] for c in context), strict=True)]
        encoded = encoder(
            [text for text, own in zip(contexts, choices, strict=True) for _ in own],
            list(chain.from_iterable(choices)),
        )
        made: dict[str, list[Any]] = {}
        for name, values in encoded.items():
            flat = iter(values)
            made[name] = [[next(flat) for _ in own] for own in choices]
        if LABELS in rows:
            pairs = zip(rows[LABELS], rows[CHOICES], strict=True)
            made[LABELS] = [choice_number(label, own) for label, own in pairs]
        return made

    made = data.with_format(None).map(
        encode, batched=True, remove_columns=data.column_names, desc="tokenising"
    )
    _check_empty(np.array([min(map(len, own)) for own in made["input_ids"]]))
    warn_cut(sum(map(any, made["cut"])), len(made), encoder.limit)
    return made.remove_columns("cut")


def choice_texts(choices: Any) -> list[str]:
    """The texts of an example's choices: a list, or ARC's {"text": [...], "label": [...]}."""
    texts = choices.get("text") if isinstance(choices, Mapping) else choices
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise DataError(
            f"{CHOICES!r} must be a list of at least one text an example, or a dict with such a "
            f"list as 'text', got {choices!r}"
        )
    return texts


def choice_number(label: Any, choices: Any) -> Any:
    """The number of the right choice, where ARC has its name ("A" to "E", or "1" to "5")."""
    names = choices.get("label") if isinstance(choices, Mapping) else None
    if not isinstance(label, str) or names is None:
        return label
    if label not in names:
        raise DataError(f"the label {label!r} is none of its example's choices, {names}")
    return names.index(label)
