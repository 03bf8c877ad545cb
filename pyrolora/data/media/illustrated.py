"""Texts with pictures: their tokens and labels, and the inputs that a processor makes of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from transformers import ProcessorMixin

from pyrolora.columns import IGNORED, LABELS, PICTURES
from pyrolora.data.chats.completions import DialogueEncoder
from pyrolora.data.chats.dialogues import Dialogue, dialogue_of, prompt_of
from pyrolora.data.chats.text_options import TextOptions
from pyrolora.data.columns import is_list
from pyrolora.data.encoding import Encoder
from pyrolora.data.examples import mapped
from pyrolora.data.media.media import Pictures
from pyrolora.data.media.pictures import as_picture, checked_array, is_picture
from pyrolora.data.media.pieces import COUNT, PER_TOKEN, joined
from pyrolora.data.media.row_tokenizer import RowTokenizer, place_of, processed
from pyrolora.data.padding import MASK
from pyrolora.errors import DataError

ILLUSTRATED = "illustrated"
"""The column, beside tokens, that holds the pictures of a row, or the chat that they are in."""


def illustrator_of(network: nn.Module, processor: Any, taken: set[str]) -> Illustrator | None:
    """Return the reader of texts with pictures, for a network and a processor of both."""
    both = isinstance(processor, ProcessorMixin) and hasattr(processor, "image_processor")
    reads = both and "pixel_values" in taken and "input_ids" in taken
    return Illustrator(network, processor, taken) if reads else None


def check_pictures(data: datasets.Dataset, reader: str, media: Any, *, texts_alone: bool) -> None:
    """Raise `DataError` for pictures that a network takes beside texts and nobody reads."""
    column = Illustrator.column_of(data)
    if column is None or (isinstance(media, Illustrator) and not texts_alone):
        return
    why, remedy = "this task reads texts alone", ""
    if not texts_alone:
        why = "there is no processor of texts and pictures"
        remedy = "pass tokenizer=AutoProcessor.from_pretrained(...), or "
    raise DataError(
        f"the data has pictures, {column!r}, which {reader} takes, and {why}; {remedy}drop them "
        f"with data.remove_columns({column!r})"
    )


class Illustrator(Pictures):
    """Texts with pictures, of which the processor of a network with both inputs makes its batches.

    Pictures stand in a column ``images`` (or ``image``), or in the contents of messages. The tokens
    of a picture, which the processor puts into the text, are no text to predict. Tokens are stored;
    pixels are made batch by batch.
    """

    names = ("images", *PICTURES)

    def __init__(self, network: nn.Module, processor: Any, taken: set[str]) -> None:
        super().__init__(network, processor, taken)
        self.whole = processor

    @property
    def columns(self) -> tuple[str, ...]:
        return (ILLUSTRATED,)

    def select(self, data: datasets.Dataset) -> tuple[datasets.Dataset, tuple[str, ...]]:
        return data, ()

    def of_row(self, row: Mapping[str, Any]) -> list[Any] | None:
        return pictures_in(row[ILLUSTRATED]) if ILLUSTRATED in row else None

    def batch(self, values: Sequence[Any]) -> dict[str, Tensor]:
        """Return the inputs of the pictures of each row, as `pieces`."""
        made = [self._pixels(pictures) if len(pictures) else {} for pictures in values]
        names = dict.fromkeys(name for row in made for name in row)
        result: dict[str, Tensor] = {}
        for name in names:
            like = next(row[name] for row in made if name in row)
            result |= joined(name, [row.get(name, like[:0]) for row in made])
        return result

    # Data ----------------------------------------------------------------------------------------

    def encode(
        self, data: datasets.Dataset, encoder: Encoder, options: TextOptions
    ) -> tuple[datasets.Dataset, tuple[str, ...]]:
        """Return tokens, labels and the pictures of a data set, and the columns that were read.

        Raises
        ------
        DataError
            For pictures without a place in their text, or places without a picture, and for
            pictures whose tokens are beyond the most tokens of an example.
        """
        source = self.column_of(data)
        texts = data if source is None else data.remove_columns(source)
        dialogue = dialogue_of(texts, options)
        if dialogue is None:
            return data, ()
        self._dialogue_encoder(dialogue, [], encoder, options).check(texts)
        chats = dialogue.prompt[0] if dialogue.chats else None
        kept = source or chats

        def encode(row: dict[str, Any], number: int) -> dict[str, Any]:
            try:
                return self._row(row, source, dialogue, encoder, options)
            except DataError as error:
                raise DataError(f"example {number}: {error}") from error

        made = mapped(
            data,
            encode,
            with_indices=True,
            remove_columns=[name for name in data.column_names if name != kept],
            desc="tokenising",
        )
        if kept is not None:
            made = made.rename_column(kept, ILLUSTRATED)
        read = (*dialogue.columns, *(() if source is None else (source,)))
        return made, read

    def check_texts(self, texts: Sequence[str]) -> None:
        """Raise `DataError` for texts with places for pictures, which come without any."""
        if any(place_of(self.whole) in text for text in texts):
            raise DataError(
                f"a prompt has a place for a picture, {place_of(self.whole)!r}, and no picture; "
                "give rows, [{'image': picture, 'text': prompt}]"
            )

    def prompts(self, data: datasets.Dataset) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """Return the tokens of the prompts in rows, and the other inputs of each."""
        source = self.column_of(data)
        texts = data if source is None else data.remove_columns(source)
        dialogue, ids, beside = prompt_of(texts), [], []
        for i, row in enumerate(data.with_format(None)):
            pictures = self._pictures(row, source, dialogue)
            encode = self._dialogue_encoder(dialogue, pictures, _ENDLESS, TextOptions())
            (tokens,) = encode.prompts(texts.select([i]))
            encode.encoder.tokenizer.check()
            ids.append(torch.tensor(tokens))
            types = {name: torch.tensor(column) for name, column in self._types(tokens).items()}
            beside.append({**types, **(self._pixels(pictures) if pictures else {})})
        others: dict[str, list[Tensor]] = {}
        for name in dict.fromkeys(name for row in beside for name in row):
            like = next(row[name] for row in beside if name in row)
            others[name] = [row.get(name, like[:0]) for row in beside]
        return ids, others

    @classmethod
    def column_of(cls, data: datasets.Dataset) -> str | None:
        """Return the column with pictures, or with lists of them, if there is one."""
        features = data.features
        typed = [n for n, feature in features.items() if isinstance(_item(feature), datasets.Image)]
        named = [n for n in cls.names if n in features]
        found = typed or named
        if len(found) > 1:
            raise DataError(
                f"cannot tell which of the columns {found} has the pictures; drop the others with "
                "data.remove_columns(...), or make lists of them in one column 'images'"
            )
        return next(iter(found), None)

    # Rows ----------------------------------------------------------------------------------------

    def _row(
        self,
        row: Mapping[str, Any],
        source: str | None,
        dialogue: Dialogue,
        encoder: Encoder,
        options: TextOptions,
    ) -> dict[str, Any]:
        pictures = self._pictures(row, source, dialogue)
        encode = self._dialogue_encoder(dialogue, pictures, encoder, options)
        ids, learnt = encode.one(row)
        encode.encoder.tokenizer.check()
        size = int(min(len(ids), encoder.limit))
        marks = {*self.whole.image_token_ids}
        if marks.intersection(ids[size:]):
            raise DataError(
                f"it has {len(ids)} tokens, those of its pictures included, and of these some are "
                f"beyond the first {size}, which are read; make the pictures smaller, or raise "
                "max_length, texts=TextOptions(max_length=...)"
            )
        counted = [a and token not in marks for token, a in zip(ids, learnt, strict=True)]
        labels = [t if counts else IGNORED for t, counts in zip(ids, counted, strict=True)]
        ids = ids[:size]
        made = {"input_ids": ids, LABELS: labels[:size], MASK: [1] * size}
        return made | self._types(ids)

    def _types(self, ids: list[int]) -> dict[str, list[int]]:
        """Return the types of tokens that the network takes: 1 at those of pictures."""
        names = [name for name in PER_TOKEN if name in self.taken]
        marks = {*self.whole.image_token_ids}
        return {name: [int(token in marks) for token in ids] for name in names}

    def _pictures(
        self, row: Mapping[str, Any], source: str | None, dialogue: Dialogue
    ) -> list[Any]:
        columns = (*dialogue.prompt, dialogue.completion) if dialogue.chats else ()
        inside = [p for name in columns for p in pictures_in(row.get(name))]
        if source is not None and row[source] is None:
            raise DataError(
                f"its {source!r} is missing; leave it out, or, of a text without pictures, give an "
                "empty list in 'images'"
            )
        beside = [] if source is None else pictures_in(row[source])
        if inside and beside:
            raise DataError(
                f"its pictures stand in its messages and in the column {source!r}; keep one"
            )
        if any(part is None for part in (*inside, *beside)):
            raise DataError("one of its pictures is missing; fill it or leave the example out")
        return self._opened([*inside, *beside])

    def _opened(self, values: Sequence[Any]) -> list[Any]:
        """Return pictures as the processor takes them."""
        pictures = [as_picture(value, 3) for value in values]
        rescales = bool(getattr(self.processor, "do_rescale", False))
        for picture in pictures:
            checked_array(picture, 3, rescales=rescales)
        return pictures

    def _dialogue_encoder(
        self, dialogue: Dialogue, pictures: list[Any], encoder: Encoder, options: TextOptions
    ) -> DialogueEncoder:
        tokenizer = RowTokenizer(self.whole, pictures)
        return DialogueEncoder(
            dialogue, replace(encoder, tokenizer=tokenizer, limit=math.inf), options
        )

    def _pixels(self, pictures: Sequence[Any]) -> dict[str, Tensor]:
        """Return what the processor makes of the pictures of one row beside its tokens."""
        opened = self._opened(pictures)
        text = place_of(self.whole) * len(opened)
        made = processed(self.whole, text, opened, return_tensors="pt")
        kept = {n: v for n, v in made.items() if n not in ("input_ids", MASK, *PER_TOKEN)}
        return {n: v for n, v in self._kept(kept).items() if not n.endswith(COUNT)}


_ENDLESS = Encoder(None, math.inf)


def _item(feature: Any) -> Any:
    """Return the feature of a column's values, or of the items of its lists."""
    return feature.feature if is_list(feature) else feature


