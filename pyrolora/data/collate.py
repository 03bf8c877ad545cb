"""From examples to batches of tensors: tokens, padding, nothing but inputs and labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from transformers import default_data_collator

from pyrolora import defaults
from pyrolora.adapters import is_quantised
from pyrolora.columns import INPUTS, LABELS, PLACES
from pyrolora.data.chats.text_options import TextOptions
from pyrolora.data.columns import (
    CHOICES,
    TWO_LABELS,
    check_nested,
    check_preferences,
    check_two_labels,
    has_choices,
    same_labels,
    text_columns,
)
from pyrolora.data.encoding import Encoder
from pyrolora.data.examples import as_dict, as_numbers, first_of, is_nested
from pyrolora.data.inputs import (
    context_length,
    embedded,
    encoder_for,
    table_of_positions,
    taken_by,
)
from pyrolora.data.labels import known_names, numbered
from pyrolora.data.media.illustrated import check_pictures, illustrator_of
from pyrolora.data.media.media import media_of, tokenizer_of
from pyrolora.data.media.pieces import counts_of, take_pieces
from pyrolora.data.padding import MASK, padded, padding_of
from pyrolora.data.target import Target
from pyrolora.data.token_rows import check_tokens, is_real
from pyrolora.data.tokenising import encode_texts
from pyrolora.errors import DataError

MEDIUM = "media"
"""The picture or sound of an example, on its way to a batch."""


class Collator:
    """Examples to a batch: the inputs of the network, in its precision, and one label per example.

    A task with other labels has a subclass, and names it in `Task.collator`. `prepare` calls its
    methods in this order: `check_data`, `number`, `encode`, `complete`, `check`; a loader calls the
    collator with the examples of a batch.

    Rows of several lengths are padded on the right, whatever the tokenizer's own side: padding on
    the left changes the positions of tokens, and would predict a text's first token. XLNet, which
    classifies by the last position whatever stands there, gets its padding where its tokenizer has
    it.
    """

    targets: ClassVar[str] = "a column 'labels' or 'label'"
    """The columns in which labels are looked for, in words."""
    per_token: ClassVar[bool] = False
    """Whether an example has one label per token."""
    makes_labels: ClassVar[bool] = False
    """Whether `example` makes the labels, or changes those of the data."""
    several_rows: ClassVar[bool] = False
    """Whether an example is several rows of tokens."""
    beside: ClassVar[tuple[str, ...]] = ()
    """Columns that are read although the network does not take them."""
    internal: ClassVar[frozenset[str]] = frozenset()
    """Columns that the collator makes for itself, which errors do not list."""
    ends_texts: bool = False
    """Whether EOS ends every text."""
    reads_pictures: ClassVar[bool] = False
    """Whether the pictures of a text are read, if the network takes both."""
    reads_texts: ClassVar[bool] = False
    """Whether `TextOptions` say how texts are read."""
    texts: TextOptions | None = None
    """How texts are read, where the user says it."""

    def __init__(self, network: nn.Module, tokenizer: Any) -> None:
        self.tokenizer = tokenizer_of(tokenizer)
        self.network_name = type(network).__name__
        config = getattr(network, "config", None)
        self.pads_right = getattr(config, "summary_type", None) != "last"
        self.input_name = getattr(network, "main_input_name", INPUTS)
        self.longest = table_of_positions(network)
        self.context = context_length(network)
        self.vocabulary = embedded(network)
        self.padding = padding_of(network, self.tokenizer)
        kinds = (weight.dtype for weight in network.parameters() if not is_quantised(weight.dtype))
        self.dtype = next(kinds, torch.float32)
        taken = taken_by(network)
        self.taken = taken - {PLACES}
        self.chooses_places = PLACES in taken
        of_network = (network, tokenizer, self.taken)
        self.media = illustrator_of(*of_network) or media_of(*of_network)
        self.takes_labels = True

    @property
    def read(self) -> set[str]:
        """The names of the columns that are read, beside labels."""
        columns = () if self.media is None else self.media.columns
        return {*self.taken, *counts_of(self.taken), *self.beside, *columns}

    @property
    def reading(self) -> TextOptions:
        """How texts are read."""
        return TextOptions() if self.texts is None else self.texts

    @property
    def encoder(self) -> Encoder:
        """The encoder that turns texts to tokens, as many as the network reads."""
        return encoder_for(self.tokenizer, self.context, ends=self.ends_texts)

    # A data set --------------------------------------------------------------------------------

    def check_data(self, examples: Any) -> None:
        """Raise `DataError` for data of another task."""
        check_preferences([*first_of(examples, self.input_name)])
        if has_choices(examples) and CHOICES in first_of(examples, INPUTS):
            raise DataError(
                f"the data has a column 'choices' and {self.network_name} takes none; load the "
                "model with AutoModelForMultipleChoice, or drop the column with "
                "data.remove_columns('choices')"
            )

    def check_pictures(self, data: datasets.Dataset) -> None:
        """Raise `DataError` for pictures beside texts that the network takes and nobody reads."""
        if {"input_ids", "pixel_values"} <= self.taken:
            check_pictures(data, self.network_name, self.media, texts_alone=not self.reads_pictures)

    def number(
        self, examples: Any, network: nn.Module, task: Target
    ) -> tuple[Any, list[str] | None]:
        """Return the examples with the numbers of their classes in place of names.

        The names of the classes come second, where the fit takes them over from its data.
        """
        if not isinstance(examples, datasets.Dataset):
            return examples, None
        return numbered(examples, network, task), known_names(examples, network, task)

    def encode(self, data: datasets.Dataset) -> tuple[datasets.Dataset, tuple[str, ...]]:
        """Return the data with tokens in place of raw text, and the columns that were read.

        Pictures and sounds stay as they are: a batch of them is made of its examples.
        """
        if self.media is not None:
            chosen, columns = self.media.select(data)
            if columns:
                return chosen, columns
        check_nested(data)
        read = text_columns(data)
        return (encode_texts(data, read, self.encoder) if read else data), read

    def with_labels(self, data: datasets.Dataset) -> datasets.Dataset:
        """Return the data with its labels under the name ``labels``."""
        if self.per_token:
            return data
        check_two_labels(data)
        if "label" in data.column_names and LABELS not in data.column_names:
            return data.rename_column("label", LABELS)
        return data

    def complete(self, examples: Any, *, need_labels: bool) -> Any:
        """Return the tokenised examples with what the task adds to them, such as labels."""
        return examples

    def part(self, numbers: list[int]) -> Self:
        """Return the collator for the examples with these numbers."""
        return self

    def finish(self, prediction: Any, examples: Any) -> Any:
        """Return a prediction with what only the data know of it, such as texts."""
        return prediction

    def check(self, examples: Any, labels: Tensor | None, explicit: set[str]) -> None:
        """Raise `DataError` for labels that do not fit their examples.

        ``explicit`` are the columns of the data that say which tokens count.
        """

    # An example --------------------------------------------------------------------------------

    def example(self, example: Any) -> dict[str, Any]:
        """Return one example with nothing but inputs and ``labels``, if these are taken."""
        if isinstance(example, Mapping) and not self.per_token and not same_labels(example):
            raise DataError(TWO_LABELS)
        row = as_dict(example, self.input_name)
        inputs = {name: value for name, value in row.items() if name != LABELS}
        check_tokens(inputs, self.network_name, self.longest, nested=self.several_rows)
        kept = {n: v for n, v in inputs.items() if n in {*self.taken, *counts_of(self.taken)}}
        medium = None if self.media is None else self.media.of_row(inputs)
        if any(isinstance(value, str) for value in kept.values()) or not (
            kept or medium is not None
        ):
            raise DataError(
                f"an example with {sorted(inputs)} has no input of {self.network_name} in numbers; "
                f"it takes {sorted(self.taken - self.internal)}, or raw text as a "
                "datasets.Dataset with a tokenizer"
            )
        packed = self.packs(inputs)
        made = self._mask(inputs)
        if medium is not None:
            kept[MEDIUM] = medium
        if made is not None and not packed and MASK in self.taken:
            kept[MASK] = made
        if not self.takes_labels:
            return kept
        labels = self.labels_of(row, made)
        return kept if labels is None else {**kept, LABELS: labels}

    def labels_of(self, row: Mapping[str, Any], mask: list[int] | None) -> Any:
        """Return the labels of an example, None without any.

        ``mask`` is the attention mask that was made for a row with padding and no mask.
        """
        return row.get(LABELS)

    def packs(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row holds several texts, with positions that start again."""
        return False

    def _mask(self, row: Mapping[str, Any]) -> list[int] | None:
        """Return an attention mask for an example that has padding and no mask."""
        ids = row.get("input_ids")
        if ids is None or MASK in row or MASK not in self.read or is_nested(ids):
            return None
        return self.padding.mask(ids)

    # A batch -----------------------------------------------------------------------------------

    def __call__(self, examples: list[Any]) -> dict[str, Tensor]:
        rows = [self.example(example) for example in examples]
        if any(MASK in row for row in rows):
            rows = [row if MASK in row else {**row, MASK: _ones(row)} for row in rows]
        if any(row.keys() != rows[0].keys() for row in rows):
            names = [sorted(row) for row in rows]
            raise DataError(
                f"the examples have different columns, {[*dict.fromkeys(map(str, names))]}; give "
                "all the same"
            )
        made = {**self._from_media(rows), **take_pieces(rows)}
        packed = MASK not in rows[0] and any(map(self.packs, rows))
        batch = {**self._stacked(rows), **made}
        if packed:  # transformers tells packed texts apart by their positions, unless it has a mask
            batch.pop(MASK, None)
        self._check_ids(batch.get("input_ids"))
        batch = self.converted(batch)
        if LABELS in batch:
            batch[LABELS] = whole_as_long(batch[LABELS])
        return self.with_places(batch)

    def with_places(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the batch with the places that the law reads in one row at least.

        A network takes the same places for all rows.
        """
        read = self.places_read(batch) if self.chooses_places else None
        if read is None or not read.any():
            return batch
        return {**batch, PLACES: read.any(0).nonzero().flatten().repeat(len(read), 1)}

    def places_read(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Return the places of each text whose logits the law reads, (b, T); None: all of them.

        A network that takes ``logits_to_keep`` computes no others. It is known here, where no
        device has to be waited for.
        """
        return None

    def _from_media(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Take the pictures or sounds out of the rows, and return the inputs made of them."""
        if self.media is None or MEDIUM not in rows[0]:
            return {}
        return self.media.batch([row.pop(MEDIUM) for row in rows])

    def _stacked(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the rows as one batch, padded where their lengths differ."""
        try:
            if "input_ids" in rows[0] and len({len(row["input_ids"]) for row in rows}) > 1:
                return padded(rows, self.tokenizer, right=self.pads_right)
            return dict(default_data_collator([_exact(row) for row in rows]))
        except (ValueError, TypeError, RuntimeError, KeyError) as error:
            if isinstance(error, DataError):
                raise
            shapes = {name: sorted({_shape(row.get(name)) for row in rows}) for name in rows[0]}
            raise DataError(
                f"the examples do not make one batch: their shapes are {shapes}; give all the same "
                "columns, and each of them a number per token, or the same shape everywhere"
            ) from error

    def _check_ids(self, ids: Tensor | None) -> None:
        """Raise `DataError` for tokens that have no embedding in the network."""
        if ids is None or self.vocabulary is None:
            return
        low, high = int(ids.min()), int(ids.max())
        if not 0 <= low <= high < self.vocabulary:
            raise DataError(
                f"input_ids must be in 0..{self.vocabulary - 1}, got {low}..{high}; was another "
                "tokenizer used?"
            )

    def converted(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the batch with its features in the network's precision."""
        return {
            name: t.to(self.dtype) if t.is_floating_point() and name != LABELS else t
            for name, t in batch.items()
        }


def whole_as_long(labels: Tensor) -> Tensor:
    """Return labels of any whole type as torch's losses take them."""
    return labels if labels.is_floating_point() else labels.long()


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the batch with its tensors on ``device``."""
    return {k: t.to(device) if isinstance(t, Tensor) else t for k, t in batch.items()}


def pass_rows(batch: Mapping[str, Tensor], rows: int) -> int:
    """Return the most rows (draws x examples) of one pass through the network.

    That is ``rows``, or so few that their tokens are as many as the device is at its best with.
    """
    columns = [batch[name] for name in ("input_ids", LABELS) if name in batch]
    sizes = [column[0].numel() for column in columns if column.dim() > 1]
    if not sizes:
        return rows
    on_cpu = columns[0].device.type == "cpu"
    tokens = defaults.PREDICT_TOKENS_CPU if on_cpu else defaults.PREDICT_TOKENS
    return max(1, min(rows, tokens // max(1, *sizes)))


def _exact(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row with real numbers in tensors; the collator rounds them to torch's dtype."""
    return {name: as_numbers(v) if is_real(v) else v for name, v in row.items()}


def _ones(row: Mapping[str, Any]) -> list[int]:
    return [1] * len(row["input_ids"])


def _shape(value: Any) -> tuple[int, ...]:
    try:
        return tuple(np.shape(value))
    except ValueError:  # ragged
        return (len(value),)
