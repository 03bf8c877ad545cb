"""From what a user passes as data to batches of tensors, checked before any training step."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
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
from pyrolora.likelihoods import IGNORED, CausalLM, Likelihood
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
MODEL_INPUTS = ("input_ids", "pixel_values", "inputs_embeds", "input_values", "input_features")


@dataclass(frozen=True)
class Prepared:
    """Data ready for a loader: indexable examples, how to make a batch of them, all labels."""

    examples: Any
    collate: Collator
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
        A ``datasets.Dataset``, or a ``DatasetDict``, with raw text and a tokenizer or already
        tokenised; a torch ``Dataset``; a ``DataLoader`` (its data set is taken); a list of dicts or
        of texts; a tuple ``(inputs, labels)`` or ``(inputs,)`` of tensors or texts; a tensor.
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
    examples = _examples(data, getattr(network, "main_input_name", INPUTS), splits)
    if len(examples) == 0:
        raise DataError("the data is empty: it has 0 examples")
    collate = Collator(network, likelihood, tokenizer)
    if isinstance(examples, datasets.Dataset) and examples.format["type"] != "custom":
        examples = _tokenised(examples, collate)
    labels = _labels(examples, collate)
    if labels is None and need_labels:
        raise DataError(
            f"the data has no labels: expected a column 'labels' or 'label', got "
            f"{sorted(_as_dict(examples[0], INPUTS))}; rename the target column, for example "
            "data.rename_column('target', 'label')"
        )
    if labels is not None:
        likelihood.check_labels(labels, network)
    _check_features(examples, collate)
    return Prepared(examples, collate, labels)


def raw_labels(data: Any) -> Tensor | None:
    """The labels of training data, before any network is known."""
    examples = _examples(data, INPUTS, ("train",))
    if len(examples) == 0:
        raise DataError("the data is empty: it has 0 examples")
    return _column(examples, lambda example: _as_dict(example, INPUTS))


# What may be passed ---------------------------------------------------------------------------


def _examples(data: Any, input_name: str, splits: Sequence[str]) -> Any:
    """Something with ``len`` and ``[i]``."""
    if isinstance(data, DataLoader):
        return _examples(data.dataset, input_name, splits)
    if isinstance(data, datasets.DatasetDict):
        for split in splits:
            if split in data:
                return data[split]
        raise DataError(
            f"the DatasetDict has no split {' or '.join(map(repr, splits))}; it has "
            f"{sorted(data)}: pass one of them, as data['{next(iter(data), 'name')}']"
        )
    if isinstance(data, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise DataError(
            "the size of a streamed data set is unknown, and the posterior depends on it; "
            "make it a datasets.Dataset, for example with data.take(n)"
        )
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, Tensor):
        data = (data,)
    if isinstance(data, tuple):
        return _from_tuple(data, input_name)
    if isinstance(data, list):
        return _from_list(data)
    if isinstance(data, str):
        raise DataError(
            f"one text is no data set; write it as a list: [{data[:40]!r}]. A file is read with "
            "datasets.Dataset.from_json or from_csv"
        )
    indexable = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if indexable and not isinstance(data, str | bytes | Mapping) and not hasattr(data, "columns"):
        return data
    raise DataError(
        "data must be a datasets.Dataset or DatasetDict, a torch Dataset or DataLoader, a list of "
        f"dicts or texts, or a tuple of tensors, got {type(data).__name__}; a table of columns "
        "becomes one with datasets.Dataset.from_dict(...) or from_pandas(...)"
    )


def _from_list(rows: list[Any]) -> datasets.Dataset:
    if rows and isinstance(rows[0], str):
        return datasets.Dataset.from_dict({"text": rows})
    if rows and not isinstance(rows[0], Mapping):
        raise DataError(f"a list must hold dicts or texts, got {type(rows[0]).__name__}")
    return datasets.Dataset.from_list([dict(row) for row in rows])


def _from_tuple(parts: tuple[Any, ...], input_name: str) -> Any:
    if not 1 <= len(parts) <= 2:
        raise DataError(
            f"a tuple must be (inputs, labels) or (inputs,), got {len(parts)} entries; "
            "for more inputs pass a list of dicts or a datasets.Dataset"
        )
    texts = isinstance(parts[0], list | tuple) and len(parts[0]) and isinstance(parts[0][0], str)
    names = ("text" if texts else input_name, LABELS)
    sizes = {name: len(part) for name, part in zip(names, parts, strict=False)}
    if len(set(sizes.values())) > 1:
        raise DataError(f"inputs and labels differ in length: {sizes}")
    if texts:
        columns = dict(zip(names, map(list, parts), strict=False))
        return datasets.Dataset.from_dict(columns)
    try:
        tensors = [torch.as_tensor(part) for part in parts]
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"a tuple must hold tensors or lists of numbers: {error}") from error
    if tensors[0].dtype == torch.float64:  # NumPy's default; networks compute in float32
        tensors[0] = tensors[0].to(torch.get_default_dtype())
    return _TensorExamples(dict(zip(names, tensors, strict=False)))


class _TensorExamples(TorchDataset[dict[str, Tensor]]):
    """Named tensors as examples."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self.columns.items()}


