"""From what a user passes as data to batches of tensors, checked before any training step."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from pyrolora.columns import INPUTS, LABELS
from pyrolora.data.chats.packing import POSITIONS, packed_rows
from pyrolora.data.collate import Collator, whole_as_long
from pyrolora.data.columns import TOKEN_MASKS, check_columns, check_task, unread, warn_unread
from pyrolora.data.encoding import TOO_LONG
from pyrolora.data.examples import (
    TensorExamples,
    as_examples,
    first_of,
    is_nested,
    is_plain,
    is_text,
)
from pyrolora.data.finite import check_features, check_row
from pyrolora.data.inputs import MODEL_INPUTS
from pyrolora.data.labels import all_labels, no_labels
from pyrolora.data.spans import EXAMPLE
from pyrolora.data.target import Target
from pyrolora.errors import DataError


def at_random(n: int, count: int, seed: int) -> list[int]:
    """Return so many of the numbers 0..n−1, those of the seed."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    picked: list[int] = order[:count].tolist()
    return picked


@dataclass(frozen=True)
class Prepared:
    """Data ready for a loader: indexable examples, their collator, and all labels.

    ``names`` are those of the classes, where neither the network nor an earlier fit has names.
    ``texts`` is the number of texts in rows that have several; None: a row is an example. ``whole``
    is the number of examples of which these are a part; None: they are all.
    """

    examples: Any
    collate: Collator
    labels: Tensor | None
    names: list[str] | None = None
    texts: int | None = None
    whole: int | None = None

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def num_examples(self) -> int:
        """n, the number of examples that these are, or stand for, however many share a row."""
        own = len(self) if self.texts is None else self.texts
        return own if self.whole is None else self.whole

    @property
    def rows(self) -> float:
        """The number of rows that n examples fill."""
        return self.num_examples * len(self) / (self.texts or len(self))

    def loader(self, batch_size: int, order: list[int] | None = None) -> DataLoader[Any]:
        """Return a loader of batches in order, or in the ``order`` of these numbers.

        Iterating leaves the global random numbers alone.
        """
        return DataLoader(
            self.examples,
            batch_size=int(batch_size),  # torch refuses NumPy's integers
            sampler=order,
            collate_fn=self.collate,
            generator=torch.Generator(),
        )

    def part(self, numbers: list[int]) -> Prepared:
        """Return the examples with these numbers."""
        rows = torch.tensor(numbers, dtype=torch.long)
        examples: Any = Subset(self.examples, numbers)
        if isinstance(self.examples, datasets.Dataset):
            examples = self.examples.select(numbers)
        elif isinstance(self.examples, TensorExamples):
            examples = TensorExamples({n: t[rows] for n, t in self.examples.columns.items()})
        labels = None if self.labels is None else self.labels[rows]
        return replace(self, examples=examples, labels=labels)

    @cached_property
    def of_rows(self) -> Sequence[int]:
        """The number of the example that each row is of."""
        if isinstance(self.examples, datasets.Dataset) and EXAMPLE in self.examples.column_names:
            numbers: list[int] = self.examples.with_format(None)[EXAMPLE][:]
            return numbers
        return range(len(self))

    def parted(self, number: int, seed: int) -> tuple[Prepared, Prepared]:
        """Return the examples without a random number of them, and these.

        The rows of one example, such as windows of a long context, stay together.
        """
        of_rows = self.of_rows
        numbers = sorted({*of_rows})
        chosen = {numbers[i] for i in at_random(len(numbers), number, seed)}
        rest = {*numbers} - chosen
        kept, back = (
            replace(
                self.part([row for row, number in enumerate(self.of_rows) if number in part]),
                collate=self.collate.part(sorted(part)),
            )
            for part in (rest, chosen)
        )
        return kept, back

    def by_length(self) -> list[int] | None:
        """Return the numbers of the examples, the longest text first, for batches of like length.

        None where that is no use, or where no column of tokens tells the lengths.
        """
        lengths = token_counts(self.examples)
        if lengths is None or isinstance(self.examples, TensorExamples):
            return None
        if len({*lengths}) == 1:
            return None
        return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def prepare(
    data: Any,
    network: nn.Module,
    task: Target,
    tokenizer: Any = None,
    *,
    splits: Sequence[str] = ("train",),
    need_labels: bool = True,
    to_learn: bool = True,
    to_pack: bool = False,
) -> Prepared:
    """Check and convert ``data``.

    Parameters
    ----------
    data
        A ``datasets.Dataset``, or a ``DatasetDict``, with raw text and a tokenizer or already
        tokenised; a torch ``Dataset``; a ``DataLoader`` (its data set is taken); a list of dicts or
        of texts; a tuple ``(inputs, labels)`` or ``(inputs,)`` of tensors or texts; a tensor. For
        multiple choice, a column ``choices`` with the texts of each example beside its
        ``question``, or tokens (choices, T) per example. For token classification, a column
        ``tokens`` with the words of each example beside its ``ner_tags``, or tokens with a label
        per token. For sequence to sequence, a column that is read and one that is written
        (`columns.WRITTEN_PAIRS`), or tokens with ``labels`` of any length. A masked language model
        is given texts without labels with some tokens hidden, always the same.
    network, task
        The network and the task that the batches are for.
    tokenizer
        Turns raw text to tokens and pads batches.
    splits
        The first of these that a ``DatasetDict`` has is taken.
    need_labels
        Whether missing labels are an error; otherwise examples that are labelled in part, or with
        -1 alone, have none. Labels of tokens say which tokens count: there all examples have
        labels, or none has.
    to_learn
        Whether a causal language model learns the texts: then EOS ends each, so that what it writes
        ends, too. Scores are of the texts as they are.
    to_pack
        Whether several texts share a row, where the task's `TextOptions` say so.

    Raises
    ------
    DataError
        For empty data, missing or impossible labels, raw text without a tokenizer, texts with
        nothing to hide, or features that are not finite.
    """
    examples = as_examples(data, getattr(network, "main_input_name", INPUTS), splits)
    if len(examples) == 0:
        raise DataError("the data is empty: it has 0 examples")
    collate: Collator = task.collator(network, tokenizer)
    collate.ends_texts &= to_learn
    collate.texts = task.texts
    collate.check_data(examples)
    names, columns = None, [*first_of(examples, collate.input_name)]
    if task.names_classes:
        examples, names = collate.number(examples, network, task)
    columns = _names(examples, columns)
    explicit = {LABELS, *TOKEN_MASKS} & {*columns}
    if is_plain(examples):
        examples, left = _tokenised(examples, collate)
    else:
        check_task({*columns} - {*collate.beside})
        left = unread(columns, collate.read, tokens=collate.per_token)
    examples = collate.complete(examples, need_labels=need_labels)
    labels = _labels(examples, collate, task, need_labels=need_labels, columns=columns)
    if labels is not None:
        task.check_labels(labels, network)
    collate.check(examples, labels, explicit)
    check_features(examples, collate)
    _check_context(examples, collate)
    warn_unread(left, collate.network_name)
    prepared = Prepared(examples, collate, labels, names)
    packing = to_pack and task.texts is not None and task.texts.packing
    return _packed(prepared) if packing else prepared


