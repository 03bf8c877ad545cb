"""Prompts: token ids, and other inputs of the network, one row per prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor

from pyrolora import defaults
from pyrolora.columns import INPUTS
from pyrolora.data import TextOptions
from pyrolora.data.chats.chat import ChatTemplate, messages_of
from pyrolora.data.chats.completions import DialogueEncoder
from pyrolora.data.chats.dialogues import prompt_of
from pyrolora.data.encoding import Encoder
from pyrolora.data.examples import as_examples
from pyrolora.data.inputs import KNOWN_INPUTS, embedded, table_of_positions, taken_by
from pyrolora.data.media.illustrated import illustrator_of
from pyrolora.data.media.media import tokenizer_of
from pyrolora.data.media.pieces import PER_TOKEN, per_prompt, picture_token
from pyrolora.data.padding import MASK, padding_of
from pyrolora.data.pairs import joined_texts, source_of
from pyrolora.data.tokenising import warn_cut
from pyrolora.errors import DataError
from pyrolora.model import JointModel


def read_prompts(
    inputs: Any, processor: Any, joint: JointModel
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Return the token ids of the prompts, without padding, and their other inputs (of each).

    Raises
    ------
    DataError
        For what is no list of prompts, and what the network does not take.
    """
    illustrator = illustrator_of(joint.base, processor, taken_by(joint.base))
    rows = None if illustrator is None else _rows(inputs)
    if illustrator is not None and rows is not None:
        prompts, others = illustrator.prompts(rows)
        return _checked(prompts, joint), others
    if illustrator is not None and _are_texts(inputs):
        illustrator.check_texts(inputs)
    prompts = prompt_ids(inputs, tokenizer_of(processor), joint)
    return prompts, other_inputs(inputs, joint, prompts)


def prompt_ids(inputs: Any, tokenizer: Any, joint: JointModel) -> list[Tensor]:
    """Return the token ids of the prompts, without padding.

    Raises
    ------
    DataError
        For what is no list of prompts, and for ids that the network does not have.
    """
    texts, written = _are_texts(inputs), _written(inputs, tokenizer, joint)
    if written is not None:
        return _checked(written, joint)
    if _is_mapping(inputs):
        prompts = _masked(inputs)
    elif texts:
        prompts = _encoded(inputs, tokenizer, joint)
    else:
        _check_form(inputs)
        prompts = _tensors(inputs)
    _checked(prompts, joint)
    if not texts and not (_is_mapping(inputs) and MASK in inputs):
        padding = padding_of(joint.base, tokenizer)
        masks = [padding.mask(ids) for ids in prompts]
        prompts = [
            ids if mask is None else ids[torch.tensor(mask).bool()]
            for ids, mask in zip(prompts, masks, strict=True)
        ]
    return [ids.long() for ids in prompts]


def _written(inputs: Any, tokenizer: Any, joint: JointModel) -> list[Tensor] | None:
    """Return the tokens of chats, or of the prompts in rows of a data set; None for other inputs.

    In both it is the assistant's turn, or that of the completion, as in a fit.
    """
    chats = _chats(inputs)
    if chats is not None:
        template = ChatTemplate(tokenizer)
        return [torch.tensor(template.opened(messages_of(chat))) for chat in chats]
    data = _rows(inputs)
    if data is None:
        return None
    if joint.task.writes == "apart":
        return _encoded(joined_texts(data, source_of(data)), tokenizer, joint)
    encode = DialogueEncoder(prompt_of(data), Encoder(tokenizer, math.inf), TextOptions())
    return [torch.tensor(ids) for ids in encode.prompts(data)]


def _rows(inputs: Any) -> datasets.Dataset | None:
    """Return rows with prompts, or chats, as a data set; None for other inputs."""
    chats = _chats(inputs)
    if chats is not None:
        inputs = [{"messages": chat} for chat in chats]
    rows = [*inputs] if isinstance(inputs, list | tuple) else []
    if not isinstance(inputs, datasets.Dataset) and not (rows and _are_dicts(rows)):
        return None
    data = as_examples(inputs, INPUTS, defaults.SCORE_SPLITS)
    return None if {"input_ids", MASK} & {*data.column_names} else data


def _chats(inputs: Any) -> list[Any] | None:
    """Return the chats in a list of chats, or in a list of the messages of one."""
    if not isinstance(inputs, Sequence) or isinstance(inputs, str) or not len(inputs):
        return None
    if all(isinstance(chat, list | tuple) and _are_messages(chat) for chat in inputs):
        return [*inputs]
    return [inputs] if _are_messages(inputs) else None


def _are_messages(rows: Sequence[Any]) -> bool:
    return _are_dicts(rows) and any({"role", "from"} & {*row} for row in rows)


def _are_dicts(rows: Sequence[Any]) -> bool:
    return len(rows) > 0 and all(isinstance(row, Mapping) for row in rows)


def other_inputs(
    inputs: Any, joint: JointModel, prompts: Sequence[Tensor]
) -> dict[str, list[Tensor]]:
    """Return the inputs that a mapping has beside the tokens, those of each prompt.

    They are (m, ...), with as many pieces as the prompt has pictures or patches of pictures; or
    (T,), where they have a value per token.

    Raises
    ------
    DataError
        For inputs that the network does not take, or whose pieces belong to no prompt.
    """
    names = [n for n in inputs if n not in ("input_ids", MASK)] if _is_mapping(inputs) else []
    taken = taken_by(joint.base) & {*KNOWN_INPUTS} - {"position_ids", "inputs_embeds"}
    refused = [name for name in names if name not in taken]
    if refused:
        raise DataError(
            f"generate() does not pass {refused} on to this {type(joint.base).__name__}; leave "
            f"them out; beside input_ids and attention_mask it passes {sorted(taken)}"
        )
    per_token = [name for name in names if name in PER_TOKEN]
    columns = {name: _tensors(inputs[name]) for name in names}
    if any(len(columns[name]) != len(prompts) for name in per_token):
        raise DataError(f"{per_token} and input_ids differ in shape; give a value per token")
    if per_token and MASK in inputs:
        masks = [row.bool() for row in _tensors(inputs[MASK])]
        for name in per_token:
            columns[name] = [r[mask] for r, mask in zip(columns[name], masks, strict=True)]
    pieces = {n: torch.stack(rows) for n, rows in columns.items() if n not in PER_TOKEN}
    try:
        return {**columns, **per_prompt(pieces, prompts, picture_token(joint.base))}
    except DataError as error:
        raise DataError(f"{error}; generate for one prompt at a time") from error


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
        "inputs must be a list of texts or of chats, rows with prompts, a tensor of token ids "
        f"(n, T), or a mapping with 'input_ids', got {kind}"
    )


def _checked(prompts: list[Tensor], joint: JointModel) -> list[Tensor]:
    """Return the prompts, whose tokens the network has."""
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
    return prompts


def _tensors(rows: Any) -> list[Tensor]:
    try:
        return [torch.as_tensor(row) for row in rows]
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"a prompt is a text, a list of token ids, or a list of messages with 'role' and "
            f"'content' ({error})"
        ) from error
