"""Draws of the posterior, run over data with bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from pyrolora import defaults
from pyrolora.adapters import FlatFactors
from pyrolora.checks import whole_number
from pyrolora.columns import Batch
from pyrolora.data import Prepared, check_finite, pass_rows, to_device
from pyrolora.data.labels import class_names_of
from pyrolora.inference.reading import explained_pass
from pyrolora.model import JointModel, evaluating
from pyrolora.predictive.heads import of_heads, one_adapter
from pyrolora.predictive.linearised import linearised
from pyrolora.progress import progress
from pyrolora.seeding import DRAWING, seeded
from pyrolora.tasks import Prediction

R = TypeVar("R")


def draw_factors(
    joint: JointModel, num_samples: int | None = None, seed: int | None = None
) -> FlatFactors:
    """Return the factors of ``num_samples`` draws, (S, total).

    For 0 they are those of the mean adapter, (total,); for None those of every member of an
    ensemble, or of the default number of draws. ``seed`` makes the draws repeatable and leaves the
    global generators as they were.
    """
    num_samples = joint.program.usual_draws() if num_samples is None else num_samples
    whole_number("num_samples", num_samples, at_least=0)
    with seeded(seed), torch.no_grad():
        joint.align()
        if num_samples:
            return joint.program.factors(joint.program.draw(num_samples))
        return joint.program.mean()


@torch.no_grad()
def predict(
    joint: JointModel,
    data: Prepared,
    factors: FlatFactors,
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
    factors: FlatFactors,
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
    device = next(joint.program.parameters()).device
    numbers: Sequence[int] = range(len(data)) if order is None else order
    loader = data.loader(batch_size, order)
    records = []
    for i, batch in enumerate(progress(loader, title=title)):
        check_finite(batch, numbers[i * batch_size : (i + 1) * batch_size])
        placed = to_device(batch, device)
        with DRAWING.shared(), evaluating(joint):  # a fit in another thread steps between batches
            outputs = passes(joint, placed, factors, pass_rows(placed, rows))
            with explained_pass(joint.base, placed):
                records.append(reduce(outputs, placed))
    return records


def named(prediction: Prediction, joint: JointModel) -> Prediction:
    """Return the prediction with the names of its classes."""
    names = class_names_of(joint.base, joint.task) if joint.task.names_classes else {}
    return prediction.named(names) if names else prediction


def passes(
    joint: JointModel, batch: Mapping[str, Tensor], factors: FlatFactors, rows: int
) -> Iterator[Tensor]:
    """Yield outputs (s, b, ...) of the draws in turn, s per pass; s = 1 for one setting."""
    if factors.draws is None:
        yield joint.network(batch, factors).unsqueeze(0)
        return
    if joint.linearises:
        yield linearised(joint, batch, joint.program.mean(), factors, rows)
        return
    if one_adapter(joint, batch, factors):
        assert factors.head is not None
        yield of_heads(joint, batch, factors[0], factors.head)
        return
    settings, counts = factors.distinct()
    step = max(1, rows // len(next(iter(batch.values()))))
    for start in range(0, len(counts), step):
        output = joint.network(batch, settings[start : start + step])
        yield output.repeat_interleave(counts[start : start + step].to(output.device), 0)
