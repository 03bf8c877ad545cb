"""Questions with contexts and the places of answers, as in SQuAD, to windows of tokens."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets

from pyrolora import defaults
from pyrolora.columns import LABELS
from pyrolora.data.columns import SPANS, check_text
from pyrolora.data.encoding import TOO_LONG
from pyrolora.data.examples import mapped, unformatted
from pyrolora.errors import DataError

QUESTION, CONTEXT, ANSWERS = "question", "context", "answers"
BESIDE = ("title", "is_impossible", "plausible_answers")
"""SQuAD's other columns: the second is read, the others say nothing of the answer."""
EXAMPLE = "example_number"
"""The number of a window's example in the data."""
FIRST, PAST = "first_character", "past_character"
"""Where each token begins and ends in the context, without white space; −1 outside of it."""
NONE = "none_token"
"""The place of the token that stands for no answer."""
NOWHERE = (-1, -1)
"""The place of an answer that is not in the context."""


@dataclass(frozen=True)
class Answer:
    """The first answer of an example, [start, end) in characters, and the texts of all.

    White space around it does not count. Both are -1 where the question has no answer in the
    context.
    """

    start: int
    end: int
    texts: tuple[str, ...]


def is_squad(examples: Any) -> bool:
    """Return whether the columns are those of questions with answers in a context."""
    names = getattr(examples, "column_names", None) or ()
    return {QUESTION, CONTEXT} <= {*names} and ANSWERS in names


def check_squad(data: datasets.Dataset) -> None:
    """Raise `DataError` for raw text that has not SQuAD's columns."""
    missing = [name for name in (QUESTION, CONTEXT) if name not in data.column_names]
    if missing:
        raise DataError(
            f"extractive question answering reads the columns {QUESTION!r}, {CONTEXT!r} and "
            f"{ANSWERS!r}, a dict of 'text' and 'answer_start', or tokens with {SPANS[0]!r} and "
            f"{SPANS[1]!r}; got {data.column_names}; rename yours with data.rename_column"
        )


def answer_of(row: Mapping[str, Any], number: int) -> Answer | None:
    """Return the answer of a row of SQuAD's format; None without one.

    ``answers`` is a dict of two lists, ``text`` and ``answer_start``, or a list of dicts of both.

    Raises
    ------
    DataError
        Where the text does not stand where it says.
    """
    answers = row.get(ANSWERS)
    if answers is None:
        return None
    if isinstance(answers, list) and all(isinstance(part, Mapping) for part in answers):
        answers = {n: [part.get(n) for part in answers] for n in ("text", "answer_start")}
    keys = isinstance(answers, Mapping) and {"text", "answer_start"} <= {*answers}
    texts, starts = (answers["text"], answers["answer_start"]) if keys else (None, None)
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise DataError(
            f"the {ANSWERS!r} of example {number} are {answers!r}; give a dict of two lists, "
            "{'text': ['Paris'], 'answer_start': [17]}, both empty where there is no answer"
        )
    if row.get("is_impossible") or not texts:
        return Answer(*NOWHERE, ())
    start, text, context = starts[0], texts[0], row[CONTEXT]
    found = context[start : start + len(text)] if isinstance(start, int) and start >= 0 else None
    if not text.strip() or found != text:
        raise DataError(
            f"the answer of example {number} is {text!r}, and at character {start} of its context "
            f"stands {found!r}; 'answer_start' counts characters, from 0, to the first of 'text'"
        )
    return Answer(*_trimmed(context, start, start + len(text)), tuple(texts))


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """Return [start, end) without white space around it; (start, start) where there is no more."""
    inside = text[start:end]
    if inside.strip():
        start += len(inside) - len(inside.lstrip())
    return start, start + len(inside.strip())


