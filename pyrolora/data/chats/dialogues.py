"""The columns that a language model learns from: text, chat, or prompt and completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import datasets

from pyrolora.columns import LABELS
from pyrolora.data.chats.chat import OF_TEMPLATE
from pyrolora.data.chats.text_options import TextOptions
from pyrolora.data.columns import (
    DIALOGUES,
    WEIGHTS,
    WRITTEN_PAIRS,
    free_text,
    is_list,
    is_origin,
    is_row_name,
)
from pyrolora.errors import DataError

RAW = ("prompt", "completion")
"""The columns whose texts are joined as they are; those of `PAIRS` are two sides of a talk."""
ASKED = ("prompt", "instruction", "question", "query", "problem", "input")
"""Columns with what somebody asks for."""
NO_TEXT = ("prompt", "instruction")
"""Those of them that are no text to learn by themselves."""
PAIRS = tuple(pair for pair in WRITTEN_PAIRS if pair[0][0] in ASKED)
CHATS = ("messages", "conversations", "conversation")

Kind = Literal["text", "chat", "pair"]


@dataclass(frozen=True)
class Dialogue:
    """The columns of a text, of a chat, or of a prompt and its completion.

    Attributes
    ----------
    kind
        Which of these.
    prompt
        The column of the text or of the chat; in a pair, those of the parts of the prompt.
    completion
        The column of the completion in a pair; empty without one.
    chats
        Whether the columns hold lists of messages.
    beside
        The columns with more for the chat template, if there are any.
    """

    kind: Kind
    prompt: tuple[str, ...]
    completion: str = ""
    chats: bool = False
    beside: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read."""
        answer = (self.completion,) if self.completion else ()
        return (*self.prompt, *answer, *self.beside)

    @property
    def raw(self) -> bool:
        """Whether prompt and completion are texts that are joined as they are.

        A prompt of this name alone is that of such a completion.
        """
        texts = self.kind == "pair" and not self.chats
        return texts and self.prompt == RAW[:1] and self.completion in ("", RAW[1])

    def __str__(self) -> str:
        if self.kind != "pair":
            return f"{self.prompt[0]!r}"
        return f"{' and '.join(map(repr, self.prompt))} (the prompt) and {self.completion!r}"


def dialogue_of(data: datasets.Dataset, options: TextOptions) -> Dialogue | None:
    """Return the columns that a language model learns from; None where no column holds text.

    Raises
    ------
    DataError
        For columns that look like data and would not be read: a second text or chat, a prompt
        beside a text, a mask; for prompts without their completions.
    """
    texts, chats = _texts_and_chats(data)
    _check_named(data, options)
    found = _pair(texts, chats) or _alone(texts, chats, options)
    if found is None:
        return None
    found = _with_more(data, found)
    _check_left(data, found, texts, chats)
    _check_answered(data, found, options)
    return found


def prompt_of(data: datasets.Dataset) -> Dialogue:
    """Return the columns of prompts that are to be continued, whether the answers are there or not.

    Raises
    ------
    DataError
        For data without prompts, and for columns that look like prompts, too.
    """
    texts, chats = _texts_and_chats(data)
    found = _pair(texts, chats)
    if found is None:
        asked = [prompt for prompt, _ in PAIRS if {*prompt} <= {*texts}]
        if asked:
            found = Dialogue("pair", max(asked, key=len))
        else:
            found = _alone(texts, chats, TextOptions())
    if found is None:
        raise DataError(
            f"the data has no prompts, got the columns {data.column_names}; expected 'messages', "
            "'prompt', 'question', or one column of texts"
        )
    found = _with_more(data, found)
    _check_left(data, found, texts, chats, "continue")
    return found


def chat_columns(data: datasets.Dataset) -> list[str]:
    """Return the columns that hold lists of messages."""
    return [name for name, feature in data.features.items() if _is_chat(feature)]


