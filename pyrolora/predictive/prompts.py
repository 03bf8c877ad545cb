"""Prompts: token ids, and other inputs of the network, one row per prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyrolora.data.encoding import Encoder
from pyrolora.data.inputs import KNOWN_INPUTS, embedded, table_of_positions, taken_by
from pyrolora.data.padding import MASK, padding_of
from pyrolora.data.tokenising import warn_cut
from pyrolora.errors import DataError
from pyrolora.model import JointModel

PER_TOKEN = ("token_type_ids", "global_attention_mask")
"""The inputs that have a value for every token of a prompt."""


def prompt_ids(inputs: Any, tokenizer: Any, joint: JointModel) -> list[Tensor]:
    """Return the token ids of the prompts, without padding.

    Raises
    ------
    DataError
        For what is no list of prompts, and for ids that the network does not have.
    """
    texts = _are_texts(inputs)
    if _is_mapping(inputs):
        prompts = _masked(inputs)
    elif texts:
        prompts = _encoded(inputs, tokenizer, joint)
    else:
        _check_form(inputs)
        prompts = _tensors(inputs)
    _check_ids(prompts, joint)
    if not texts and not (_is_mapping(inputs) and MASK in inputs):
        padding = padding_of(joint.base, tokenizer)
        masks = [padding.mask(ids) for ids in prompts]
        prompts = [
            ids if mask is None else ids[torch.tensor(mask).bool()]
            for ids, mask in zip(prompts, masks, strict=True)
        ]
    return [ids.long() for ids in prompts]


def other_inputs(
    inputs: Any, joint: JointModel, prompts: Sequence[Tensor]
) -> dict[str, list[Tensor]]:
    """Return the inputs that a mapping has beside the tokens, one row per prompt.

    Raises
    ------
    DataError
        For inputs that the network does not take, or that have another number of rows.
    """
    names = [n for n in inputs if n not in ("input_ids", MASK)] if _is_mapping(inputs) else []
    taken = taken_by(joint.base) & {*KNOWN_INPUTS} - {"position_ids", "inputs_embeds"}
    refused = [name for name in names if name not in taken]
    if refused:
        raise DataError(
            f"generate() does not pass {refused} on to this {type(joint.base).__name__}; leave "
            f"them out; beside input_ids and attention_mask it passes {sorted(taken)}"
        )
    others = {}
    for name in names:
        rows = _tensors(inputs[name])
        if len(rows) != len(prompts):
            raise DataError(
                f"{name!r} has {len(rows)} rows for {len(prompts)} prompts; give one row per "
                "prompt, or generate for one prompt at a time"
            )
        if name in PER_TOKEN and MASK in inputs:
            masks = [row.bool() for row in _tensors(inputs[MASK])]
            rows = [row[mask] for row, mask in zip(rows, masks, strict=True)]
        others[name] = rows
    return others


def _are_texts(inputs: Any) -> bool:
    if isinstance(inputs, str):
        raise DataError(f"pass prompts as a list: [{inputs[:40]!r}]")
    return isinstance(inputs, Sequence) and len(inputs) > 0 and isinstance(inputs[0], str)


def _is_mapping(inputs: Any) -> bool:
    return isinstance(inputs, Mapping) and "input_ids" in inputs


def _masked(inputs: Mapping[str, Any]) -> list[Tensor]:
    """Return the ids of a mapping that its mask lets through."""
    prompts = _tensors(inputs["input_ids"])
    if MASK not in inputs:
        return prompts
    masks = [row.bool() for row in _tensors(inputs[MASK])]
    if [mask.shape for mask in masks] != [row.shape for row in prompts]:
        raise DataError("input_ids and attention_mask differ in shape")
    return [row[mask] for row, mask in zip(prompts, masks, strict=True)]


def _encoded(texts: Sequence[Any], tokenizer: Any, joint: JointModel) -> list[Tensor]:
    """Return the tokens of texts: of those that are continued without an end, of others as fitted.

    The latter are cut, as a fit cuts them.
    """
    if not all(isinstance(text, str) for text in texts):
        raise DataError("the prompts have to be texts, all of them")
    if tokenizer is None:
        raise DataError(
            "the prompts are texts and there is no tokenizer; pass tokenizer= to fit() or "
            "load(), or a tensor of token ids here"
        )
    encoder = Encoder(tokenizer, math.inf, open=True)
    if joint.task.writes == "apart":
        encoder = joint.task.collator(joint.base, tokenizer).encoder
    made = encoder(list(texts))
    warn_cut(sum(made["cut"]), len(texts), encoder.limit, what="prompts")
    return [torch.as_tensor(ids) for ids in made["input_ids"]]


def _check_form(inputs: Any) -> None:
    if isinstance(inputs, Tensor) and inputs.dim() != 2:
        raise DataError(f"token ids must be (n, T), got shape {tuple(inputs.shape)}")
    if isinstance(inputs, Tensor | Sequence) and not any(isinstance(x, Mapping) for x in inputs):
        return
    kind = f"a mapping with {[*inputs]}" if isinstance(inputs, Mapping) else type(inputs).__name__
    raise DataError(
        "inputs must be a list of texts, a tensor of token ids (n, T), or a mapping with "
        f"'input_ids', got {kind}; from rows pass the texts alone: data['text']"
    )


def _check_ids(prompts: Sequence[Tensor], joint: JointModel) -> None:
    if not prompts:
        raise DataError("there are no prompts")
    for number, ids in enumerate(prompts):
        if ids.dim() != 1 or not len(ids) or ids.is_floating_point():
            raise DataError(
                f"prompt {number} is no list of token ids, or has none: {ids.tolist()!r:.60}; give "
                "each prompt at least one"
            )
    apart = joint.task.writes == "apart"
    read = embedded(joint.base) if apart else getattr(joint.base.config, "vocab_size", None)
    vocabulary = math.inf if read is None else read
    longest, most = max(map(len, prompts)), table_of_positions(joint.base)
    if apart and most is not None and longest > most:
        raise DataError(
            f"a prompt has {longest} tokens, and {type(joint.base).__name__} reads {most}; shorten "
            "it, or pass texts, which are cut there"
        )
    lowest, highest = (f(int(f(ids)) for ids in prompts) for f in (min, max))
    if lowest < 0 or highest >= vocabulary:
        raise DataError(
            f"token ids must be in 0..{vocabulary - 1}, got {lowest}..{highest}; was another "
            "tokenizer used?"
        )


def _tensors(rows: Any) -> list[Tensor]:
    try:
        return [torch.as_tensor(row) for row in rows]
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"a prompt is a text or a list of token ids ({error}); turn a chat into a text with "
            "tokenizer.apply_chat_template(messages, tokenize=False)"
        ) from error
