"""From examples to batches of tensors: text to tokens, padding, nothing but inputs and labels."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, default_data_collator

from pyrolora import defaults
from pyrolora.adapters import is_quantised
from pyrolora.columns import CHOICE_MASK, INPUTS, LABELS
from pyrolora.data.columns import CHOICES, TOKEN_MASKS, TWO_LABELS, same_labels
from pyrolora.data.columns import text_columns as text_columns
from pyrolora.data.encoding import Encoder
from pyrolora.data.examples import as_dict, as_numbers
from pyrolora.data.padding import MASK, padded, padding_of
from pyrolora.data.token_labels import is_packed, token_labels
from pyrolora.errors import DataError
from pyrolora.tasks import CausalLM, MultipleChoice, Task, TokenTask

REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
MODEL_INPUTS = ("input_ids", "pixel_values", "inputs_embeds", "input_values", "input_features")
# What a network with **kwargs is given, if the data have it.
KNOWN_INPUTS = (
    *MODEL_INPUTS,
    *(MASK, "token_type_ids", "position_ids", "pixel_mask", "image_sizes", "image_grid_thw"),
    *("bbox", "global_attention_mask"),
)


class Collator:
    """Examples to a batch: what the network takes, in its precision, padded by the tokenizer where
    lengths differ.

    On the right, whatever the tokenizer's own side: what is left of a token changes its position,
    and gives the first token a padding to be predicted from. XLNet, which classifies by the last
    position whatever stands there, gets its padding where its tokenizer has it.
    """

    def __init__(self, network: nn.Module, task: Task, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.network_name = type(network).__name__
        config = getattr(network, "config", None)
        self.pads_right = getattr(config, "summary_type", None) != "last"
        self.input_name = getattr(network, "main_input_name", INPUTS)
        self.longest = table_of_positions(network)
        self.context = context_length(network)
        self.vocabulary = embedded(network)
        self.padding = padding_of(network, tokenizer)
        kinds = (weight.dtype for weight in network.parameters() if not is_quantised(weight.dtype))
        self.dtype = next(kinds, torch.float32)
        self.taken = taken_by(network)
        self.takes_labels = True
        self.labels_are_tokens = isinstance(task, TokenTask)
        self.copies_tokens = isinstance(task, CausalLM)
        self.ends_texts = self.copies_tokens
        self.labels_are_classes = not isinstance(task, TokenTask | MultipleChoice)

    @property
    def read(self) -> set[str]:
        """The names of an example's parts that are read, beside labels."""
        return self.taken | ({MASK, *TOKEN_MASKS} if self.copies_tokens else set())

    @property
    def encoder(self) -> Encoder:
        """Turns texts to tokens, as many as the network reads."""
        return encoder_for(self.tokenizer, self.context, ends=self.ends_texts)

    def example(self, example: Any) -> dict[str, Any]:
        """One example with nothing but inputs and ``labels``, if these are taken; a causal language
        model's labels are its tokens, less the padding and what a padding would predict, and less
        those that a mask of its completion leaves out, unless they are given."""
        if isinstance(example, Mapping) and not self.labels_are_tokens and not same_labels(example):
            raise DataError(TWO_LABELS)
        row = as_dict(example, self.input_name)
        unlabelled = LABELS not in row
        labels = row.pop(LABELS, None)
        self._check_tokens(row)
        kept = {name: value for name, value in row.items() if name in self.taken}
        if any(isinstance(value, str) for value in kept.values()) or not kept:
            raise DataError(
                f"an example with {sorted(row)} has no input of {self.network_name} in numbers; "
                f"it takes {sorted(self.taken)}, or raw text as a datasets.Dataset with a tokenizer"
            )
        packed = self.copies_tokens and is_packed(row)
        made = self._mask(row)
        if made is not None and not packed:
            kept[MASK] = made
        kept = {name: value for name, value in kept.items() if name in self.taken}
        if not self.takes_labels:
            return kept
        if self.copies_tokens and "input_ids" in kept and (unlabelled or labels is not None):
            labels = token_labels(row, labels, made)
        return kept if labels is None else {**kept, LABELS: labels}

    def _mask(self, row: Mapping[str, Any]) -> list[int] | None:
        """An attention mask, where the example has padding and none."""
        ids = row.get("input_ids")
        useful = MASK in self.taken or self.copies_tokens
        if ids is None or MASK in row or not useful or is_nested(ids):
            return None
        return self.padding.mask(ids)

    def _check_tokens(self, row: Mapping[str, Any]) -> None:
        ids = row.get("input_ids")
        if ids is None:
            return
        if isinstance(ids, str):
            raise DataError(
                f"the input of an example is a text, {ids[:40]!r}, and {self.network_name} takes "
                "tokens; raw text is read from a datasets.Dataset, a list of dicts, or a tuple "
                "(texts, labels), with a tokenizer"
            )
        if not hasattr(ids, "__len__") or getattr(ids, "ndim", 1) == 0:
            raise DataError(
                f"the input_ids of an example are the number {ids!r}, and {self.network_name} "
                "takes a row of tokens, (T,): of one text make a batch of one, ids[None]"
            )
        if is_nested(ids) and not isinstance(self, ChoiceCollator):
            sizes = [len(part) for part in ids]
            shape = f"({len(sizes)}, {sizes[0]})" if len({*sizes}) == 1 else f"lists of {sizes}"
            raise DataError(
                f"the input_ids of an example are {shape}, and {self.network_name} takes one row "
                "of tokens, (T,): tokenizer(..., return_tensors='pt') adds a dimension of 1; leave "
                "return_tensors out, or take ids.squeeze(0), of the attention_mask too"
            )
        size = max(map(len, ids)) if is_nested(ids) else len(ids)
        if size == 0:
            raise DataError("an example has no token: its input_ids are empty; leave it out")
        if self.longest is not None and size > self.longest:
            raise DataError(
                f"an example has {size} tokens, and {self.network_name} has {self.longest} "
                "positions; tokenise with truncation=True, "
                f"max_length={self.longest}, or pass the raw text"
            )
        if not is_nested(ids) and _is_real(ids[0].item() if hasattr(ids, "dtype") else ids[0]):
            raise DataError(
                f"input_ids are whole numbers, and here real ones, {ids[0]!r}; convert them, or "
                "pass embeddings under the name 'inputs_embeds'"
            )
        mask = row.get(MASK)
        if mask is None or is_nested(ids):
            return
        if np.shape(mask)[-1:] != (size,):
            raise DataError(
                f"an example has {size} tokens, and its attention_mask is {np.shape(mask)}; it "
                "says of each token whether it counts, (T,)"
            )
        if not np.any(np.asarray(mask)):
            raise DataError(
                "an example has an attention_mask of zeros alone: none of its tokens counts; leave "
                "it out"
            )

    def _check_ids(self, ids: Tensor | None) -> None:
        """Raise `DataError` for tokens that the network has no embedding of."""
        if ids is None or self.vocabulary is None:
            return
        low, high = int(ids.min()), int(ids.max())
        if not 0 <= low <= high < self.vocabulary:
            raise DataError(
                f"input_ids must be in 0..{self.vocabulary - 1}, got {low}..{high}; was another "
                "tokenizer used?"
            )

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
        packed = MASK not in rows[0] and self.copies_tokens and any(map(is_packed, rows))
        try:
            if "input_ids" in rows[0] and len({len(row["input_ids"]) for row in rows}) > 1:
                batch = padded(rows, self.tokenizer, right=self.pads_right)
            else:
                batch = dict(default_data_collator([_exact(row) for row in rows]))
        except (ValueError, TypeError, RuntimeError, KeyError) as error:
            if isinstance(error, DataError):
                raise
            shapes = {name: sorted({_shape(row.get(name)) for row in rows}) for name in rows[0]}
            raise DataError(
                f"the examples do not make one batch: their shapes are {shapes}; give all the same "
                "columns, and each of them a number per token, or the same shape everywhere"
            ) from error
        if packed:  # transformers tells packed texts apart by their positions, unless it has a mask
            batch.pop(MASK, None)
        self._check_ids(batch.get("input_ids"))
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

    def __init__(self, network: nn.Module, task: Task, tokenizer: Any) -> None:
        super().__init__(network, task, tokenizer)
        self.taken.add(CHOICE_MASK)

    def choices(self, example: Any) -> tuple[list[dict[str, Any]], list[bool]]:
        """The inputs of each choice, and which of them can be chosen."""
        row = self.example(example)
        row.pop(LABELS, None)
        given = row.pop(CHOICE_MASK, None)
        sizes = {name: len(value) if is_nested(value) else 0 for name, value in row.items()}
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


