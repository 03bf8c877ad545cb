"""The tokenizer of one text with pictures, which the processor of both makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyrolora.data.padding import MASK
from pyrolora.errors import DataError


def place_of(processor: Any) -> str:
    """Return the token that stands for a picture in a text, before the processor reads it."""
    return str(processor.image_token)


def processed(processor: Any, text: str, pictures: Sequence[Any], **options: Any) -> Any:
    """Return what a processor makes of one text and its pictures.

    Raises
    ------
    DataError
        With the processor's own words, for what it refuses.
    """
    images = [[*pictures]] if len(pictures) else None
    try:
        return processor(text=[text], images=images, **options)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        raise DataError(
            f"{type(processor).__name__} cannot read a text with {len(pictures)} pictures, "
            f"{text[:80]!r}: {str(error)[:300]}; leave it out, or change it"
        ) from error


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
        made = processed(self.processor, text, self.pictures[:count], **options)
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
