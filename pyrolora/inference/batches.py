"""From examples to batches of tensors: text to tokens, padding, nothing but inputs and labels."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from itertools import chain
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, default_data_collator

from pyrolora import defaults
from pyrolora.adapters import is_quantised
from pyrolora.errors import DataError
from pyrolora.inference.examples import as_dict, as_numbers, is_text
from pyrolora.likelihoods import (
    CHOICE_MASK,
    IGNORED,
    CausalLM,
    Likelihood,
    MultipleChoice,
    TokenLikelihood,
)
from pyrolora.model import INPUTS, LABELS

CHOICES = "choices"
REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

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
# Of multiple choice, what stands before each choice; joined in this order.
CONTEXT_COLUMNS = ("context", "text", "sentence", "question", "question_stem")
MODEL_INPUTS = ("input_ids", "pixel_values", "inputs_embeds", "input_values", "input_features")


class Collator:
    """Examples to a batch: what the network takes, in its precision, padded by the tokenizer where
    lengths differ.

    On the right, whatever the tokenizer's own side: what is left of a token changes its position,
    and gives the first token a padding to be predicted from. XLNet, which classifies by the last
    position whatever stands there, gets its padding where its tokenizer has it.
    """

    def __init__(self, network: nn.Module, likelihood: Likelihood, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.network_name = type(network).__name__
        config = getattr(network, "config", None)
        self.pads_right = getattr(config, "summary_type", None) != "last"
        self.input_name = getattr(network, "main_input_name", INPUTS)
        self.longest = table_of_positions(network)
        kinds = (weight.dtype for weight in network.parameters() if not is_quantised(weight.dtype))
        self.dtype = next(kinds, torch.float32)
        parameters = inspect.signature(network.forward).parameters.values()
        self.takes_labels = True
        self.taken = {INPUTS} | {p.name for p in parameters if p.kind not in REST}
        self.labels_are_tokens = isinstance(likelihood, TokenLikelihood)
        self.copies_tokens = isinstance(likelihood, CausalLM)
        self.labels_are_classes = not isinstance(likelihood, TokenLikelihood | MultipleChoice)

    def tokens(self, *texts: list[str]) -> Mapping[str, Any]:
        """Texts, or pairs of texts, to tokens, cut at the tokenizer's limit or at the network's."""
        limit = getattr(self.tokenizer, "model_max_length", math.inf)
        shorter = self.longest is not None and self.longest < limit
        return self.tokenizer(*texts, truncation=True, max_length=self.longest if shorter else None)

    def example(self, example: Any) -> dict[str, Any]:
        """One example with nothing but inputs and ``labels``, if these are taken; a causal language
        model's labels are its tokens, less the padding and what a padding would predict, unless
        they are given."""
        row = as_dict(example, self.input_name)
        labels = row.pop(LABELS, None)
        self._check_length(row)
        kept = {name: value for name, value in row.items() if name in self.taken}
        if any(isinstance(value, str) for value in kept.values()) or not kept:
            raise DataError(
                f"an example with {sorted(row)} has no input of {self.network_name} in numbers; "
                f"it takes {sorted(self.taken)}, or raw text as a datasets.Dataset with a tokenizer"
            )
        if not self.takes_labels:
            return kept
        if labels is None and self.copies_tokens and "input_ids" in kept:
            ids = torch.as_tensor(kept["input_ids"])
            seen = torch.as_tensor(kept.get("attention_mask", torch.ones_like(ids))) != 0
            seen[1:] &= seen[:-1].clone()
            labels = ids.masked_fill(~seen, IGNORED).tolist()
        return kept if labels is None else {**kept, LABELS: labels}

    def _check_length(self, row: Mapping[str, Any]) -> None:
        ids = row.get("input_ids")
        if self.longest is None or ids is None:
            return
        size = max(map(len, ids)) if _is_nested(ids) else len(ids)
        if size > self.longest:
            raise DataError(
                f"an example has {size} tokens, and {self.network_name} has {self.longest} "
                "positions; tokenise with truncation=True, "
                f"max_length={self.longest}, or pass the raw text"
            )

    def __call__(self, examples: list[Any]) -> dict[str, Tensor]:
        rows = [self.example(example) for example in examples]
        if "input_ids" in rows[0] and len({len(row["input_ids"]) for row in rows}) > 1:
            batch = self._padded(rows)
        else:
            batch = dict(default_data_collator([_exact(row) for row in rows]))
        batch = self.converted(batch)
        if LABELS in batch:
            batch[LABELS] = whole_as_long(batch[LABELS])
        return batch

    def converted(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Features in the network's precision."""
        return {
            name: t.to(self.dtype) if t.is_floating_point() and name != LABELS else t
            for name, t in batch.items()
        }

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
        tokenizer = self.tokenizer
        if self.pads_right and tokenizer.padding_side != "right":
            tokenizer = copy.copy(tokenizer)
            tokenizer.padding_side = "right"
        padded = DataCollatorForSeq2Seq(tokenizer)(rows)
        batch = {name: tensor for name, tensor in padded.items() if tensor is not None}
        if labels is not None:
            batch[LABELS] = torch.as_tensor(np.asarray(labels))
        return batch