def embedded(network: nn.Module) -> int | None:
    """The number of tokens that the network has an embedding of; None where other numbers may mean
    something to it, such as the place of an image."""
    config = getattr(network, "config", None)
    find = getattr(network, "get_input_embeddings", None)
    if not callable(find) or getattr(config, "vision_config", None) is not None:
        return None
    try:
        table = find()
    except (NotImplementedError, AttributeError):  # transformers' answer of networks without
        return None
    rows = getattr(table, "num_embeddings", None)
    known = isinstance(rows, int) and isinstance(getattr(config, "vocab_size", None), int)
    return rows if known else None


def context_length(network: nn.Module) -> float:
    """The most tokens that the network reads: its table's, or what it was made for."""
    table = table_of_positions(network)
    if table is not None:
        return table
    config = getattr(network, "config", None)
    for source in (config, getattr(config, "text_config", None)):
        size = getattr(source, "max_position_embeddings", None)
        if isinstance(size, int) and size > 0:  # XLNet, which has no limit, says -1
            return size
    return math.inf


def encoder_for(tokenizer: Any, context: float, *, ends: bool = False) -> Encoder:
    """The encoder of a tokenizer for a network that reads ``context`` tokens."""
    return Encoder(tokenizer, min(getattr(tokenizer, "model_max_length", math.inf), context), ends)