def _packed(data: Prepared) -> Prepared:
    """Return data with several texts per row."""
    collate, limit = data.collate, data.collate.encoder.limit
    if POSITIONS not in collate.taken:
        raise DataError(
            f"packing=True, and {collate.network_name} takes no position_ids, by which the texts "
            "of a row are told apart; leave packing out"
        )
    if limit >= TOO_LONG:
        raise DataError(
            f"packing=True fills rows up to max_length, and there is none, nor has "
            f"{collate.network_name} a limit of its own; set TextOptions(max_length=...)"
        )
    rows = packed_rows(data.examples, collate.example, int(limit))
    labels = all_labels(rows, collate.example, partly=False, changed=True)
    return replace(data, examples=rows, labels=labels, texts=len(data))


def _names(examples: Any, columns: list[str]) -> list[str]:
    return examples.column_names if is_plain(examples) else columns


def _tokenised(data: datasets.Dataset, collate: Collator) -> tuple[datasets.Dataset, list[str]]:
    """Return the tokens and other inputs of the data, and the names of the columns left out."""
    data = collate.with_labels(data)
    check_task({*data.column_names} - {*collate.beside})
    names = data.column_names
    read: tuple[str, ...] = ()
    texts = INPUTS in names and is_text(data.features[INPUTS])
    if not any(name in names for name in (*MODEL_INPUTS, *([] if texts else [INPUTS]))):
        collate.check_pictures(data)
        data, read = collate.encode(data)
    kept = [name for name in data.column_names if name in {*collate.read, LABELS}]
    if not set(kept) - {LABELS}:
        check_columns(data)
        raise DataError(
            f"none of the columns {data.column_names} is an input of {collate.network_name}; "
            f"it takes {sorted(collate.taken - collate.internal)}, or raw text with a tokenizer"
        )
    of_texts = [
        name for name in names if collate.per_token and name == "label" and name not in read
    ]
    if data.format["type"] is not None:  # a format with columns has chosen among them
        names = [name for name in names if name in data.format["columns"]]
    left = unread(names, read or kept, tokens=collate.per_token)
    return data.select_columns(kept), [*of_texts, *left]


def _labels(
    examples: Any, collate: Collator, task: Target, *, need_labels: bool, columns: list[str]
) -> Tensor | None:
    """Return all labels; None where there are none and none are needed."""
    optional = not need_labels and not collate.per_token
    labels = all_labels(
        examples,
        collate.example,
        partly=optional,
        changed=collate.makes_labels,
        check=partial(check_row, dtype=collate.dtype),
    )
    if labels is None and need_labels:
        raise DataError(no_labels(columns, collate.targets))
    if optional and task.discrete and _are_secret(labels):
        labels = None
    if optional and labels is None:
        collate.takes_labels = False
    return None if labels is None else whole_as_long(labels)


def _are_secret(labels: Tensor | None) -> bool:
    """Return whether all labels are -1, as in test splits with secret labels, such as GLUE's."""
    return labels is not None and not labels.is_floating_point() and bool((labels == -1).all())


def _check_context(examples: Any, collate: Collator) -> None:
    """Warn of rows longer than the network was made for, where it can go on."""
    sizes = token_counts(examples)
    long = 0 if sizes is None else int((np.asarray(sizes) > collate.context).sum())
    if long:
        warnings.warn(
            f"{long} examples have more than {int(collate.context)} tokens, for which "
            f"{collate.network_name} was not made; tokenise with truncation=True, "
            f"max_length={int(collate.context)}",
            stacklevel=3,
        )


def token_counts(examples: Any) -> list[int] | None:
    """Return the tokens per example, or of its longest choice; None where no column says so."""
    if isinstance(examples, TensorExamples):
        ids = examples.columns.get("input_ids")
        return None if ids is None or ids.dim() < 2 else [ids.shape[-1]] * len(ids)
    if not isinstance(examples, datasets.Dataset) or "input_ids" not in examples.column_names:
        return None
    tokens = examples.with_format("arrow", columns=["input_ids"])[:]["input_ids"]
    if is_nested(tokens[0].as_py()):
        return [max(map(len, choices)) for choices in tokens.to_pylist()]
    return [*pc.list_value_length(tokens).to_pylist()]
