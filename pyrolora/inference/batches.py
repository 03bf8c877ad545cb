"""From examples to batches of tensors: text to tokens, padding, nothing but inputs and labels."""

from __future__ import annotations

import inspect
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, default_data_collator

from pyrolora.errors import DataError
from pyrolora.inference.examples import as_dict, is_text
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
        row = as_dict(example, self.input_name)
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


def tokenised(data: datasets.Dataset, collate: Collator) -> datasets.Dataset:
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
    text = [name for name, feature in data.features.items() if is_text(feature)]
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
