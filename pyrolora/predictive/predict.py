"""Draws of the posterior, run over data with bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from pyrolora import defaults
from pyrolora.adapters import AnyFactors, LaterFactors
from pyrolora.checks import whole_number
from pyrolora.columns import Batch
from pyrolora.data import Prepared, check_finite, pass_rows, to_device
from pyrolora.data.labels import class_names_of
from pyrolora.inference.reading import explained_pass
from pyrolora.model import JointModel, device_of, evaluating
from pyrolora.predictive.linearised import linearised
from pyrolora.processes import share_generators, shared_out, take_part
from pyrolora.progress import progress
from pyrolora.seeding import DRAWING, seeded
from pyrolora.tasks import Prediction

R = TypeVar("R")


def draw_factors(
    joint: JointModel, num_samples: int | None = None, seed: int | None = None
) -> AnyFactors:
    """Return the factors of ``num_samples`` draws, (S, total), made later where they are large.

    For 0 they are those of the mean adapter, (total,); for None those of every member of an
    ensemble, or of the default number of draws. ``seed`` makes the draws repeatable and leaves the
    global generators as they were.
    """
    num_samples = joint.program.usual_draws() if num_samples is None else num_samples
    whole_number("num_samples", num_samples, at_least=0)
    with seeded(seed), torch.no_grad():
        joint.align()
        if seed is None:
            share_generators(device_of(joint.program))
        if num_samples:
            return joint.program.drawn(num_samples)
        return joint.program.mean()


@torch.no_grad()
def predict(
    joint: JointModel,
    data: Prepared,
    factors: AnyFactors,
    *,
    batch_size: int = defaults.BATCH_SIZE,
    rows: int = defaults.PREDICT_ROWS,
    kind: type[Prediction] | None = None,
    temperature: float = 1.0,
) -> Prediction:
    """Return the prediction of the S draws of ``factors``, or of one setting, for every example.

    Parameters
    ----------
    joint
        The joint model.
    data
        The examples; `reduced` says how they are read.
    factors
        The factors of the draws.
    batch_size, rows
        Examples per batch, and most rows (draws x examples) per pass.
    kind
        The class of the prediction; None: that of the task.
    temperature
        T of the law of the targets (`Task.at`).
    """
    kind = joint.task.prediction if kind is None else kind
    task = joint.task.at(temperature)
    order = data.by_length()
    reduce = partial(kind.reduce, task)
    records = reduced(joint, data, factors, reduce, order, batch_size=batch_size, rows=rows)
    prediction = named(kind.collect(records, task), joint)
    prediction = prediction if order is None else prediction.in_order(order)
    finished: Prediction = data.collate.finish(prediction, data.examples)
    return finished


def reduced(
    joint: JointModel,
    data: Prepared,
    factors: AnyFactors,
    reduce: Callable[[Iterable[Tensor], Batch], R],
    order: list[int] | None,
    *,
    batch_size: int,
    rows: int = defaults.PREDICT_ROWS,
    title: str = "predicting",
) -> list[R]:
    """Apply ``reduce`` to the outputs (s, b, ...) of every batch, in the ``order`` of the examples.

    Every draw is one function, with the same weights for all examples. Texts of like length share
    a batch, where the order is by length. As many draws share a pass as `pass_rows` allows; at
    least one does, since a batch is not cut.

    Raises
    ------
    DataError
        For features that are not finite.
    """
    device = device_of(joint.program)
    numbers = [*range(len(data))] if order is None else order
    batches = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]

    def work(batches: Sequence[list[int]]) -> list[R]:
        loader = data.loader(batch_size, [number for batch in batches for number in batch])
        records = []
        for some, batch in zip(batches, progress(loader, title=title), strict=True):
            check_finite(batch, some)
            placed = to_device(batch, device)
            # A fit in another thread steps between batches.
            with turn_of(factors), evaluating(joint):
                outputs = passes(joint, placed, factors, pass_rows(placed, rows))
                with explained_pass(joint.base, placed):
                    records.append(reduce(outputs, placed))
        return records

    if joint.sharded:  # all processes run every batch, each with its part of the weights
        return work(batches)
    return shared_out(batches, work, (title, factors.checksum()) if take_part() else None)


def turn_of(factors: AnyFactors) -> AbstractContextManager[object]:
    """Return the turn of passes with these draws: shared, unless they are drawn on the way."""
    return DRAWING if isinstance(factors, LaterFactors) else DRAWING.shared()


def named(prediction: Prediction, joint: JointModel) -> Prediction:
    """Return the prediction with the names of its classes."""
    names = class_names_of(joint.base, joint.task) if joint.task.names_classes else {}
    return prediction.named(names) if names else prediction


def passes(
    joint: JointModel, batch: Mapping[str, Tensor], factors: AnyFactors, rows: int
) -> Iterator[Tensor]:
    """Yield outputs (s, b, ...) of the draws in turn, s per pass; s = 1 for one setting."""
    if factors.draws is None:
        yield joint.network(batch, factors).unsqueeze(0)
        return
    step = max(1, rows // len(next(iter(batch.values()))))
    if isinstance(factors, LaterFactors):
        step = factors.at_once if joint.linearises else min(step, factors.at_once)
        for start in range(0, factors.draws, step):
            yield from passes(joint, batch, factors[start : start + step], rows)
        return
    if joint.linearises:
        yield linearised(joint, batch, joint.program.mean(), factors, rows)
        return
    settings, counts = factors.distinct()
    for start in range(0, len(counts), step):
        some = settings[start : start + step]
        if len(counts) == factors.draws:
            yield joint.network(batch, some)  # without a name here, which would keep it for longer
            continue
        output = joint.network(batch, some)
        yield output.repeat_interleave(counts[start : start + step].to(output.device), 0)
