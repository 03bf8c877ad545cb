"""Chats, and prompts with their completions, to tokens and the labels of those that are learnt."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets

from pyrolora.columns import IGNORED, LABELS
from pyrolora.data.chats.chat import ChatTemplate, Messages, messages_of, shared, template_options
from pyrolora.data.chats.dialogues import Dialogue
from pyrolora.data.chats.text_options import TextOptions
from pyrolora.data.columns import check_text
from pyrolora.data.encoding import TOO_LONG, Encoder
from pyrolora.data.examples import mapped
from pyrolora.data.padding import MASK
from pyrolora.data.tokenising import warn_cut
from pyrolora.errors import DataError

JOINT, ASKED = "\n\n", "\n"
"""The separator of the parts of a prompt; without a chat template also of prompt and answer."""


@dataclass(frozen=True)
class DialogueEncoder:
    """Turns the rows of `Dialogue` columns to tokens and labels.

    The labels are the tokens, -100 at those that are not learnt. The completion begins where the
    tokens of the prompt alone and of the whole part, as in TRL; EOS ends it.

    Attributes
    ----------
    dialogue
        The columns.
    encoder
        The encoder of texts, with the most tokens of an example.
    options
        What is learnt.
    """

    dialogue: Dialogue
    encoder: Encoder
    options: TextOptions

    def __call__(self, data: datasets.Dataset) -> datasets.Dataset:
        """Return a data set of ``input_ids``, ``labels`` and an ``attention_mask``."""
        self.check(data)
        made = mapped(
            data,
            self._columns,
            batched=True,
            with_indices=True,
            remove_columns=data.column_names,
            features=_FEATURES,
            desc="tokenising",
        )
        warn_cut(sum(made["cut"]), len(made), self.encoder.limit, self.encoder.source)
        _warn_of_nothing_left(made, self.encoder.limit)
        _warn_of_seams(sum(made["seam"]), len(made))
        return made.remove_columns(["cut", "seam"])

    def prompts(self, data: datasets.Dataset) -> list[list[int]]:
        """Return the tokens of the prompts alone, each of which will be continued."""
        rows = data.with_format(None)
        if self._in_chats:
            return [*_numbered(self._opened, rows)]
        texts = [self._prompt_text(row) for row in rows]
        return self._open_encoder(texts)["input_ids"] if texts else []

    def one(self, row: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        """Return the tokens of one row, whatever their number, and which of them are learnt."""
        if self.dialogue.kind == "text":
            made = self.encoder([row[self.dialogue.prompt[0]]])["input_ids"][0]
            return made, [True] * len(made)
        if self._in_chats:
            return self._chat_row(row)[:2]
        ((ids, learnt, _),) = self._text_rows([dict(row)])
        return ids, learnt

    # Checks --------------------------------------------------------------------------------------

    def check(self, data: datasets.Dataset) -> None:
        """Raise `DataError` for options that the columns cannot follow, and for missing texts."""
        options, dialogue = self.options, self.dialogue
        if options.completion_only_loss and dialogue.kind != "pair":
            raise DataError(
                f"completion_only_loss=True, and the data has no completion, only {dialogue}; "
                "leave it out, or choose assistant_only_loss=True for chats"
            )
        if options.assistant_only_loss and not self._in_chats:
            raise DataError(
                f"assistant_only_loss=True, and {dialogue} hold no chats of an assistant; leave it "
                "out (of prompts with completions these alone are learnt)"
            )
        if self._in_chats:
            _ = self._template
        if not dialogue.chats:  # only later parts of a prompt may be missing, as Alpaca's input
            needed = (dialogue.prompt[0], dialogue.completion)
            check_text(data, tuple(filter(None, needed)), self.encoder.tokenizer)

    @property
    def _in_chats(self) -> bool:
        """Whether a chat template writes the rows."""
        if self.dialogue.chats:
            return True
        templates = getattr(self.encoder.tokenizer, "chat_template", None)
        return self.dialogue.kind == "pair" and not self.dialogue.raw and bool(templates)

    # Rows ----------------------------------------------------------------------------------------

    def _columns(self, columns: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        values = zip(*columns.values(), strict=True)
        rows = [dict(zip(columns, row, strict=True)) for row in values]
        made = self._chat_rows(rows, numbers) if self._in_chats else self._text_rows(rows)
        limit = self.encoder.limit
        result: dict[str, list[Any]] = {name: [] for name in _FEATURES}
        for ids, learnt, seam in made:
            labels = [
                token if counts else IGNORED for token, counts in zip(ids, learnt, strict=True)
            ]
            cut = len(ids) > limit
            size = int(limit) if cut else len(ids)
            parts = (ids[:size], labels[:size], [1] * size, cut, seam)
            for column, value in zip(result.values(), parts, strict=True):
                column.append(value)
        return result

    def _text_rows(
        self, rows: list[dict[str, Any]]
    ) -> Iterator[tuple[list[int], list[bool], bool]]:
        prompts = [self._prompt_text(row) for row in rows]
        answers = [row[self.dialogue.completion] for row in rows]
        whole = Encoder(self.encoder.tokenizer, math.inf, ends=True)(
            [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        )["input_ids"]
        opened = self._open_encoder(prompts)["input_ids"]
        for before, ids in zip(opened, whole, strict=True):
            yield list(ids), *self._completion(before, ids)

    def _chat_rows(
        self, rows: list[dict[str, Any]], numbers: Sequence[int]
    ) -> Iterator[tuple[list[int], list[bool], bool]]:
        yield from _numbered(self._chat_row, rows, numbers)

    def _chat_row(self, row: Mapping[str, Any]) -> tuple[list[int], list[bool], bool]:
        template, more = self._template, template_options(row)
        before, after = self._messages(row)
        whole = [*before, *after]
        if self.options.assistant_only_loss:
            ids, said = template.said(whole, **more)
        else:
            ids = template.closed(whole, **more)
            said = [True] * len(ids)
        if not after:
            return ids, said, False
        opened = template.opened(before, **more)
        learnt, seam = self._completion(opened, ids)
        return ids, [a and b for a, b in zip(said, learnt, strict=True)], seam

    def _completion(self, before: Sequence[int], ids: Sequence[int]) -> tuple[list[bool], bool]:
        """Return which tokens are the completion's, and whether the prompt alone is another."""
        size = shared(before, ids)
        if self.options.completion_only_loss is False:
            return [True] * len(ids), False
        return [i >= size for i in range(len(ids))], size < len(before)

    def _opened(self, row: Mapping[str, Any]) -> list[int]:
        before, _ = self._messages(row)
        return self._template.opened(before, **template_options(row))

    def _messages(self, row: Mapping[str, Any]) -> tuple[Messages, Messages]:
        """Return the messages of the prompt (of the whole chat) and of the completion."""
        answer = self.dialogue.completion
        if self.dialogue.chats:
            after = messages_of(row[answer]) if answer in row else []
            return messages_of(row[self.dialogue.prompt[0]]), after
        asked = {"role": "user", "content": JOINT.join(self._parts(row))}
        after = [{"role": "assistant", "content": row[answer]}] if answer in row else []
        return [asked], after

    def _prompt_text(self, row: Mapping[str, Any]) -> str:
        if self.dialogue.raw or self.dialogue.kind == "text":
            return str(row[self.dialogue.prompt[0]])
        return JOINT.join(self._parts(row)) + ASKED

    def _parts(self, row: Mapping[str, Any]) -> list[str]:
        """Return the parts of the prompt that have a text."""
        return [row[name] for name in self.dialogue.prompt if row[name]]

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.encoder.tokenizer)

    @property
    def _open_encoder(self) -> Encoder:
        return Encoder(self.encoder.tokenizer, math.inf, open=True)


