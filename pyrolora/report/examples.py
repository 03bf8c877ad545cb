"""Examples of a report as people read them: their text, the names of their classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import nn

from pyrolora import defaults
from pyrolora.columns import INPUTS
from pyrolora.data.columns import CHOICES, TARGETS, context_columns, text_columns, words_column
from pyrolora.data.examples import as_dict, as_examples, is_plain
from pyrolora.data.labels import network_classes
from pyrolora.data.tokenising import choice_texts
from pyrolora.errors import DataError

LONGEST = 400
"""The most characters of a text that are shown."""
IDS = "input_ids"


class Examples:
    """Data as it was passed, example by example.

    Parameters
    ----------
    data
        As in `Posterior.predict`.
    network
        The network, whose configuration has the names of the classes.
    tokenizer
        The tokenizer that turns tokens back into text where the data holds no text; may be None.
    names
        The names of the classes by number, where the network has none.
    """

    def __init__(
        self,
        data: Any,
        network: nn.Module,
        tokenizer: Any = None,
        names: Mapping[int, str] | None = None,
    ) -> None:
        self.input_name = getattr(network, "main_input_name", INPUTS)
        self.rows = as_examples(data, self.input_name, defaults.SCORE_SPLITS)
        self.tokenizer = tokenizer
        self.plain = is_plain(self.rows)
        if self.plain:
            self.rows = self.rows.with_format(None)
        self.names = names or network_classes(network)
        self.columns = self._columns()

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, i: int) -> dict[str, Any]:
        """Return one example as a dict of its columns."""
        return as_dict(self.rows[i], self.input_name)

    def only(self, i: int) -> Any:
        """Return one example as data that `Posterior.predict` takes."""
        if self.plain:
            return self.rows.select([i])
        row = self.row(i).items()
        return [{name: v.tolist() if hasattr(v, "tolist") else v for name, v in row}]

    def text(self, i: int) -> str:
        """Return the text of an example, its tokens as text, or its number."""
        row = self.row(i)
        parts = [_joined(row[name]) for name in self.columns]
        if not parts and self.tokenizer is not None and IDS in row and np.ndim(row[IDS][0]) == 0:
            parts = [self.tokenizer.decode(row[IDS], skip_special_tokens=True)]
        return _shortened(" | ".join(parts)) if parts else f"example {i}"

    def choices(self, i: int) -> list[str]:
        """Return the texts of the choices that an example offers; empty where there are none."""
        row = self.row(i)
        if CHOICES in row:
            return [_shortened(text) for text in choice_texts(row[CHOICES])]
        nested = IDS in row and len(row[IDS]) > 0 and np.ndim(row[IDS][0]) > 0
        if nested and self.tokenizer is not None:
            return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in row[IDS]]
        return []

    def label(self, i: int, number: int) -> str:
        """Return the name of a class, or the text of a choice."""
        choices = self.choices(i)
        if choices:
            return f"{number}: {choices[number]}" if number < len(choices) else str(number)
        return self.names.get(number, str(number))

    def lengths(self) -> tuple[str, list[int]]:
        """Return the unit of length (words, tokens or numbers) and the length of each input."""
        if self.columns:
            texts = zip(*map(self._values, self.columns), strict=True)
            return "words", [sum(len(_joined(text).split()) for text in row) for row in texts]
        name = IDS if IDS in self.row(0) else self.input_name
        return ("tokens" if name == IDS else "numbers"), [*map(_size, self._values(name))]

    def _values(self, name: str) -> Iterable[Any]:
        """Return the values of a column, of the rows that have it."""
        if self.plain:
            return self.rows[name] if name in self.rows.column_names else ()
        rows = (self.row(i) for i in range(len(self)))
        return (row[name] for row in rows if name in row)

    def _columns(self) -> tuple[str, ...]:
        """Return the columns of text that are inputs."""
        if not len(self.rows):
            return ()
        if self.plain:
            choosing = CHOICES in self.rows.column_names
            try:
                texts = (context_columns if choosing else text_columns)(self.rows)
                words = words_column(self.rows)
                return tuple(texts) if texts or words is None else (words,)
            except DataError:  # tokens beside several texts: all texts are shown
                pass
        row = self.row(0)
        return tuple(name for name, v in row.items() if isinstance(v, str) and name not in TARGETS)


def _joined(text: Any) -> str:
    """Return a text, or a list of words, as one string."""
    return " ".join(map(str, text)) if isinstance(text, list) else str(text)


def _shortened(text: str) -> str:
    """Return a text, cut where it is too long to be shown."""
    return text if len(text) <= LONGEST else text[:LONGEST].rstrip() + "…"


def _size(value: Any) -> int:
    """Return how many numbers a value holds, however they are nested."""
    if isinstance(value, Mapping):
        return 0
    if hasattr(value, "numel"):
        return int(value.numel())
    return sum(map(_size, value)) if isinstance(value, list | tuple) else int(np.size(value))
