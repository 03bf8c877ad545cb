"""Checks of a network's outputs: they fit their task, and a causal model has not read ahead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrolora.columns import DECODER_IDS, DECODER_MASK, IGNORED, LABELS
from pyrolora.data.inputs import written_length
from pyrolora.data.padding import MASK
from pyrolora.errors import ConfigError, DataError, PyroLoraError
from pyrolora.model import JointModel, evaluating

# The most that outputs differ by the order of sums alone, as a share of the largest.
NOISE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_KINDS = {"input_ids": "language model", DECODER_IDS: "decoder"}


@contextmanager
def explained_pass(network: nn.Module, batch: Mapping[str, object]) -> Iterator[None]:
    """Turn an error that a network raises at a batch into a `DataError`.

    Raises
    ------
    DataError
        With the network's message and the shapes of the batch.
    """
    try:
        yield
    except (PyroLoraError, NotImplementedError, torch.OutOfMemoryError):
        raise
    except (IndexError, ValueError, RuntimeError) as error:
        shapes = {name: tuple(t.shape) for name, t in batch.items() if isinstance(t, Tensor)}
        raise DataError(
            f"this {type(network).__name__} cannot read a batch of the data, whose shapes are "
            f"{shapes}: {type(error).__name__}: {error}"
        ) from error


def check_reading(joint: JointModel, batch: Mapping[str, Tensor], output: Tensor) -> None:
    """Raise `ConfigError` for outputs that do not fit their task, or that have read ahead."""
    joint.task.check_reading(output, batch, joint.base)
    text = joint.task.as_text()
    if text is not None:
        own = text is joint.task
        check_causal(joint.under(text), batch if own else joint.task.inputs(batch, joint.base))


@torch.no_grad()
def check_causal(joint: JointModel, batch: Mapping[str, Tensor]) -> None:
    """Refuse a network whose outputs before a token change with it, by two passes of one example.

    The token is the last one to be predicted: a network may read a prompt as a whole, and only what
    follows in turn.

    Raises
    ------
    ConfigError
        For a network that reads the tokens that it is to predict, or packed texts that see each
        other.
    """
    name = DECODER_IDS if joint.task.writes == "apart" else "input_ids"
    ids = joint.task.inputs(batch, joint.base).get(name)
    if ids is None or ids.dim() != 2:
        return
    last = _last(batch)
    if last < 1:
        return
    example = {n: t[:1] if isinstance(t, Tensor) else t for n, t in {**batch, name: ids}.items()}
    with evaluating(joint):
        before = joint.network(example, joint.program.mean())
        after = joint.network(_changed(joint, example, last, name), joint.program.mean())
        if _differ(joint, before[0, :last], after[0, :last]):
            raise ConfigError(
                f"this {type(joint.base).__name__} is no causal {_KINDS[name]}: what it gives for "
                f"a token changes with the tokens after it (here with token {last}), so that it "
                "would read what it is to predict; load it with is_decoder=True where its config "
                "has that, or label (other than -100) only tokens after the part that it reads as "
                "a whole"
            )
        room = ids.shape[1] < written_length(joint.base) and DECODER_MASK not in example
        if name == DECODER_IDS and room:
            after = joint.network({**example, name: F.pad(ids[:1], (0, 1))}, joint.program.mean())
            if _differ(joint, before[0], after[0, : ids.shape[1]]):
                raise ConfigError(
                    f"what this {type(joint.base).__name__} gives for a token changes with padding "
                    "after it, so that scores of a batch would not be those of its examples; fit "
                    "another network"
                )
        starts = _starts(example)
        if starts and starts[0] <= last:
            after = joint.network(_changed(joint, example, 0, name), joint.program.mean())
            if _differ(joint, before[0, starts[0] :], after[0, starts[0] :]):
                raise ConfigError(
                    f"in this {type(joint.base).__name__} the texts that are packed in one row see "
                    "each other (transformers keeps them apart in some networks only); give each "
                    "text a row of its own"
                )


def _last(batch: Mapping[str, Tensor]) -> int:
    """Return the place of the last counted token of the first example."""
    labels = batch.get(LABELS)
    counted = (
        labels[0].ne(IGNORED) if labels is not None else batch.get(MASK, batch["input_ids"])[0]
    )
    places = counted.nonzero().flatten()
    return int(places[-1]) if len(places) else 0


def _starts(example: Mapping[str, Tensor]) -> list[int]:
    """Return the places at which the packed texts of a row begin, without the first."""
    positions = example.get("position_ids")
    if positions is None or positions.dim() != 2 or MASK in example:
        return []
    return [int(i) + 1 for i in (positions[0].diff() != 1).nonzero().flatten()]


def _changed(
    joint: JointModel, example: Mapping[str, Tensor], place: int, name: str
) -> dict[str, Tensor]:
    """Return the example with another token in that place, if possible one that is new to it."""
    ids = example[name].clone()
    config = getattr(joint.base, "config", None)
    size = getattr(getattr(config, "text_config", config), "vocab_size", None) or int(ids.max()) + 1
    used = {*ids.flatten().tolist()}
    old = int(ids[0, place])
    order = [(old + k) % size for k in range(1, size)]
    ids[0, place] = next(
        (token for token in order if token not in used), order[0] if order else old
    )
    return {**example, name: ids}


def _differ(joint: JointModel, before: Tensor, after: Tensor) -> bool:
    kinds = (p.dtype for p in joint.base.parameters() if p.dtype in NOISE)
    noise = NOISE[next(kinds, torch.float32)]
    return bool((before - after).abs().max() > noise * before.abs().max())
