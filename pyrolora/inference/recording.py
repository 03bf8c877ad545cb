"""Passes through the network that record the inputs and updates of every adapted layer."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrolora.adapters import Attachment, Factors, FlatFactors
from pyrolora.adapters.other_kinds import folded, is_embedding, rows_of
from pyrolora.adapters.parameter_layer import ParameterSlot
from pyrolora.columns import (
    CHOICE_MASK,
    CHOICE_PLACES,
    DECODER_IDS,
    DECODER_MASK,
    IGNORED,
    LABELS,
    PLACES,
    Batch,
)
from pyrolora.data.inputs import written_length
from pyrolora.data.padding import MASK
from pyrolora.errors import ConfigError, listed
from pyrolora.guides import Guide
from pyrolora.model import JointModel

ROUNDING = 1e-5
"""Of the largest gradient of an example; fused attention leaves up to 1e-6 of it for zero."""
OF_DECODER = (LABELS, DECODER_IDS, DECODER_MASK)
"""The columns with a number per position of a decoder."""


@dataclass(frozen=True)
class Recording(Factors):
    """Factors that keep the input and the update, s B A x, of each use of their layer."""

    inputs: list[Tensor] = field(default_factory=list)
    updates: list[Tensor] = field(default_factory=list)

    def apply(self, layer: nn.Module, x: Tensor, training: bool) -> Tensor:
        out: Tensor = layer(x)
        x = rows_of(layer, x).to(self.A.dtype)
        update = x @ self.A.mT @ self.sB
        self.inputs.append(x.detach())
        self.updates.append(update)
        return out + folded(layer, update, out).to(out.dtype)


def recorded(
    joint: JointModel,
    batch: Batch,
    factors: FlatFactors,
    names: Collection[str] | None = None,
) -> tuple[Tensor, dict[str, Recording]]:
    """Return the network's output under one setting of the factors, and each layer's recording.

    With ``names``, of these layers alone. The updates have gradients where B requires one.
    """
    check_recordable(joint)
    plain = joint.binding(factors)
    layers = {
        name: Recording(plain.factors[layer].A, plain.factors[layer].sB)
        for name, layer in joint.attachment.layers.items()
        if names is None or name in names
    }
    bound: dict[Any, Factors] = dict(plain.factors)
    bound |= {joint.attachment.layers[name]: layer for name, layer in layers.items()}
    return joint.run(batch, replace(plain, factors=bound, eager=True)), layers


def unrecordable(attachment: Attachment) -> list[str]:
    """Return the names of adapted parameters and embeddings, whose inputs cannot be recorded.

    Those of parameters are seen by their module alone; those of embeddings are as many as the
    vocabulary, and the curvature has a matrix of that size.
    """
    return [
        name
        for name, layer in attachment.layers.items()
        if isinstance(layer, ParameterSlot) or is_embedding(layer.base_layer)
    ]


def as_recordable(guide: Guide, attachment: Attachment) -> Guide:
    """Return the guide as it is inferred on these layers, whose inputs may not be recordable."""
    return guide.without_inputs() if unrecordable(attachment) else guide


def check_recordable(joint: JointModel) -> None:
    """Raise `ConfigError` for adapted layers whose inputs cannot be recorded."""
    if hidden := unrecordable(joint.attachment):
        raise ConfigError(
            "the curvature of the likelihood (of 'laplace', and of scale_updates='curvature') is "
            "made of the inputs of each layer, and adapted parameters and embeddings have none "
            f"that it could use: {listed(hidden, most=2)}; leave them out of target_parameters and "
            "target_modules, or choose 'montec' or 'meanfield' with scale_updates='gradient'"
        )


def readable(joint: JointModel, batch: Batch) -> Iterator[Batch]:
    """Yield the batch whole, or example by example where a layer's rows have no known owner.

    Positions are told apart by their number. Where a decoder has as many as its encoder, it gets
    one more, of padding, which changes nothing before it.
    """
    size = len(next(iter(batch.values())))
    if joint.task.writes == "apart" and _alike(joint, batch):
        batch = {**batch, **{n: _longer(n, batch[n]) for n in OF_DECODER if n in batch}}
    if size == 1 or joint.together(batch):
        yield batch
        return
    for i in range(size):
        yield {name: tensor[i : i + 1] for name, tensor in batch.items()}


def _alike(joint: JointModel, batch: Batch) -> bool:
    """Return whether encoder and decoder have as many positions, and the decoder has room."""
    shape = batch[LABELS].shape
    read = batch.get(MASK, batch.get("input_ids"))
    return read is not None and read.shape == shape and shape[-1] < written_length(joint.base)


def _longer(name: str, tensor: Tensor) -> Tensor:
    return F.pad(tensor, (0, 1), value=IGNORED if name == LABELS else 0)


def masks(joint: JointModel, batch: Batch) -> list[Tensor]:
    """Return which positions (rows, T), and which rows, count.

    A batch of choices, (b, choices, ...), has b * choices rows. A decoder's positions count up to
    the last label that counts.
    """
    masks = []
    if joint.task.writes == "apart":
        masks.append(batch[LABELS].ne(IGNORED).flip(-1).cumsum(-1).flip(-1).bool())
    choices, attention = batch.get(CHOICE_MASK), batch.get("attention_mask")
    if attention is not None and attention.dim() > 1:
        attention = attention if choices is None else attention * choices[..., None]
        masks.append(attention.flatten(0, -2).bool())
        if PLACES in batch:  # the rows of an adapted output layer
            masks.append(attention.gather(-1, batch[PLACES]).bool())
        if CHOICE_PLACES in batch:
            masks.append((batch[CHOICE_PLACES] >= 0).flatten(0, 1))
    if choices is not None:
        masks.append(choices.flatten().bool())
    return masks


def sizes_of(gradient: Tensor) -> Tensor:
    """Return the largest number of the gradient at each position, without the last dimension."""
    return torch.linalg.vector_norm(gradient.detach(), math.inf, dim=-1)


def read(sizes: Tensor, examples: int) -> Tensor:
    """Return which positions are read, given the size of the gradient in each, examples first.

    A position is read where its gradient is more than `ROUNDING` of the largest in its example.
    Less is what rounding leaves of zero, as in the query of a decoder's first token, which attends
    to itself alone; and its square is lost beside that of the largest.
    """
    rows = sizes.reshape(examples, -1)
    return (rows > ROUNDING * rows.amax(-1, keepdim=True)).reshape(sizes.shape)


def counted(tensor: Tensor, masks: list[Tensor]) -> Tensor:
    """Return the positions of a (..., k) tensor that count, (m, k); all where no mask fits."""
    for mask in masks:
        if tensor.shape[:-1][: mask.dim()] == mask.shape:
            tensor = tensor[mask]
            break
        if len(mask) == 1 and tensor.dim() == 3 and tensor.shape[:-1].numel() == mask.numel():
            tensor = tensor.flatten(0, 1)[mask.flatten()]  # one example, positions first
            break
    return tensor.reshape(-1, tensor.shape[-1])
