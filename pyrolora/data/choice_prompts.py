"""Choices as a causal language model reads them: letters after a prompt, or texts after a context.

The default prompt of lettered options is

    {context}
    A. {first choice}
    B. {second choice}
    Answer:

with the letter after a space, which most tokenizers make one token of (" A").
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import datasets

from pyrolora.columns import CHOICE_TOKENS, COMPLETION_MASK, LABELS
from pyrolora.data.chats.chat import shared
from pyrolora.data.columns import CHOICES, check_text, context_columns
from pyrolora.data.encoding import Encoder, last_tokens
from pyrolora.data.examples import mapped
from pyrolora.data.padding import MASK
from pyrolora.data.tokenising import choice_number, choice_texts, warn_cut
from pyrolora.errors import ConfigError, DataError

LETTERS = string.ascii_uppercase
ENDINGS = (("", " "), (" ", ""))
"""The end of a prompt after "Answer:", and the beginning of the letter's text, in turn."""


def prompt_of(context: str, choices: Sequence[str], ending: str = "") -> str:
    """Return the prompt after which the letter of a choice follows."""
    options = (f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False))
    return "\n".join([context, *options, f"Answer:{ending}"])


def encode_lettered(data: datasets.Dataset, encoder: Encoder) -> datasets.Dataset:
    """Return the tokens of prompts with lettered options, and the tokens of their letters.

    Of a prompt that is too long the last tokens stay.

    Raises
    ------
    DataError
        For an example with more choices than there are letters.
    ConfigError
        For a tokenizer without a token for each letter.
    """
    context, limit = _context(data, encoder), encoder.limit
    sizes = [len(choice_texts(choices)) for choices in data.with_format(None)[CHOICES]]
    most = max(sizes)
    if most > len(LETTERS):
        raise DataError(
            f"example {sizes.index(most)} has {most} choices, and there are {len(LETTERS)} letters "
            "for them; leave it out, or choose between the texts, choices='texts'"
        )
    encoder = replace(encoder, limit=math.inf, open=True)
    ending, letters = letter_tokens(encoder, most)

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        choices, contexts = _read(rows, context)
        prompts = [prompt_of(c, t, ending) for c, t in zip(contexts, choices, strict=True)]
        whole = encoder(prompts)["input_ids"]
        ids = [last_tokens(tokens, limit) for tokens in whole]
        return {
            "input_ids": ids,
            MASK: [[1] * len(row) for row in ids],
            CHOICE_TOKENS: [letters[: len(texts)] for texts in choices],
            "cut": [len(row) < len(tokens) for row, tokens in zip(ids, whole, strict=True)],
            **_labels(rows),
        }

    return _mapped(data, encode, replace(encoder, limit=limit))


def letter_tokens(encoder: Encoder, count: int) -> tuple[str, list[int]]:
    """Return the end of a prompt, and the token of each of ``count`` letters after it.

    A letter follows "Answer:" after a space, " A", or, where that is not one token, after a space
    that belongs to the prompt.

    Raises
    ------
    ConfigError
        Where a letter is several tokens, is unknown, or is the same token as another.
    """
    found: list[list[int]] = []
    for ending, before in ENDINGS:
        prompt = prompt_of("Which?", ["one", "two"], ending)
        texts = [f"{prompt}{before}{letter}" for letter in LETTERS[:count]]
        start, *whole = encoder([prompt, *texts])["input_ids"]
        found = [ids[len(start) :] if ids[: len(start)] == start else ids for ids in whole]
        tokens = [ids[0] for ids in found if len(ids) == 1]
        unknown = getattr(encoder.tokenizer, "unk_token_id", None)
        if len(tokens) == count == len({*tokens} - {unknown}):
            return ending, tokens
    pairs = ", ".join(f"{letter}: {ids}" for letter, ids in zip(LETTERS, found, strict=False))
    raise ConfigError(
        f"choices='letters' needs a token for each letter after 'Answer:', and this "
        f"{type(encoder.tokenizer).__name__} has not: what stands for the letters is {pairs}; use "
        "choices='texts', or a tokenizer that has them"
    )


