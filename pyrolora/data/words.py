"""Texts as lists of words: which token belongs to which word."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import datasets

from pyrolora.data.columns import WORD_COLUMNS, is_list
from pyrolora.errors import DataError


def check_tokenizer(tokenizer: Any, *, words: bool) -> None:
    """Raise `DataError` for a tokenizer that cannot tell which token belongs to which word."""
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "tags are aligned with tokens by a fast tokenizer, got the slow one "
            f"{type(tokenizer).__name__}; load it with AutoTokenizer.from_pretrained(..., "
            "use_fast=True), or pass input_ids with a label per token"
        )
    try:
        tokenizer(["a"], is_split_into_words=True) if words else None
    except (AssertionError, ValueError) as error:
        raise DataError(
            f"{type(tokenizer).__name__} does not take words as it was loaded, got {error}; load "
            "it with add_prefix_space=True"
        ) from error
    pieces = [tokenizer("a a"), tokenizer(["a", "a"], is_split_into_words=True)]
    told = {*pieces[0].word_ids()} - {None}
    if not words and len(told) < 2:
        raise DataError(
            f"{type(tokenizer).__name__} does not tell the words of a text apart; split the texts "
            "into a column 'tokens' with the list of words of each example"
        )
    spaced = [
        any(map(_begins_with_space, tokenizer.convert_ids_to_tokens(p["input_ids"])))
        for p in pieces
    ]
    if words and spaced == [True, False]:
        warnings.warn(
            f"{type(tokenizer).__name__} reads each word as if no space were before it, unlike the "
            "words of a text, which the network knows; load it with add_prefix_space=True",
            stacklevel=2,
        )


def _begins_with_space(token: str) -> bool:
    """Return whether a token of byte-level BPE begins with a space."""
    return token.startswith("\u0120")


def check_words(data: datasets.Dataset, words: str) -> None:
    """Raise `DataError` for two columns of words, and for missing words."""
    both = [name for name in WORD_COLUMNS if is_list(data.features.get(name))]
    if len(both) > 1:
        raise DataError(
            f"cannot tell which of the columns {both} has the words of the texts; drop one with "
            f"data.remove_columns({both[1]!r})"
        )
    for i, row in enumerate(data.with_format(None)[words]):
        if None in row:
            raise DataError(f"example {i} has a missing word in {words!r}; fill it or leave it out")


def first_tokens(words: list[int | None]) -> list[int | None]:
    """Return the word that begins at each token; None at special and at later tokens of a word."""
    before = [None, *words[:-1]]
    return [None if word == last else word for word, last in zip(words, before, strict=True)]


def lost_words(words: list[str], found: list[int | None]) -> list[str]:
    """Return the words without a token."""
    seen = {*found}
    return [word for i, word in enumerate(words) if i not in seen]


def warn_lost(lost: Iterable[list[str]], tokenizer: Any) -> None:
    """Warn of words that have no token, and with that no tag and no prediction."""
    rows = [(i, word) for i, words in enumerate(lost) for word in words]
    if rows:
        warnings.warn(
            f"{len(rows)} words have no token of {type(tokenizer).__name__} and do not count, such "
            f"as {rows[0][1]!r} in example {rows[0][0]}",
            stacklevel=2,
        )
