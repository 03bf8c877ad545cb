"""Texts to read and texts to write for them: their columns and their tokens."""

from __future__ import annotations

from typing import Any

import datasets

from pyrolora.columns import LABELS
from pyrolora.data.columns import (
    TARGETS,
    TRANSLATION,
    WRITTEN_PAIRS,
    check_nested,
    free_text,
    is_row_name,
)
from pyrolora.data.encoding import Encoder
from pyrolora.data.examples import is_text, mapped
from pyrolora.data.tokenising import warn_cut
from pyrolora.errors import DataError

Pair = tuple[tuple[str, ...], str]
"""The columns to read, in order, and the column to write."""


def pair_of(data: datasets.Dataset) -> Pair:
    """Return the columns of the texts to read and of the text to write.

    They are one of `WRITTEN_PAIRS`, or one column of text beside texts as ``labels`` or ``label``.

    Raises
    ------
    DataError
        For columns that are no such pair, several pairs, texts beside a pair, and translations
        without a direction.
    """
    check_direction(data)
    check_nested(data)
    texts = [n for n, f in data.features.items() if is_text(f) and not is_row_name(n)]
    named = [name for name in TARGETS if name in texts]
    if named:
        return _beside(data, named[0])
    found = [pair for pair in WRITTEN_PAIRS if {*pair[0], pair[1]} <= {*texts}]
    widest = [p for p in found if not any({*_names(p)} < {*_names(q)} for q in found)]
    if len(widest) != 1:
        raise DataError(_unknown(data, texts, widest))
    left = [name for name in free_text(data) if name not in _names(widest[0])]
    if left:
        raise DataError(
            f"the data has texts {left} beside {_told(widest[0])}, and they may belong to what is "
            f"read or not; drop them with data.remove_columns({left}), or join them to the text "
            "that is read"
        )
    return widest[0]


def source_of(data: datasets.Dataset) -> tuple[str, ...]:
    """Return the columns of the texts to read, where the text to write may be missing.

    Raises
    ------
    DataError
        For several columns of text that are not known to go together.
    """
    check_direction(data)
    texts = free_text(data)
    joined = [source for source, _ in WRITTEN_PAIRS if {*source} == {*texts}]
    if len(texts) == 1 or joined:
        return joined[0] if joined else tuple(texts)
    return pair_of(data)[0]


def check_direction(data: datasets.Dataset) -> None:
    """Raise `DataError` for translations, which do not say from which language to which."""
    feature = data.features.get(TRANSLATION)
    languages = [*feature] if isinstance(feature, dict) else getattr(feature, "languages", None)
    if not languages:
        return
    first, second = (f"{TRANSLATION}.{name}" for name in [*languages, "?"][:2])
    directions = [
        f"data.flatten().rename_columns({{{a!r}: 'source', {b!r}: 'target'}})"
        for a, b in ((first, second), (second, first))
    ]
    raise DataError(
        f"the column {TRANSLATION!r} has the languages {[*languages]} and no direction; choose one "
        f"of {' and '.join(directions)} (--text {first} --label {second} on the command line, or "
        "the other way round)"
    )


def joined_texts(data: Any, source: tuple[str, ...]) -> list[str]:
    """Return the texts to read; those of several columns are joined by line feeds.

    Columns after the first may be empty, as the input of an instruction may be.
    """
    rows = zip(*(data[name] for name in source), strict=True)
    return ["\n".join(part for part in row if part) or "" for row in rows]


def encode_pairs(
    data: datasets.Dataset, pair: Pair, reader: Encoder, writer: Encoder
) -> datasets.Dataset:
    """Return the tokens of what is read, and as ``labels`` those of what is written."""
    source, target = pair

    def encoded(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        made, written = reader(joined_texts(rows, source)), writer(rows[target])
        return {**made, LABELS: written["input_ids"], "cut_targets": written["cut"]}

    made = mapped(data, encoded, batched=True, remove_columns=data.column_names, desc="tokenising")
    warn_cut(sum(made["cut"]), len(made), reader.limit)
    warn_cut(sum(made["cut_targets"]), len(made), writer.limit, what="targets")
    return made.remove_columns(["cut", "cut_targets"])


def _names(pair: Pair) -> tuple[str, ...]:
    return (*pair[0], pair[1])


def _told(pair: Pair) -> str:
    return f"{' and '.join(map(repr, pair[0]))} with {pair[1]!r}"


def _beside(data: datasets.Dataset, target: str) -> Pair:
    """Return the one column of text beside the texts to write."""
    source = free_text(data)
    if len(source) != 1:
        raise DataError(
            f"the texts to write are in {target!r}, and one column of text has to be beside it, "
            f"got {source}; keep one, or join them to one column 'text'"
        )
    return (source[0],), target


def _unknown(data: datasets.Dataset, texts: list[str], found: list[Pair]) -> str:
    """Return the message for columns that are no pair of texts, or several."""
    if found:
        return (
            f"the texts to read and to write may be {' or '.join(map(_told, found))}; drop the "
            "columns of the others with data.remove_columns([...])"
        )
    known = ", ".join("+".join(source) + "/" + target for source, target in WRITTEN_PAIRS)
    hint = "rename them 'source' and 'target' (--text and --label on the command line)"
    if len(texts) < 2:
        kinds = {name: getattr(data.features[name], "dtype", "") for name in data.column_names}
        return (
            "a sequence-to-sequence network needs a column of texts to read and one of texts to "
            f"write, got {kinds}; {hint}; where there is nothing to write yet, generate() writes"
        )
    return (
        f"cannot tell which of the text columns {texts} are read and which is written; {hint}, and "
        f"drop the rest. Known pairs are {known}"
    )
