"""Texts to tokens: one opening, one end, and no more tokens than the network reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TOO_LONG = 10**6
"""A tokenizer's limit from here on is none: transformers writes 1e30 where none is known."""
OWN_LIMIT = "where the network's or the tokenizer's limit is"
"""The limit of most texts, in a warning."""
WORD_IDS = "word_ids"
"""The column with the number of each token's word in its text, None for special tokens."""


@dataclass(frozen=True)
class Encoder:
    """A tokenizer as it is used for a network.

    A text that already begins with the token that the tokenizer puts first, as a chat template
    writes it, begins with it once; likewise at its end. With ``ends`` a text ends with EOS, once,
    and only where there is room. An ``open`` text will be continued: it lacks the tokens that the
    tokenizer puts last. With ``words`` the columns have the word of each token, `WORD_IDS`; a text
    may then be a list of words. ``source`` says where the limit comes from.
    """

    tokenizer: Any
    limit: float
    ends: bool = False
    open: bool = False
    words: bool = False
    target: bool = False
    source: str = OWN_LIMIT

    def __call__(self, *texts: list[Any]) -> dict[str, Any]:
        """Return columns of tokens, cut at ``limit``, and ``cut``: which texts were."""
        limit = int(self.limit) if self.limit < TOO_LONG else None
        options = {"is_split_into_words": True} if texts and isinstance(texts[0][0], list) else {}
        encoded = self.tokens(
            *texts, truncation=limit is not None, max_length=limit, verbose=False, **options
        )
        made = dict(encoded)
        if self.words:
            made[WORD_IDS] = [encoded.word_ids(i) for i in range(len(made["input_ids"]))]
        full = [i for i, ids in enumerate(made["input_ids"]) if len(ids) == limit]
        cut = [False] * len(made["input_ids"])
        if full:
            chosen = [[part[i] for i in full] for part in texts]
            whole = self.tokens(*chosen, truncation=False, verbose=False, **options)["input_ids"]
            for i, ids in zip(full, whole, strict=True):
                cut[i] = len(ids) > len(made["input_ids"][i])
        first, last = added(self.tokens)
        for i, ids in enumerate(made["input_ids"]):
            size = len(ids)
            start = len(first) if first and ids[len(first) : 2 * len(first)] == first else 0
            doubled = bool(last) and ids[-2 * len(last) : -len(last)] == last
            opened = self.open and 0 < len(last) < size and ids[-len(last) :] == last
            stop = size - len(last) if doubled or opened else size
            if (start, stop) != (0, size):
                _each(made, i, size, lambda row, a=start, b=stop: row[a:b])
            if self.ends and not cut[i]:
                self._end(made, i)
        return {**made, "cut": cut}

    def tokens(self, *texts: Any, **options: Any) -> Any:
        """Call the tokenizer, for texts that are read or for those that are written."""
        if self.target:
            return self.tokenizer(text_target=texts[0], **options)
        return self.tokenizer(*texts, **options)

    def _end(self, made: Mapping[str, Any], i: int) -> None:
        """Add EOS to a text that has room for it and does not end with it."""
        eos, ids = getattr(self.tokenizer, "eos_token_id", None), made["input_ids"][i]
        if eos is None or not ids or ids[-1] == eos or len(ids) + 1 > self.limit:
            return
        _each(made, i, len(ids), lambda row: [*row, row[-1]])
        made["input_ids"][i][-1] = eos


def _each(made: Mapping[str, Any], i: int, size: int, change: Any) -> None:
    """Change all columns in which the text has an entry per token."""
    for column in made.values():
        if isinstance(column[i], list) and len(column[i]) == size:
            column[i] = change(column[i])


def last_tokens(ids: list[int], limit: float) -> list[int]:
    """Return the last tokens of a text, as many as ``limit``."""
    return ids[int(max(0, len(ids) - limit)) :]


def added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that a tokenizer puts before and after every text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1 if plain else 0):
        if whole[start : start + len(plain)] == plain:
            return list(whole[:start]), list(whole[start + len(plain) :])
    return [], []
