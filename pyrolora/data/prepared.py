"""From what a user passes as data to batches of tensors, checked before any training step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pyrolora.columns import IGNORED, INPUTS, LABELS
from pyrolora.data.collate import (
    ChoiceCollator,
    Collator,
    collator_for,
    has_choices,
    is_nested,
    whole_as_long,
)
from pyrolora.data.columns import CHOICES, TOKEN_MASKS, check_task, unread, warn_unread
from pyrolora.data.examples import TensorExamples, as_dict, as_examples, is_plain
from pyrolora.data.labels import all_labels, hidden, known_names, no_labels, numbered
from pyrolora.data.tokenising import no_tokens, tokenised
from pyrolora.errors import DataError
from pyrolora.tasks import CausalLM, Classification, MaskedLM, Task, TokenTask

LOOKED_AT = 100
"""How many examples tell whether labels of tokens are tokens of the texts."""


@dataclass(frozen=True)
class Prepared:
    """Data ready for a loader: indexable examples, how to make a batch of them, all labels, and the
    names of their classes, where neither the network nor an earlier fit has names."""

    examples: Any
    collate: Collator
    labels: Tensor | None
    names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def loader(self, batch_size: int, order: list[int] | None = None) -> DataLoader[Any]:
        """Batches in order, or in the ``order`` of these numbers; iterating leaves the global
        random numbers alone."""
        return DataLoader(
            self.examples,
            batch_size=int(batch_size),  # torch takes none of NumPy's
            sampler=order,
            collate_fn=self.collate,
            generator=torch.Generator(),
        )

    def by_length(self) -> list[int] | None:
        """The numbers of the examples, the longest text first, so that batches of neighbours have
        little padding; None where that is no use, or cannot be told from a column of tokens."""
        lengths = token_counts(self.examples)
        if lengths is None or isinstance(self.examples, TensorExamples):
            return None
        if len({*lengths}) == 1:
            return None
        return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def prepare(
    data: Any,
    network: nn.Module,
    task: Task,
    tokenizer: Any = None,
    *,
    splits: Sequence[str] = ("train",),
    need_labels: bool = True,
    to_learn: bool = True,
) -> Prepared:
    """Check and convert ``data``.

    Parameters
    ----------
    data
        A ``datasets.Dataset``, or a ``DatasetDict``, with raw text and a tokenizer or already
        tokenised; a torch ``Dataset``; a ``DataLoader`` (its data set is taken); a list of dicts or
        of texts; a tuple ``(inputs, labels)`` or ``(inputs,)`` of tensors or texts; a tensor. For
        multiple choice, a column ``choices`` with the texts of each example beside its
        ``question``, or tokens (choices, T) an example. Of texts without labels a masked language
        model is given some tokens hidden, always the same.
    network, likelihood
        What the batches are for.
    tokenizer
        Turns raw text to tokens and pads batches.
    splits
        The first of these that a ``DatasetDict`` has is taken.
    need_labels
        Whether missing labels are an error; else examples that are labelled in part, or with -1
        alone, have none. Of tokens the labels say which count: there all or none are given.
    to_learn
        Whether a causal language model learns the texts: then EOS ends each, so that what it writes
        ends, too. Scores are of the texts as they are.

    Raises
    ------
    DataError
        For empty data, missing or impossible labels, raw text without a tokenizer, texts with
        nothing to hide, or features that are not finite.
    """
    examples = as_examples(data, getattr(network, "main_input_name", INPUTS), splits)
    if len(examples) == 0:
        raise DataError("the data is empty: it has 0 examples")
    collate = collator_for(network, task, tokenizer)
    collate.ends_texts &= to_learn
    _check_no_choices(examples, collate)
    names, columns = None, [*as_dict(examples[0], collate.input_name)]
    classes = isinstance(task, Classification) and collate.labels_are_classes
    if isinstance(examples, datasets.Dataset) and classes:
        names = known_names(examples, network, task)
        examples = numbered(examples, network, task)
    if is_plain(examples):
        explicit = {LABELS, *TOKEN_MASKS} & {*examples.column_names}
        examples, left = tokenised(examples, collate)
    else:
        explicit = {LABELS, *TOKEN_MASKS} & {*columns}
        check_task(columns)
        left = unread(columns, collate.read, tokens=collate.labels_are_tokens)
    if isinstance(task, MaskedLM):
        first = collate.example(examples[0])
        asked = not need_labels and _has_masks(examples, collate, tokenizer)
        if LABELS not in first and "input_ids" in first and not asked:
            examples = hidden(examples, collate.example, tokenizer)
    optional = not need_labels and not isinstance(task, TokenTask)
    labels = all_labels(
        examples, collate.example, partly=optional, changed=isinstance(task, CausalLM)
    )
    if labels is None and need_labels:
        raise DataError(no_labels(columns))
    if optional and isinstance(task, Classification) and _are_secret(labels):
        labels = None
    if optional and labels is None:
        collate.takes_labels = False
    if labels is not None:
        labels = whole_as_long(labels)
        task.check_labels(labels, network)
    if isinstance(task, CausalLM) and labels is not None and not explicit:
        _check_predicted(labels)
    if labels is not None and LABELS in explicit and isinstance(task, TokenTask):
        _check_token_labels(examples, collate, task, tokenizer)
    if isinstance(collate, ChoiceCollator):
        _check_choices(examples, collate, labels)
    _check_features(examples, collate)
    _check_context(examples, collate)
    warn_unread(left, collate.network_name)
    return Prepared(examples, collate, labels, names)


def _check_no_choices(examples: Any, collate: Collator) -> None:
    """Raise `DataError` for choices before a network that takes none."""
    if isinstance(collate, ChoiceCollator) or not has_choices(examples):
        return
    raw = CHOICES in as_dict(examples[0], INPUTS)
    if collate.copies_tokens and raw and is_plain(examples):
        raise DataError(
            "the data has a column 'choices', and a language model learns, or is scored on, whole "
            "texts here; join the question and the right choice in one column, 'text'. predict() "
            "and evaluate() let it choose"
        )
    if collate.labels_are_classes and raw:
        raise DataError(
            f"the data has a column 'choices' and {collate.network_name} takes none; load the "
            "model with AutoModelForMultipleChoice, or drop the column with "
            "data.remove_columns('choices')"
        )


def _check_predicted(labels: Tensor) -> None:
    """Raise `DataError` for texts without a token that others predict."""
    short = labels[:, 1:].ne(IGNORED).sum(1).eq(0).nonzero().flatten().tolist()
    if short:
        raise DataError(no_tokens(short, "no token to predict (a text's first has none before it)"))


def _check_token_labels(examples: Any, collate: Collator, task: Task, tokenizer: Any) -> None:
    """Raise `DataError` for labels that are not the tokens of the texts: tags, or tokens that are
    shifted by the user already. Of a masked model some tokens are hidden, or random ones."""
    causal = isinstance(task, CausalLM)
    mask = getattr(tokenizer, "mask_token_id", None)
    if not causal and mask is None:
        return
    same = shifted = count = 0
    for i in range(min(len(examples), LOOKED_AT)):
        row = collate.example(examples[i])
        labels, ids = torch.as_tensor(row[LABELS]), row.get("input_ids")
        if ids is None or labels.shape != torch.as_tensor(ids).shape:
            return
        ids = torch.as_tensor(ids)
        counted = labels != IGNORED
        fits = (labels == ids) | (ids == mask if mask is not None and not causal else False)
        same += int(fits[counted].sum())
        shifted += int((labels[:-1] == ids[1:])[counted[:-1]].sum())
        count += int(counted.sum())
    if 2 * same >= count:
        return
    if causal and 2 * shifted >= count:
        raise DataError(
            "the labels are the input_ids one place on; the likelihood shifts them itself, as "
            "transformers does: give each token's own id as its label, -100 where it does not count"
        )
    raise DataError(
        f"of {count} labels of tokens {same} are their tokens' ids"
        + ("" if causal else " or those of hidden tokens")
        + ": they are tags (token classification is not supported yet), or of another text, or of "
        "another tokenizer; a language model's labels are the ids of its own input"
    )


def _check_context(examples: Any, collate: Collator) -> None:
    """Warn of rows longer than what the network was made for, where it can go on."""
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
    """The number of tokens of each example, of its longest choice; None where no column says so."""
    if isinstance(examples, TensorExamples):
        ids = examples.columns.get("input_ids")
        return None if ids is None or ids.dim() < 2 else [ids.shape[-1]] * len(ids)
    if not isinstance(examples, datasets.Dataset) or "input_ids" not in examples.column_names:
        return None
    tokens = examples.select_columns(["input_ids"]).with_format("arrow")[:]["input_ids"]
    if is_nested(examples.with_format(None)[0]["input_ids"]):
        return [max(map(len, choices)) for choices in tokens.to_pylist()]
    return [*pc.list_value_length(tokens).to_pylist()]


def _are_secret(labels: Tensor | None) -> bool:
    """Whether they are the -1 of a test split whose labels are not told (GLUE's are)."""
    return labels is not None and not labels.is_floating_point() and bool((labels == -1).all())


def _has_masks(examples: Any, collate: Collator, tokenizer: Any) -> bool:
    """Whether texts say themselves, by the mask token, what is to be predicted."""
    mask = getattr(tokenizer, "mask_token_id", None)
    rows = (collate.example(examples[i])["input_ids"] for i in range(len(examples)))
    return mask is not None and any(mask in torch.as_tensor(row) for row in rows)


def _check_choices(examples: Any, collate: ChoiceCollator, labels: Tensor | None) -> None:
    """Every example has choices, and its label is one of them."""
    for i in range(len(examples)):
        _, mask = collate.choices(examples[i])
        if labels is not None and not any(mask[int(labels[i]) :][:1]):
            raise DataError(
                f"the label of example {i} is {int(labels[i])}, and its choices are "
                f"{[j for j, own in enumerate(mask) if own]}; count the choices from 0"
            )


def _check_features(examples: Any, collate: Collator) -> None:
    """Finite features: all of them where they are tensors, else the first thousand examples."""
    if isinstance(examples, TensorExamples):
        batches: list[Mapping[str, Tensor]] = [collate.converted(examples.columns)]
        collate([examples[0]])
    else:
        step, last = 100, min(len(examples), 1000)
        batches = [
            collate([examples[i] for i in range(start, min(start + step, last))])
            for start in range(0, last, step)
        ]
    seen = 0
    for batch in batches:
        size = len(next(iter(batch.values())))
        check_finite(batch, range(seen, seen + size))
        seen += size


def check_finite(batch: Mapping[str, Any], numbers: Sequence[int]) -> None:
    """Raise `DataError` for features that are not finite, of the example of that number."""
    for name, tensor in batch.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        if not torch.isfinite(tensor).all():
            bad = (~torch.isfinite(tensor)).flatten(1 if tensor.dim() > 1 else 0)
            row = int((bad.any(-1) if bad.dim() > 1 else bad).nonzero()[0])
            raise DataError(
                f"{name!r} of example {numbers[row]} is not finite (NaN or infinity); remove or "
                "fill such examples"
            )
