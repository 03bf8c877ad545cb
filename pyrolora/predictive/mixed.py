"""Predictions of several posteriors on one network, whose rows share passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch

from pyrolora import defaults
from pyrolora.adapters import AnyFactors
from pyrolora.data import Prepared, pass_rows, to_device
from pyrolora.data.examples import TensorExamples
from pyrolora.model import Share, device_of, evaluating, mixed_pass
from pyrolora.predictive.predict import named, predict
from pyrolora.predictive.predictor import Predictor
from pyrolora.seeding import DRAWING
from pyrolora.tasks import Prediction


@dataclass(frozen=True)
class Question:
    """Examples, and the draws of a posterior that predict them.

    Attributes
    ----------
    predictor
        The posterior.
    factors
        The factors of its draws, or of one setting.
    prepared
        The examples.
    lengths
        The number of tokens of each, without the padding behind them; None: they are not known.
    """

    predictor: Predictor
    factors: AnyFactors
    prepared: Prepared
    lengths: Sequence[int] | None = None

    @cached_property
    def distinct(self) -> tuple[AnyFactors, torch.Tensor]:
        """The different settings among the draws, and how many draws have each."""
        if self.factors.draws is None:
            return self.factors, torch.ones(1, dtype=torch.long)
        return self.factors.distinct()

    def examples(self, numbers: Sequence[int], longest: int) -> list[Any]:
        """Return the examples with these numbers, in tensors up to the ``longest`` of a pass."""
        rows = [self.prepared.examples[number] for number in numbers]
        if not self.filled:
            return rows
        return [{name: values[:longest] for name, values in row.items()} for row in rows]

    @property
    def filled(self) -> bool:
        """Whether texts were filled up to one length."""
        return self.lengths is not None and isinstance(self.prepared.examples, TensorExamples)

    def length(self, number: int) -> int:
        """Return the number of tokens of an example, 0 where it is not known."""
        return 0 if self.lengths is None else self.lengths[number]

    def fits(self, rows: int) -> bool:
        """Return whether a pass of at most ``rows`` rows holds all draws of the longest example."""
        longest = max(self.length(number) for number in range(len(self.prepared)))
        return len(self.distinct[1]) <= self.most(longest, rows)

    def most(self, longest: int, rows: int) -> int:
        """Return the most rows of a pass whose longest text has so many tokens (`pass_rows`)."""
        device = device_of(self.predictor.joint.program)
        return pass_rows({"input_ids": torch.empty(1, longest, device=device)}, rows)

    @cached_property
    def whole(self) -> Share:
        """The share of all examples in one pass."""
        return Share(self.predictor.joint, self.distinct[0], len(self.prepared))

    def share(self, size: int) -> Share:
        """Return the share of ``size`` of the examples in a pass."""
        return replace(self.whole, size=size, like=self.whole)

    def alone(self) -> Prediction:
        """Return the prediction without company."""
        predictor = self.predictor
        return predict(
            predictor.joint,
            self.prepared,
            self.factors,
            batch_size=min(len(self.prepared), defaults.BATCH_SIZE),
            temperature=predictor.temperature,
        )


@torch.no_grad()
def predict_mixed(
    questions: Sequence[Question], *, rows: int = defaults.PREDICT_ROWS
) -> list[Prediction]:
    """Return the prediction of every question; their rows share passes where they can.

    Each is the prediction of that posterior alone, up to rounding. The networks of all posteriors
    have to be the same, but for the heads. Draws of which a pass does not hold all, for the longest
    of their examples, have passes of their own, as have those that `Share.mixes` excludes.

    Parameters
    ----------
    questions
        The questions.
    rows
        Most rows (draws x examples) of one pass.
    """
    shared = [question for question in questions if question.whole.mixes and question.fits(rows)]
    answers: list[Prediction] | None = None
    if len(shared) > 1 or any(question.filled for question in shared):
        answers = _together(shared, rows)
    made = {} if answers is None else dict(zip(map(id, shared), answers, strict=True))
    return [made[id(q)] if id(q) in made else q.alone() for q in questions]


def _together(questions: Sequence[Question], rows: int) -> list[Prediction] | None:
    carrier = questions[0]
    device = device_of(carrier.predictor.joint.program)
    records: list[list[Any]] = [[] for _ in questions]
    orders: list[list[int]] = [[] for _ in questions]
    for piece in _pieces(questions, rows):
        longest = max(questions[k].length(i) for k, numbers in piece for i in numbers)
        examples = [row for k, numbers in piece for row in questions[k].examples(numbers, longest)]
        batch = to_device(carrier.prepared.collate(examples), device)
        shares = [questions[k].share(len(numbers)) for k, numbers in piece]
        with DRAWING.shared(), evaluating(shares[0].joint):
            outputs = mixed_pass(shares, batch)
        if outputs is None:
            return None
        start = 0
        for (k, numbers), output in zip(piece, outputs, strict=True):
            own = {n: t[start : start + len(numbers)] for n, t in batch.items()}
            records[k].append(_record(questions[k], output, own))
            orders[k] += numbers
            start += len(numbers)
    return [
        _prediction(question, kept, order)
        for question, kept, order in zip(questions, records, orders, strict=True)
    ]


def _prediction(question: Question, records: Sequence[Any], order: Sequence[int]) -> Prediction:
    """Return the prediction, whose examples were read in this order."""
    joint = question.predictor.joint
    made = named(joint.task.prediction.collect(records, _task(question)), joint).in_order(order)
    finished: Prediction = question.prepared.collate.finish(made, question.prepared.examples)
    return finished


def _pieces(questions: Sequence[Question], rows: int) -> Iterator[list[tuple[int, list[int]]]]:
    """Yield question -> the numbers of its examples, for one pass after the other.

    Texts of like length share a pass, the longest come first, and a pass has as many rows as
    `pass_rows` allows, of ``rows`` at most.
    """
    every = [(k, i) for k, question in enumerate(questions) for i in range(len(question.prepared))]
    piece: list[tuple[int, int]] = []
    size = most = 0
    for k, i in sorted(every, key=lambda pair: -questions[pair[0]].length(pair[1])):
        settings = len(questions[k].distinct[1])
        if piece and size + settings > most:
            yield _grouped(piece)
            piece, size = [], 0
        if not piece:
            most = questions[k].most(questions[k].length(i), rows)
        piece.append((k, i))
        size += settings
    yield _grouped(piece)


def _grouped(piece: list[tuple[int, int]]) -> list[tuple[int, list[int]]]:
    pairs = groupby(sorted(piece), key=lambda pair: pair[0])
    return [(k, [i for _, i in of_one]) for k, of_one in pairs]


def _record(question: Question, output: torch.Tensor, batch: Any) -> Any:
    """Return what the prediction keeps of the outputs (s, b, ...), one for each setting."""
    counts = question.distinct[1]
    if len(counts) < counts.sum():  # the copy of all logits would be for nothing
        output = output.repeat_interleave(counts.to(output.device), 0)
    return question.predictor.joint.task.prediction.reduce(_task(question), [output], batch)


def _task(question: Question) -> Any:
    return question.predictor.joint.task.at(question.predictor.temperature)