def _exact(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with real numbers in tensors: the collator rounds them to torch's default dtype."""
    return {name: as_numbers(v) if _is_real(v) else v for name, v in row.items()}


def _is_real(value: Any) -> bool:
    while isinstance(value, list | tuple) and len(value):
        value = value[0]
    return isinstance(value, float)


class ChoiceCollator(Collator):
    """Examples with several choices, whose inputs are (choices, ...), to a batch of inputs
    (b, choices, ...) and ``choice_mask`` (b, choices).

    Where a choice is missing or masked stands a copy of the example's first one: of an empty row
    the network might make NaN.
    """

    def __init__(self, network: nn.Module, likelihood: Likelihood, tokenizer: Any) -> None:
        super().__init__(network, likelihood, tokenizer)
        self.taken.add(CHOICE_MASK)

    def choices(self, example: Any) -> tuple[list[dict[str, Any]], list[bool]]:
        """The inputs of each choice, and which of them can be chosen."""
        row = self.example(example)
        row.pop(LABELS, None)
        given = row.pop(CHOICE_MASK, None)
        sizes = {name: len(value) if _is_nested(value) else 0 for name, value in row.items()}
        size = max(sizes.values(), default=0)
        mask = [True] * size if given is None else [bool(own) for own in given]
        if {*sizes.values(), len(mask)} != {size} or not any(mask):
            raise DataError(
                "an example of multiple choice needs one list of tokens a choice, (choices, T), "
                f"under each of its inputs, and a choice to choose; got {sizes} choices"
            )
        first = mask.index(True)
        picked = [j if own else first for j, own in enumerate(mask)]
        return [{name: value[j] for name, value in row.items()} for j in picked], mask

    def __call__(self, examples: list[Any]) -> dict[str, Tensor]:
        rows, masks = zip(*map(self.choices, examples), strict=True)
        size = max(map(len, masks))
        flat = chain.from_iterable((*row, *row[:1] * (size - len(row))) for row in rows)
        batch = super().__call__(list(flat))
        batch = {name: t.unflatten(0, (len(rows), size)) for name, t in batch.items()}
        batch[CHOICE_MASK] = torch.tensor([[*own, *[False] * (size - len(own))] for own in masks])
        labels = [self.example(example).get(LABELS) for example in examples]
        if labels[0] is not None:
            batch[LABELS] = torch.as_tensor(np.asarray(labels))
        return batch


def table_of_positions(network: nn.Module) -> int | None:
    """The most tokens that the network's table of positions has room for; None without a table.

    RoBERTa and its kin count positions from the number of the padding on.
    """
    size: Any = getattr(getattr(network, "config", None), "max_position_embeddings", None)
    for name, module in network.named_modules() if isinstance(size, int) else ():
        own = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("position" in own or own == "wpe"):
            taken = 0 if module.padding_idx is None else module.padding_idx + 1
            return min(int(size), module.num_embeddings - taken)
    return None


def context_length(network: nn.Module) -> float:
    """The most tokens that the network reads: its table's, or what it was made for."""
    table = table_of_positions(network)
    config = getattr(network, "config", None)
    return getattr(config, "max_position_embeddings", math.inf) if table is None else table


def whole_as_long(labels: Tensor) -> Tensor:
    """Labels of any whole type as torch's losses take them."""
    return labels if labels.is_floating_point() else labels.long()


def collator_for(network: nn.Module, likelihood: Likelihood, tokenizer: Any) -> Collator:
    """The collator that the likelihood needs."""
    kind = ChoiceCollator if isinstance(likelihood, MultipleChoice) else Collator
    return kind(network, likelihood, tokenizer)


def has_choices(examples: Any) -> bool:
    """Whether examples have several choices each, in raw text or in tokens."""
    row = as_dict(examples[0], INPUTS) if len(examples) else {}
    return CHOICES in row or _is_nested(row.get("input_ids"))


def _is_nested(value: Any) -> bool:
    try:
        return len(value) > 0 and len(value[0]) >= 0
    except TypeError:  # of a number, or of a tensor that is one
        return False


def tokenised(data: datasets.Dataset, collate: Collator) -> datasets.Dataset:
    """Text turned to tokens, and columns that are no input dropped."""
    names = data.column_names
    if "label" in names and LABELS not in names and not collate.labels_are_tokens:
        data = data.rename_column("label", LABELS)
    if not any(name in data.column_names for name in (*MODEL_INPUTS, INPUTS)):
        if isinstance(collate, ChoiceCollator):
            data = _tokenise_choices(data, collate)
        elif text := text_columns(data):
            data = _tokenise(data, text, collate)
    kept = [name for name in data.column_names if name in {*collate.taken, LABELS}]
    if not set(kept) - {LABELS}:
        _check_columns(data)
        raise DataError(
            f"none of the columns {data.column_names} is an input of {collate.network_name}; "
            f"it takes {sorted(collate.taken)}, or raw text with a tokenizer"
        )
    return data.select_columns(kept)


def _check_columns(data: datasets.Dataset) -> None:
    """Say what is wrong with columns that would be text."""
    for name in dict.fromkeys(chain.from_iterable(TEXT_COLUMNS)):
        feature = data.features.get(name)
        if isinstance(feature, datasets.Value) and feature.dtype == "null":
            raise DataError(f"the text column {name!r} has missing values alone")
        if isinstance(feature, datasets.List | datasets.LargeList | datasets.Sequence):
            raise DataError(
                f"the column {name!r} holds lists; join them to texts, or tokenise them yourself, "
                "with is_split_into_words=True"
            )


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


def check_text(data: datasets.Dataset, text: tuple[str, ...], tokenizer: Any) -> None:
    if tokenizer is None:
        raise DataError(
            f"the data holds raw text ({', '.join(text)}) and there is no tokenizer; pass "
            "tokenizer=AutoTokenizer.from_pretrained(...), or tokenise the data yourself"
        )
    for name in text:
        if any(value is None for value in data[name]):
            raise DataError(f"the text column {name!r} has missing values; fill or remove them")


def _tokenise(data: datasets.Dataset, text: tuple[str, ...], collate: Collator) -> datasets.Dataset:
    check_text(data, text, collate.tokenizer)
    return data.with_format(None).map(
        lambda rows: collate.tokens(*(rows[name] for name in text)),
        batched=True,
        remove_columns=[name for name in data.column_names if name != LABELS],
        desc="tokenising",
    )


def context_columns(data: datasets.Dataset) -> tuple[str, ...]:
    """The columns of raw text that stand before each choice."""
    text = [
        name
        for name, feature in data.features.items()
        if is_text(feature) and name not in ("label", LABELS)
    ]
    known = tuple(name for name in CONTEXT_COLUMNS if name in text)
    if not known and len(text) != 1:
        raise DataError(
            f"multiple choice needs a text column that the choices belong to, one of "
            f"{', '.join(CONTEXT_COLUMNS)}, got {text}; rename it: "
            "data.rename_column(name, 'question')"
        )
    return known or tuple(text)


def _tokenise_choices(data: datasets.Dataset, collate: Collator) -> datasets.Dataset:
    """Pairs (context, choice), in the nesting of the choices."""
    if CHOICES not in data.column_names:
        raise DataError(
            f"multiple choice needs a column {CHOICES!r} with a list of texts an example, or "
            f"tokens (choices, T) as 'input_ids', got the columns {data.column_names}"
        )
    context = context_columns(data)
    check_text(data, context, collate.tokenizer)

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        choices = [choice_texts(own) for own in rows[CHOICES]]
        contexts = [" ".join(parts) for parts in zip(*(rows[c] for c in context), strict=True)]
        encoded = collate.tokens(
            [text for text, own in zip(contexts, choices, strict=True) for _ in own],
            list(chain.from_iterable(choices)),
        )
        made: dict[str, list[Any]] = {}
        for name, values in encoded.items():
            flat = iter(values)
            made[name] = [[next(flat) for _ in own] for own in choices]
        if LABELS in rows:
            pairs = zip(rows[LABELS], rows[CHOICES], strict=True)
            made[LABELS] = [choice_number(label, own) for label, own in pairs]
        return made

    return data.with_format(None).map(
        encode, batched=True, remove_columns=data.column_names, desc="tokenising"
    )


def choice_texts(choices: Any) -> list[str]:
    """The texts of an example's choices: a list, or ARC's {"text": [...], "label": [...]}."""
    texts = choices.get("text") if isinstance(choices, Mapping) else choices
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise DataError(
            f"{CHOICES!r} must be a list of at least one text an example, or a dict with such a "
            f"list as 'text', got {choices!r}"
        )
    return texts


def choice_number(label: Any, choices: Any) -> Any:
    """The number of the right choice, where ARC has its name ("A" to "E", or "1" to "5")."""
    names = choices.get("label") if isinstance(choices, Mapping) else None
    if not isinstance(label, str) or names is None:
        return label
    if label not in names:
        raise DataError(f"the label {label!r} is none of its example's choices, {names}")
    return names.index(label)


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on ``device``."""
    return {k: t.to(device) if isinstance(t, Tensor) else t for k, t in batch.items()}


def pass_rows(batch: Mapping[str, Tensor], rows: int) -> int:
    """The most rows (draws x examples) of one pass through the network: ``rows``, or so few that
    their tokens are as many as the device is at its best with."""
    ids = batch.get("input_ids")
    if ids is None:
        return rows
    on_cpu = ids.device.type == "cpu"
    tokens = defaults.PREDICT_TOKENS_CPU if on_cpu else defaults.PREDICT_TOKENS
    return max(1, min(rows, tokens // max(1, ids[0].numel())))