def _texts_and_chats(data: datasets.Dataset) -> tuple[list[str], list[str]]:
    """Return the columns of texts, without those with the origins of chats, and those of chats."""
    texts, chats = free_text(data), chat_columns(data)
    if chats:
        texts = [name for name in texts if not is_origin(data, name)]
    unread = [name for name in texts if name in CHATS]
    if unread:
        raise DataError(
            f"the column {unread[0]!r} holds texts, and a chat is a list of messages; read JSON "
            f"with data.map(lambda row: {{{unread[0]!r}: json.loads(row[{unread[0]!r}])}}), or "
            "name texts 'text'"
        )
    return texts, chats


def _check_named(data: datasets.Dataset, options: TextOptions) -> None:
    """Raise `DataError` where the data lack the column that the options name."""
    named = options.dataset_text_field
    if named not in data.column_names and named != TextOptions.dataset_text_field:
        raise DataError(
            f"dataset_text_field={named!r}, and the data has {data.column_names}; name one of them"
        )


def _is_chat(feature: Any) -> bool:
    part = getattr(feature, "feature", None) if is_list(feature) else None
    part = feature[0] if isinstance(feature, list) and len(feature) == 1 else part
    return isinstance(part, Mapping) and ("role" in part or {"from", "value"} <= {*part})


def _pair(texts: Sequence[str], chats: Sequence[str]) -> Dialogue | None:
    """Return the prompt and the completion with the most columns, if the data has such."""
    for names, chatty in ((chats, True), (texts, False)):
        if all(name in names for name in RAW):
            return Dialogue("pair", RAW[:1], RAW[1], chatty)
    known = [pair for pair in PAIRS if {*pair[0], pair[1]} <= {*texts}]
    if not known:
        return None
    prompt, completion = max(known, key=lambda pair: len(pair[0]))
    return Dialogue("pair", prompt, completion)


def _alone(texts: Sequence[str], chats: Sequence[str], options: TextOptions) -> Dialogue | None:
    """Return the column of texts that the options name, or else that of chats, or of texts."""
    named = options.dataset_text_field
    if named in texts:
        return Dialogue("text", (named,))
    if chats:
        return Dialogue("chat", (next((n for n in CHATS if n in chats), chats[0]),), chats=True)
    return Dialogue("text", (texts[0],)) if texts else None


def _check_answered(data: datasets.Dataset, found: Dialogue, options: TextOptions) -> None:
    """Raise `DataError` for prompts alone, which would be learnt and scored as texts."""
    name = found.prompt[0]
    if found.kind != "pair" and name in NO_TEXT and name != options.dataset_text_field:
        raise DataError(
            f"the data has {name!r} without what is written for it, got the columns "
            f"{data.column_names}; add it (a 'completion' beside 'prompt', an 'output' "
            f"beside 'instruction'), or, where {name!r} is the whole text, data.rename_column("
            f"{name!r}, {'messages' if found.chats else 'text'!r}); generate() continues prompts"
        )


def _with_more(data: datasets.Dataset, found: Dialogue) -> Dialogue:
    """Return the columns with those that a chat template is given, too."""
    if not found.chats and (found.kind == "text" or found.raw):
        return found
    beside = tuple(name for name in OF_TEMPLATE if name in data.column_names)
    return replace(found, beside=beside)


def _check_left(
    data: datasets.Dataset,
    found: Dialogue,
    texts: Sequence[str],
    chats: Sequence[str],
    verb: str = "learn from",
) -> None:
    """Raise `DataError` for columns that look like data and are not among those that are read."""
    left = [
        name
        for name in data.column_names
        if name not in found.columns
        and (name in (*texts, *chats, *DIALOGUES) or name.endswith(("mask", "masks")))
        and not is_row_name(name)
        and not WEIGHTS.fullmatch(name)
    ]
    if found.kind != "text" and LABELS in data.column_names:
        left.append(LABELS)
    empty = [n for n in left if getattr(data.features[n], "dtype", None) == "null"]
    if empty:
        raise DataError(f"the columns {empty} have missing values alone; fill or drop them")
    if left:
        raise DataError(
            f"a language model would {verb} {found} here, and the data has {left}, too; keep "
            f"what it is to read: drop the others with data.remove_columns({left}) (on the command "
            "line --text names the columns to read); or join them to one text, 'text', or to "
            "'prompt' and 'completion' (a system prompt is the first of the 'messages'); or "
            "tokenise them yourself, with 'labels' of -100 at what does not count"
        )
