"""From what a user passes as data to batches of tensors, checked before any training step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data import Dataset as TorchDataset
from transformers import DataCollatorForSeq2Seq, default_data_collator

from pyrolora.errors import DataError
from pyrolora.likelihoods import CausalLM, Likelihood
from pyrolora.model import INPUTS, LABELS

# Text columns of well-known data sets, the pairs first.
TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text", "text_pair"),
    ("text",),
    ("sentence",),
    ("content",),
    ("question",),
)
LABEL_COLUMNS = (LABELS, "label")
MODEL_INPUTS = ("input_ids", "pixel_values", "inputs_embeds", "input_values", "input_features")


@dataclass(frozen=True)
class Prepared:
    """Data ready for a loader: indexable examples, and how to make a batch of them."""

    examples: Any
    collate: Callable[[list[Any]], dict[str, Tensor]]
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.examples)

    def loader(self, batch_size: int) -> DataLoader[Any]:
        """Batches in order; iterating leaves the global random numbers alone."""
        return DataLoader(
            self.examples,
            batch_size=batch_size,
            collate_fn=self.collate,
            generator=torch.Generator(),
        )


def prepare(
    data: Any,
    network: nn.Module,
    likelihood: Likelihood,
    tokenizer: Any = None,
    *,
    splits: Sequence[str] = ("train",),
    need_labels: bool = True,
) -> Prepared:
    """Check and convert ``data``.

    Parameters
    ----------
    data
        A ``datasets.Dataset``, or a ``DatasetDict`` (its ``split`` is taken), with raw text and a
        tokenizer or already tokenised; a torch ``Dataset``; a ``DataLoader``; a list of dicts or
        of texts; or a tuple ``(inputs, labels)`` of tensors, ``(inputs,)`` or a tensor
        without labels.
    network, likelihood
        What the batches are for.
    tokenizer
        Turns raw text to tokens and pads batches.
    splits
        The first of these that a ``DatasetDict`` has is taken.
    need_labels
        Whether missing labels are an error.

    Raises
    ------
    DataError
        For empty data, missing or impossible labels, raw text without a tokenizer, or features
        that are not finite.
    """
    examples = _examples(data, network, splits)
    if len(examples) == 0:
        raise DataError("the data is empty: it has 0 examples")
    if isinstance(examples, datasets.Dataset):
        examples = _tokenised(examples, network, likelihood, tokenizer)
    labels = _labels(examples)
    if labels is None and need_labels:
        raise DataError(
            f"the data has no labels: expected a column 'labels' or 'label', got "
            f"{_columns(examples)}; rename the target column, for example "
            "data.rename_column('target', 'label')"
        )
    if labels is not None:
        likelihood.check_labels(labels, network)
    collate = _Collator(tokenizer)
    _check_features(examples, collate)
    return Prepared(examples, collate, labels)


def _examples(data: Any, network: nn.Module, splits: Sequence[str]) -> Any:
    """Something with ``len`` and ``[i]``."""
    if isinstance(data, DataLoader):
        return _examples(data.dataset, network, splits)
    if isinstance(data, datasets.DatasetDict):
        for split in splits:
            if split in data:
                return data[split]
        raise DataError(
            f"the DatasetDict has no split {' or '.join(map(repr, splits))}; it has "
            f"{sorted(data)}: pass one of them, as data['{next(iter(data), 'name')}']"
        )
    if isinstance(data, datasets.IterableDataset):
        raise DataError(
            "the size of a streamed data set is unknown, and the posterior depends on it; "
            "make it a datasets.Dataset, for example with data.take(n)"
        )
    if isinstance(data, Tensor):
        data = (data,)
    if isinstance(data, tuple):
        return _TensorExamples(data, getattr(network, "main_input_name", INPUTS))
    if isinstance(data, list):
        if data and isinstance(data[0], str):
            return datasets.Dataset.from_dict({"text": data})
        if data and not isinstance(data[0], Mapping):
            raise DataError(f"a list must hold dicts or texts, got {type(data[0]).__name__}")
        return datasets.Dataset.from_list([dict(row) for row in data])
    if isinstance(data, TensorDataset):
        return _TensorExamples(data.tensors, getattr(network, "main_input_name", INPUTS))
    if hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, str):
        return data
    raise DataError(
        "data must be a datasets.Dataset or DatasetDict, a torch Dataset or DataLoader, a list of "
        f"dicts or a tuple of tensors, got {type(data).__name__}"
    )


class _TensorExamples(TorchDataset[dict[str, Tensor]]):
    """A tuple of tensors as examples."""

    def __init__(self, tensors: Sequence[Any], input_name: str) -> None:
        if not 1 <= len(tensors) <= 2:
            raise DataError(
                f"a tuple must be (inputs, labels) or (inputs,), got {len(tensors)} entries; "
                "for more inputs pass a list of dicts or a datasets.Dataset"
            )
        names = (input_name, LABELS)[: len(tensors)]
        self.columns = {n: torch.as_tensor(t) for n, t in zip(names, tensors, strict=True)}
        sizes = {name: len(tensor) for name, tensor in self.columns.items()}
        if len(set(sizes.values())) > 1:
            raise DataError(f"inputs and labels differ in length: {sizes}")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self.columns.items()}


def _tokenised(
    data: datasets.Dataset, network: nn.Module, likelihood: Likelihood, tokenizer: Any
) -> datasets.Dataset:
    """Labels under one name, text turned to tokens, and columns that are no input dropped."""
    if data.format["type"] == "custom":  # the user's own transform makes the examples
        return data
    if not isinstance(likelihood, CausalLM):  # whose labels are tokens, not a class
        data = _renamed(data)
    taken = {*inspect.signature(network.forward).parameters, INPUTS, LABELS}
    if not any(name in data.column_names for name in (*MODEL_INPUTS, INPUTS)):
        text = text_columns(data)
        if text:
            data = _tokenise(data, text, tokenizer)
    names = data.column_names
    if isinstance(likelihood, CausalLM) and LABELS not in names and "input_ids" in names:
        data = data.add_column(LABELS, list(data["input_ids"]))
    kept = [name for name in data.column_names if name in taken]
    if not set(kept) - {LABELS}:
        raise DataError(
            f"none of the columns {data.column_names} is an input of {type(network).__name__}; "
            f"it takes {sorted(taken - {LABELS})}, or raw text with a tokenizer"
        )
    return data.select_columns(kept)


def _renamed(data: datasets.Dataset) -> datasets.Dataset:
    """The data set with its labels under the one name."""
    for name in LABEL_COLUMNS[1:]:
        if name in data.column_names and LABELS not in data.column_names:
            return data.rename_column(name, LABELS)
    return data


def text_columns(data: datasets.Dataset) -> tuple[str, ...]:
    """The one or two columns of raw text that make the input."""
    text = [name for name, feature in data.features.items() if _is_text(feature)]
    for known in TEXT_COLUMNS:
        if all(name in text for name in known):
            return known
    if len(text) > 2:
        raise DataError(
            f"cannot tell which of the text columns {text} are the input; keep one or two of them "
            "with data.select_columns([...]), or tokenise the data yourself"
        )
    return tuple(text)


def _is_text(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _tokenise(data: datasets.Dataset, text: tuple[str, ...], tokenizer: Any) -> datasets.Dataset:
    if tokenizer is None:
        raise DataError(
            f"the data holds raw text ({', '.join(text)}) and there is no tokenizer; pass "
            "tokenizer=AutoTokenizer.from_pretrained(...), or tokenise the data yourself"
        )
    for name in text:
        if any(value is None for value in data[name]):
            raise DataError(f"the text column {name!r} has missing values; fill or remove them")
    return data.map(
        lambda rows: tokenizer(*(rows[name] for name in text), truncation=True),
        batched=True,
        remove_columns=[name for name in data.column_names if name != LABELS],
        desc="tokenising",
    )


def raw_labels(data: Any) -> Tensor | None:
    """The labels of training data before any network is known."""
    examples = _examples(data, nn.Module(), ("train",))
    if isinstance(examples, datasets.Dataset):
        examples = _renamed(examples)
    if len(examples) == 0:
        raise DataError("the data is empty: it has 0 examples")
    return _labels(examples)


def _labels(examples: Any) -> Tensor | None:
    """All labels: (n,), or (n, T) for sequences, ragged ones filled with -100."""
    if isinstance(examples, _TensorExamples):
        return examples.columns.get(LABELS)
    if isinstance(examples, datasets.Dataset):
        if LABELS not in examples.column_names:
            return None
        rows = examples.with_format(None)[LABELS]
    else:
        first = _as_example(examples[0])
        if LABELS not in first:
            return None
        rows = [_as_example(examples[i])[LABELS] for i in range(len(examples))]
    missing = [i for i, row in enumerate(rows) if row is None]
    if missing:
        raise DataError(f"{len(missing)} examples have no label, the first is example {missing[0]}")
    try:
        tensors = [torch.as_tensor(row) for row in rows]
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"labels must be numbers, got {rows[0]!r}; map class names to 0..C-1 first"
        ) from error
    if tensors[0].dim() == 1:
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=-100)
    return torch.stack(tensors)


def _as_example(example: Any) -> dict[str, Any]:
    """One example of a torch data set as a dict; (x, y) pairs are inputs and labels."""
    if isinstance(example, Mapping):
        example = dict(example)
        for name in LABEL_COLUMNS[1:]:
            if name in example and LABELS not in example:
                example[LABELS] = example.pop(name)
        return example
    if isinstance(example, tuple | list) and 1 <= len(example) <= 2:
        return dict(zip((INPUTS, LABELS), example, strict=False))
    raise DataError(
        f"an example must be a dict or an (input, label) pair, got {type(example).__name__}"
    )


class _Collator:
    """Examples to a batch: padded by the tokenizer where lengths differ."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, examples: list[Any]) -> dict[str, Tensor]:
        rows = [_as_example(example) for example in examples]
        if "input_ids" in rows[0] and len({len(row["input_ids"]) for row in rows}) > 1:
            return dict(self._pad(rows))
        return dict(default_data_collator(rows))

    def _pad(self, rows: list[dict[str, Any]]) -> Mapping[str, Tensor]:
        if self.tokenizer is None:
            raise DataError(
                "the token sequences differ in length and there is no tokenizer to pad them; "
                "pass tokenizer="
            )
        if getattr(self.tokenizer, "pad_token", None) is None:
            raise DataError(
                "the tokenizer has no padding token; set tokenizer.pad_token = tokenizer.eos_token"
            )
        scalar = LABELS in rows[0] and torch.as_tensor(rows[0][LABELS]).dim() == 0
        labels = [row.pop(LABELS) for row in rows] if scalar else None
        padded = DataCollatorForSeq2Seq(self.tokenizer)(rows)
        batch = {name: tensor for name, tensor in padded.items() if tensor is not None}
        if labels is not None:
            batch[LABELS] = torch.as_tensor(np.asarray(labels))
        return batch


def _check_features(examples: Any, collate: _Collator) -> None:
    """Finite features: all of them where they are tensors, else the first thousand examples."""
    if isinstance(examples, _TensorExamples):
        batches = [examples.columns]
    else:
        step, last = 100, min(len(examples), 1000)
        batches = [
            collate([examples[i] for i in range(start, min(start + step, last))])
            for start in range(0, last, step)
        ]
    seen = 0
    for batch in batches:
        for name, tensor in batch.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                bad = (~torch.isfinite(tensor)).flatten(1 if tensor.dim() > 1 else 0)
                row = int((bad.any(-1) if bad.dim() > 1 else bad).nonzero()[0])
                raise DataError(
                    f"{name!r} of example {seen + row} is not finite (NaN or infinity); "
                    "remove or fill such examples"
                )
        seen += len(next(iter(batch.values())))


def _columns(examples: Any) -> list[str]:
    if isinstance(examples, datasets.Dataset):
        return list(examples.column_names)
    return sorted(_as_example(examples[0]))