_TOKENS = datasets.List(datasets.Value("int64"))
_FEATURES = datasets.Features(
    {
        "input_ids": _TOKENS,
        LABELS: _TOKENS,
        MASK: _TOKENS,
        "cut": datasets.Value("bool"),
        "seam": datasets.Value("bool"),
    }
)


def _numbered(encode: Any, rows: Any, numbers: Sequence[int] | None = None) -> Iterator[Any]:
    """Yield the rows encoded; an error of one has its number."""
    for number, row in zip(range(len(rows)) if numbers is None else numbers, rows, strict=True):
        try:
            yield encode(row)
        except DataError as error:
            raise DataError(f"example {number}: {error}") from error


def _warn_of_nothing_left(made: datasets.Dataset, limit: float) -> None:
    """Warn of examples without a token to learn, as where a completion begins after the cut."""
    labels = enumerate(made[LABELS])
    empty = [i for i, row in labels if not any(label != IGNORED for label in row[1:])]
    if empty:
        most = f" in their first {int(limit)} tokens" if limit < TOO_LONG else ""
        warnings.warn(
            f"{len(empty)} examples have nothing to learn{most}, such as example "
            f"{', '.join(map(str, empty[:5]))}; their log-likelihood is 0. Leave them out, or, "
            "where the prompt fills them, raise max_length",
            stacklevel=2,
        )


def _warn_of_seams(count: int, total: int) -> None:
    """Warn of prompts whose end has other tokens than in the whole."""
    if count:
        warnings.warn(
            f"{count} of {total} prompts end with other tokens alone than with their completion, "
            "which then begins where the two part; end prompts between two words, or use a chat "
            "template that opens a turn as it writes it",
            stacklevel=2,
        )