def encode_continuations(data: datasets.Dataset, encoder: Encoder) -> datasets.Dataset:
    """Return the tokens of each choice after its context, nested, and which are the choice's.

    A choice follows its context after a space. Its tokens are those of both together after the
    ones that they share with the context alone. Of a text that is too long the last tokens stay.

    Raises
    ------
    DataError
        For a choice without tokens of its own, and one whose first token nothing predicts.
    """
    context, limit = _context(data, encoder), encoder.limit
    encoder = replace(encoder, limit=math.inf)

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        choices, contexts = _read(rows, context)
        pairs = [(c, text) for c, texts in zip(contexts, choices, strict=True) for text in texts]
        alone = dict(zip(contexts, encoder(contexts)["input_ids"], strict=True))
        both = encoder([f"{c} {text}" for c, text in pairs])["input_ids"]
        counted = [
            [int(i >= start) for i in range(len(ids))]
            for ids, pair in zip(both, pairs, strict=True)
            for start in [_start(alone[pair[0]], ids, *pair)]
        ]
        ids = [last_tokens(row, limit) for row in both]
        counted = [
            [0, *last_tokens(row, limit)[1:]] for row in counted
        ]  # nothing predicts the first
        flat: dict[str, list[Any]] = {
            "input_ids": ids,
            MASK: [[1] * len(row) for row in ids],
            COMPLETION_MASK: counted,
            "cut": [len(row) < len(whole) for row, whole in zip(ids, both, strict=True)],
        }
        made = {name: _nested(values, choices) for name, values in flat.items()}
        return {**made, "cut": [*map(any, made["cut"])], **_labels(rows)}

    return _mapped(data, encode, replace(encoder, limit=limit))


def _start(alone: list[int], both: list[int], context: str, choice: str) -> int:
    """Return the place of a choice's first token: those before are the context's, too."""
    count = shared(alone, both)
    if count == len(both):
        raise DataError(
            f"a choice of {context[:40]!r} adds no token to it: {choice!r}; give it a text, or "
            "leave the example out"
        )
    if not count:
        raise DataError(
            f"nothing stands before the choice {choice[:40]!r} that could predict its first token; "
            "give it a context, or a tokenizer that puts a token before every text"
        )
    return count


def _context(data: datasets.Dataset, encoder: Encoder) -> tuple[str, ...]:
    """Return the columns before the choices, checked."""
    if CHOICES not in data.column_names:
        raise DataError(
            f"choosing needs a column {CHOICES!r} with a list of texts per example beside the "
            f"question, got the columns {data.column_names}"
        )
    context = context_columns(data)
    check_text(data, context, encoder.tokenizer)
    return context


def _read(
    rows: dict[str, list[Any]], context: tuple[str, ...]
) -> tuple[list[list[str]], list[str]]:
    """Return the texts of all choices, and the text before them."""
    contexts = [" ".join(parts) for parts in zip(*(rows[c] for c in context), strict=True)]
    return [choice_texts(texts) for texts in rows[CHOICES]], contexts


def _labels(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    if LABELS not in rows:
        return {}
    pairs = zip(rows[LABELS], rows[CHOICES], strict=True)
    return {LABELS: [choice_number(label, texts) for label, texts in pairs]}


def _nested(values: list[Any], like: list[list[str]]) -> list[list[Any]]:
    flat = iter(values)
    return [[next(flat) for _ in texts] for texts in like]


def _mapped(data: datasets.Dataset, encode: Any, like: Encoder) -> datasets.Dataset:
    """Return the encoded data, with a warning of texts that were cut."""
    made = mapped(data, encode, batched=True, remove_columns=data.column_names, desc="tokenising")
    warn_cut(sum(made["cut"]), len(made), like.limit, like.source)
    return made.remove_columns("cut")