def taken_by(network: nn.Module) -> set[str]:
    """The names of the inputs that the network takes.

    The ``**kwargs`` of transformers' own networks are switches; those of other networks, such as a
    wrapper around one, are inputs.
    """
    parameters = inspect.signature(network.forward).parameters.values()
    names = {INPUTS} | {p.name for p in parameters if p.kind not in REST}
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    if open_ended and not isinstance(network, PreTrainedModel):
        names |= {*KNOWN_INPUTS}
    return names


def _ones(row: Mapping[str, Any]) -> list[int]:
    return [1] * len(row["input_ids"])


def _shape(value: Any) -> tuple[int, ...]:
    try:
        return tuple(np.shape(value))
    except ValueError:  # ragged
        return (len(value),)


def whole_as_long(labels: Tensor) -> Tensor:
    """Labels of any whole type as torch's losses take them."""
    return labels if labels.is_floating_point() else labels.long()


def collator_for(network: nn.Module, task: Task, tokenizer: Any) -> Collator:
    """The collator that the likelihood needs."""
    kind = ChoiceCollator if isinstance(task, MultipleChoice) else Collator
    return kind(network, task, tokenizer)


def has_choices(examples: Any) -> bool:
    """Whether examples have several choices each, in raw text or in tokens."""
    row = as_dict(examples[0], INPUTS) if len(examples) else {}
    ids: Any = row.get("input_ids")
    return CHOICES in row or (is_nested(ids) and len(ids) > 1)


def is_nested(value: Any) -> bool:
    """Whether a value is a list of lists."""
    try:
        return len(value) > 0 and len(value[0]) >= 0
    except TypeError:  # of a number, or of a tensor that is one
        return False


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