def pictures_in(value: Any) -> list[Any]:
    """Return the pictures of a value: one, a list, or those in the contents of messages.

    None stands for one that is missing.
    """
    return [*_pictures_in(value)]


def _sizes(value: Any) -> list[int]:
    """Return the sizes of an array that is lists of numbers; [] for other values."""
    sizes = []
    while isinstance(value, list | tuple) and value:
        sizes.append(len(value))
        value = value[0]
    return sizes if isinstance(value, int | float) else []


def _is_array(sizes: Sequence[int]) -> bool:
    """Return whether an array of these sizes is one picture: (H, W), (H, W, C) or (1, H, W).

    Raises
    ------
    DataError
        For what may be one of several channels, or several grey ones.
    """
    if len(sizes) == 3 and sizes[2] > 4 and 1 < sizes[0] <= 4:
        raise DataError(
            f"an array {tuple(sizes)} may be one picture with its channels first, or {sizes[0]} "
            "grey ones; make a list of it, or of these in the form (height, width, 1)"
        )
    return len(sizes) == 2 or (len(sizes) == 3 and (sizes[2] <= 4 or sizes[0] == 1))


def _pictures_in(value: Any) -> Iterator[Any]:
    if is_picture(value) or isinstance(value, str | bytes):
        yield value
    elif isinstance(value, Mapping) and "role" in value:
        yield from _pictures_of(value.get("content"))
    elif isinstance(value, Mapping):
        yield value if {"bytes", "path"} & {*value} else None
    elif isinstance(value, list | tuple):
        sizes = _sizes(value)
        if len(sizes) == 4:
            yield from value
            return
        if _is_array(sizes):
            yield value
            return
        for part in value:
            yield from [None] if part is None else _pictures_in(part)
    elif value is not None:
        yield value


def _pictures_of(content: Any) -> Iterator[Any]:
    """Yield the pictures among the parts of a message."""
    for part in content if isinstance(content, list) else ():
        own = [part[name] for name in ("image", "path") if part.get(name) is not None]
        if part.get("type") == "image" and own:
            yield own[0]
        elif "url" in str(part.get("type")) or part.get("url") is not None:
            raise DataError(
                "a message names the address of a picture, and none is fetched; give the picture "
                "itself, {'type': 'image', 'image': ...}"
            )
