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
from pyrolora.data.columns import is_list
from pyrolora.data.completions import DialogueEncoder
from pyrolora.data.dialogues import Dialogue, dialogue_of, prompt_of
from pyrolora.data.encoding import Encoder
from pyrolora.data.media import Pictures
from pyrolora.data.padding import MASK
from pyrolora.data.pictures import as_picture, is_picture
from pyrolora.data.pieces import COUNT, PER_TOKEN, joined
from pyrolora.data.text_options import TextOptions
from pyrolora.errors import DataError

ILLUSTRATED = "illustrated"
"""The column, beside tokens, that holds the pictures of a row, or the chat that they are in."""


def illustrator_of(network: nn.Module, processor: Any, taken: set[str]) -> Illustrator | None:
    """Return the reader of texts with pictures, for a network and a processor of both."""
    both = isinstance(processor, ProcessorMixin) and hasattr(processor, "image_processor")
    reads = both and "pixel_values" in taken and "input_ids" in taken
    return Illustrator(network, processor, taken) if reads else None


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
        """Return the inputs of the pictures of each row, in pieces (`pyrolora.data.pieces`)."""
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

        made = data.with_format(None).map(
            encode,
            with_indices=True,
            remove_columns=[name for name in data.column_names if name != kept],
            desc="tokenising",
        )
        if kept is not None:
            made = made.rename_column(kept, ILLUSTRATED)
        read = (*dialogue.columns, *(() if source is None else (source,)))
        return made, read

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
        beside = [] if source is None else pictures_in(row[source])
        if inside and beside:
            raise DataError(
                f"its pictures stand in its messages and in the column {source!r}; keep one"
            )
        if any(part is None for part in (*inside, *beside)):
            raise DataError("one of its pictures is missing; fill it or leave the example out")
        return [as_picture(value, 3) for value in (*inside, *beside)]

    def _dialogue_encoder(
        self, dialogue: Dialogue, pictures: list[Any], encoder: Encoder, options: TextOptions
    ) -> DialogueEncoder:
        tokenizer = RowTokenizer(self.whole, pictures)
        return DialogueEncoder(
            dialogue, replace(encoder, tokenizer=tokenizer, limit=math.inf), options
        )

    def _pixels(self, pictures: Sequence[Any]) -> dict[str, Tensor]:
        """Return what the processor makes of the pictures of one row beside its tokens."""
        opened = [as_picture(value, 3) for value in pictures]
        text = place_of(self.whole) * len(opened)
        made = self.whole(text=[text], images=[opened], return_tensors="pt")
        kept = {n: v for n, v in made.items() if n not in ("input_ids", MASK, *PER_TOKEN)}
        return {n: v for n, v in self._kept(kept).items() if not n.endswith(COUNT)}


_ENDLESS = Encoder(None, math.inf)


def _item(feature: Any) -> Any:
    """Return the feature of a column's values, or of the items of its lists."""
    return feature.feature if is_list(feature) else feature


def place_of(processor: Any) -> str:
    """Return the token that stands for a picture in a text, before the processor reads it."""
    return str(processor.image_token)


def pictures_in(value: Any) -> list[Any]:
    """Return the pictures of a value: one, a list, or those in the contents of messages.

    None stands for one that is missing.
    """
    return [*_pictures_in(value)]


def _pictures_in(value: Any) -> Iterator[Any]:
    if is_picture(value) or isinstance(value, str | bytes):
        yield value
    elif isinstance(value, Mapping) and "role" in value:
        content = value.get("content")
        for part in content if isinstance(content, list) else ():
            own = [part[name] for name in ("image", "path") if part.get(name) is not None]
            if part.get("type") == "image" and own:
                yield own[0]
            elif "url" in str(part.get("type")) or part.get("url") is not None:
                raise DataError(
                    "a message names the address of a picture, and none is fetched; give the "
                    "picture itself, {'type': 'image', 'image': ...}"
                )
    elif isinstance(value, Mapping):
        yield value if {"bytes", "path"} & {*value} else None
    elif isinstance(value, list | tuple):
        for part in value:
            yield from [None] if part is None else _pictures_in(part)
    elif value is not None:
        yield value


class RowTokenizer:
    """The tokenizer of one text and its pictures, by the processor of both."""

    def __init__(self, processor: Any, pictures: Sequence[Any]) -> None:
        self.processor, self.pictures = processor, pictures
        self.places = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor.tokenizer, name)

    def __call__(self, text: str | list[str], **options: Any) -> dict[str, Any]:
        special = {name: v for name, v in options.items() if name == "add_special_tokens"}
        texts = [text] if isinstance(text, str) else text
        rows = [self._encoded(one, special) for one in texts]
        columns = {name: [row[name] for row in rows] for name in ("input_ids", MASK)}
        return {n: v[0] for n, v in columns.items()} if isinstance(text, str) else columns

    def check(self) -> None:
        """Raise `DataError` for pictures that have no place in the text."""
        if self.places != len(self.pictures):
            raise DataError(
                f"it has {len(self.pictures)} pictures, and its text has places for {self.places}; "
                f"put {place_of(self.processor)!r} where each stands, or, in messages, an entry "
                "{'type': 'image'}"
            )

    @property
    def chat_template(self) -> Any:
        """The template of the processor, or else of its tokenizer."""
        own = getattr(self.processor, "chat_template", None)
        return own or self.processor.tokenizer.chat_template

    def get_chat_template(self, **_: Any) -> str:
        """Return the template as text."""
        template = self.chat_template
        return str(template["default"] if isinstance(template, Mapping) else template)

    def apply_chat_template(self, messages: Any, *, tokenize: bool, **options: Any) -> Any:
        """Return what the template makes of messages, each with a list of contents."""
        laid_out = self._laid_out(messages)
        if not tokenize:
            return self.processor.apply_chat_template(laid_out, tokenize=False, **options)
        made = self.processor.apply_chat_template([laid_out], tokenize=True, **options)
        return {name: column[0] for name, column in made.items() if name == "assistant_masks"}

    def _encoded(self, text: str, options: Mapping[str, Any]) -> dict[str, Any]:
        count = text.count(place_of(self.processor))
        if count > len(self.pictures):
            raise DataError(
                f"its text has places for {count} pictures ({place_of(self.processor)!r}), and it "
                f"has {len(self.pictures)}"
            )
        self.places = max(self.places, count)
        images = [[*self.pictures[:count]]] if count else None
        made = self.processor(text=[text], images=images, **options)
        return {name: [int(number) for number in made[name][0]] for name in ("input_ids", MASK)}

    def _laid_out(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return messages with the pictures in their places; those of a column stand first."""
        pictures = iter(self.pictures)
        marked = any(part.get("type") == "image" for m in messages for part in _parts(m))
        asked = next((m for m in messages if m.get("role") == "user"), None)
        made = []
        for message in messages:
            parts = [
                {"type": "image", "image": next(pictures, None)} if p["type"] == "image" else p
                for p in _parts(message)
            ]
            if message is asked and not marked:
                parts = [*({"type": "image", "image": picture} for picture in pictures), *parts]
            made.append({**message, "content": parts})
        return made


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the contents of a message as a list."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [dict(part) for part in content or ()]