@dataclass(frozen=True)
class Windows:
    """A tokenizer that reads a question with as much of its context as fits, in several windows.

    A window is a row of tokens: the question and a part of the context, in the order that the
    tokenizer's padding side calls for; the next one begins ``stride`` tokens of context before its
    end. The label of a window is the first and the last token of the answer; or twice the token
    that stands for no answer, where the window has not the whole of it.
    """

    tokenizer: Any
    limit: float

    def __call__(self, rows: Mapping[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        """Return the windows of these rows; each has the number of its example."""
        right = self.tokenizer.padding_side == "right"
        names = (QUESTION, CONTEXT) if right else (CONTEXT, QUESTION)
        limit = int(self.limit) if self.limit < TOO_LONG else None
        options: dict[str, Any] = {"truncation": False}
        if limit is not None:
            truncation = "only_second" if right else "only_first"
            options = {"truncation": truncation, "max_length": limit}
            options["stride"] = self._stride(rows[QUESTION], numbers, limit)
        encoded = self.tokenizer(
            *(rows[name] for name in names),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            **options,
        )
        origins = encoded.pop("overflow_to_sample_mapping", None) or [*range(len(numbers))]
        offsets = encoded.pop("offset_mapping")
        made: dict[str, list[Any]] = {**encoded, EXAMPLE: [numbers[i] for i in origins]}
        made |= {name: [] for name in (FIRST, PAST, NONE, LABELS)}
        columns = [
            dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)
        ]
        found = [answer_of(row, n) for row, n in zip(columns, numbers, strict=True)]
        for i, origin in enumerate(origins):
            parts = encoded.sequence_ids(i)
            inside = [part == int(right) for part in parts]
            context = rows[CONTEXT][origin]
            places = zip(offsets[i], inside, strict=True)
            bounds = [_trimmed(context, *o) if own else NOWHERE for o, own in places]
            first, past = ([bound[end] for bound in bounds] for end in (0, 1))
            made[FIRST].append(first)
            made[PAST].append(past)
            none = none_token(self.tokenizer, encoded["input_ids"][i])
            made[NONE].append(none)
            made[LABELS].append(_tokens_of(found[origin], first, past, none))
        return made

    def _stride(self, questions: list[str], numbers: list[int], limit: int) -> int:
        """Return the tokens of context that windows share: at most half of what has room."""
        ids = self.tokenizer(questions, add_special_tokens=False)["input_ids"]
        sizes = [len(row) for row in ids]
        longest = max(range(len(sizes)), key=lambda i: sizes[i])
        room = limit - sizes[longest] - self.tokenizer.num_special_tokens_to_add(pair=True)
        if room < 2:
            raise DataError(
                f"the question of example {numbers[longest]} has {sizes[longest]} tokens, and with "
                f"a limit of {limit} there is no room for its context; shorten it or leave it out"
            )
        return min(defaults.WINDOW_STRIDE, room // 2)


def none_token(tokenizer: Any, ids: list[int]) -> int:
    """Return the place of the token that stands for no answer: CLS, else BOS, else the first."""
    for name in ("cls_token_id", "bos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None and token in ids:
            return ids.index(token)
    return 0


def _tokens_of(
    answer: Answer | None, first: list[int], past: list[int], none: int
) -> list[int] | None:
    """Return the first and the last token of an answer in a window."""
    if answer is None:
        return None
    inside = [t for t, start in enumerate(first) if start >= 0]
    if not inside or answer.start < first[inside[0]] or answer.end > past[inside[-1]]:
        return [none, none]
    if answer.start < 0:
        return [none, none]
    start = next((t for t in inside if past[t] > answer.start), None)
    end = next((t for t in reversed(inside) if first[t] < answer.end), None)
    return [none, none] if start is None or end is None or end < start else [start, end]


def context_tokens(ids: list[int], types: list[int] | None, tokenizer: Any) -> list[bool]:
    """Return which tokens of a row of a question and its context are those of the context.

    They are those of type 1; else the second of two texts between special tokens, or the first
    where the tokenizer pads left; else all but the token that stands for no answer.
    """
    special = [False] * len(ids)
    if tokenizer is not None:
        mask = tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
        special = [bool(entry) for entry in mask]
    if types is not None and len({*types}) > 1:
        return [kind == 1 and not own for kind, own in zip(types, special, strict=True)]
    parts: list[list[int]] = []
    for t, own in enumerate(special):
        if not own and (t == 0 or special[t - 1]):
            parts.append([])
        if not own:
            parts[-1].append(t)
    if len(parts) == 2:
        chosen = parts[int(tokenizer.padding_side == "right")]
        return [t in {*chosen} for t in range(len(ids))]
    none = none_token(tokenizer, ids)
    return [not own and t != none for t, own in enumerate(special)]


def encode_spans(data: datasets.Dataset, tokenizer: Any, limit: float) -> datasets.Dataset:
    """Return the windows of questions with their contexts.

    Raises
    ------
    DataError
        For other columns, slow tokenizers, missing texts, and answers that stand elsewhere.
    """
    check_squad(data)
    check_text(data, (QUESTION, CONTEXT), tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "the place of an answer among tokens is known to fast tokenizers alone, got the slow "
            f"one {type(tokenizer).__name__}; load it with AutoTokenizer.from_pretrained(..., "
            "use_fast=True), or pass tokens with 'start_positions' and 'end_positions'"
        )
    read = [n for n in (QUESTION, CONTEXT, ANSWERS, "is_impossible") if n in data.column_names]
    plain = unformatted(data).select_columns(read)
    windows = Windows(tokenizer, limit)
    made = mapped(
        plain,
        lambda rows, numbers: windows(rows, numbers),
        batched=True,
        with_indices=True,
        remove_columns=read,
        desc="tokenising",
    )
    if ANSWERS not in read:
        return made.remove_columns(LABELS)
    _warn_lost(plain, made, limit)
    return made


def _warn_lost(data: datasets.Dataset, windows: datasets.Dataset, limit: float) -> None:
    """Warn of answers that no window holds whole, so that they are learnt as none."""
    held = set()
    for number, label, none in zip(*(windows[n] for n in (EXAMPLE, LABELS, NONE)), strict=True):
        if label != [none, none]:
            held.add(number)
    lost = []
    for i, row in enumerate(data):
        answer = answer_of(row, i)
        if answer is not None and answer.start >= 0 and i not in held:
            lost.append(i)
    if lost:
        room = "" if math.isinf(limit) else f" of {int(limit)} tokens"
        warnings.warn(
            f"the answers of {len(lost)} of {len(data)} examples are longer than the overlap of "
            f"windows{room}, and no window holds them whole, such as that of example {lost[0]}: "
            "they count as questions without an answer; leave them out, or shorten them",
            stacklevel=2,
        )