def _as_dict(example: Any, input_name: str) -> dict[str, Any]:
    """One example as a dict with ``labels``; of an (x, y) pair, x is the network's main input."""
    if isinstance(example, Mapping):
        example = dict(example)
        if "label" in example and LABELS not in example:
            example[LABELS] = example.pop("label")
        return example
    if isinstance(example, tuple | list) and 1 <= len(example) <= 2:
        return dict(zip((input_name, LABELS), example, strict=False))
    raise DataError(
        f"an example must be a dict or an (input, label) pair, got {type(example).__name__}"
    )


# Batches --------------------------------------------------------------------------------------


class Collator:
    """Examples to a batch: what the network takes, padded by the tokenizer where lengths differ."""

    def __init__(self, network: nn.Module, likelihood: Likelihood, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.network_name = type(network).__name__
        self.input_name = getattr(network, "main_input_name", INPUTS)
        self.taken = {*inspect.signature(network.forward).parameters, INPUTS}
        self.tokens_are_labels = isinstance(likelihood, CausalLM)

    def example(self, example: Any) -> dict[str, Any]:
        """One example with nothing but inputs and ``labels``; a language model's labels are its
        tokens, less the padding, unless they are given."""
        row = _as_dict(example, self.input_name)
        labels = row.pop(LABELS, None)
        kept = {name: value for name, value in row.items() if name in self.taken}
        if any(isinstance(value, str) for value in kept.values()) or not kept:
            raise DataError(
                f"an example with {sorted(row)} has no input of {self.network_name} in numbers; "
                f"it takes {sorted(self.taken)}, or raw text as a datasets.Dataset with a tokenizer"
            )
        if labels is None and self.tokens_are_labels and "input_ids" in kept:
            ids = torch.as_tensor(kept["input_ids"])
            mask = torch.as_tensor(kept.get("attention_mask", torch.ones_like(ids)))
            labels = ids.masked_fill(mask == 0, IGNORED).tolist()
        return kept if labels is None else {**kept, LABELS: labels}

    def __call__(self, examples: list[Any]) -> dict[str, Tensor]:
        rows = [self.example(example) for example in examples]
        if "input_ids" in rows[0] and len({len(row["input_ids"]) for row in rows}) > 1:
            return self._padded(rows)
        return dict(default_data_collator(rows))

    def _padded(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        if self.tokenizer is None:
            raise DataError(
                "the token sequences differ in length and there is no tokenizer to pad them; "
                "pass tokenizer="
            )
        if getattr(self.tokenizer, "pad_token", None) is None:
            raise DataError(
                "the tokenizer has no padding token; set tokenizer.pad_token = tokenizer.eos_token"
            )
        scalar = LABELS in rows[0] and np.ndim(rows[0][LABELS]) == 0
        labels = [row.pop(LABELS) for row in rows] if scalar else None
        padded = DataCollatorForSeq2Seq(self.tokenizer)(rows)
        batch = {name: tensor for name, tensor in padded.items() if tensor is not None}
        if labels is not None:
            batch[LABELS] = torch.as_tensor(np.asarray(labels))
        return batch


def _tokenised(data: datasets.Dataset, collate: Collator) -> datasets.Dataset:
    """Text turned to tokens, and columns that are no input dropped."""
    names = data.column_names
    if "label" in names and LABELS not in names and not collate.tokens_are_labels:
        data = data.rename_column("label", LABELS)
    if not any(name in data.column_names for name in (*MODEL_INPUTS, INPUTS)):
        text = text_columns(data)
        if text:
            data = _tokenise(data, text, collate.tokenizer)
    kept = [name for name in data.column_names if name in {*collate.taken, LABELS}]
    if not set(kept) - {LABELS}:
        raise DataError(
            f"none of the columns {data.column_names} is an input of {collate.network_name}; "
            f"it takes {sorted(collate.taken)}, or raw text with a tokenizer"
        )
    return data.select_columns(kept)


def text_columns(data: datasets.Dataset) -> tuple[str, ...]:
    """The one or two columns of raw text that make the input."""
    text = [name for name, feature in data.features.items() if _is_text(feature)]
    for known in TEXT_COLUMNS:
        if all(name in text for name in known):
            return known
    if len(text) > 1:
        raise DataError(
            f"cannot tell which of the text columns {text} are the input; keep one with "
            "data.select_columns([...]), name a pair 'text' and 'text_pair', or tokenise the data "
            "yourself"
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


# Checks ---------------------------------------------------------------------------------------


def _labels(examples: Any, collate: Collator) -> Tensor | None:
    """All labels, (n,), or (n, T) for sequences, ragged ones filled with -100."""
    return _column(examples, collate.example)


def _column(examples: Any, as_row: Any) -> Tensor | None:
    if isinstance(examples, _TensorExamples) and LABELS in examples.columns:
        return examples.columns[LABELS]
    if LABELS not in as_row(examples[0]):
        return None
    plain = isinstance(examples, datasets.Dataset) and examples.format["type"] != "custom"
    if plain and LABELS in examples.column_names:
        rows = list(examples.with_format(None)[LABELS])
    else:
        rows = [as_row(examples[i]).get(LABELS) for i in range(len(examples))]
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
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=IGNORED)
    return torch.stack(tensors)


def _check_features(examples: Any, collate: Collator) -> None:
    """Finite features: all of them where they are tensors, else the first thousand examples."""
    if isinstance(examples, _TensorExamples):
        batches: list[Mapping[str, Tensor]] = [examples.columns]
        collate([examples[0]])
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
