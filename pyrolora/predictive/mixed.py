"""Predictions of several posteriors on one network, whose rows share passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch

from pyrolora import defaults
from pyrolora.adapters import AnyFactors
from pyrolora.data import Prepared, to_device
from pyrolora.model import Share, evaluating, mixed_pass
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
    """

    predictor: Predictor
    factors: AnyFactors
    prepared: Prepared

    @cached_property
    def distinct(self) -> tuple[AnyFactors, torch.Tensor]:
        """The different settings among the draws, and how many draws have each."""
        if self.factors.draws is None:
            return self.factors, torch.ones(1, dtype=torch.long)
        return self.factors.distinct()

    def share(self, size: int) -> Share:
        """Return the share of ``size`` of the examples in a pass."""
        return Share(self.predictor.joint, self.distinct[0], size)

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
    have to be the same, but for the heads.

    Parameters
    ----------
    questions
        The questions.
    rows
        Most rows (draws x examples) of one pass.
    """
    answers = None
    if len(questions) > 1 and all(question.share(1).mixes for question in questions):
        answers = _together(questions, rows)
    return [question.alone() for question in questions] if answers is None else answers


def _together(questions: Sequence[Question], rows: int) -> list[Prediction] | None:
    carrier = questions[0]
    device = next(carrier.predictor.joint.program.parameters()).device
    records: list[list[Any]] = [[] for _ in questions]
    for piece in _pieces(questions, rows):
        examples = [questions[k].prepared.examples[i] for k, numbers in piece for i in numbers]
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
            start += len(numbers)
    return [
        named(question.predictor.joint.task.prediction.collect(kept, _task(question)), joint)
        for question, kept in zip(questions, records, strict=True)
        for joint in [question.predictor.joint]
    ]


def _pieces(questions: Sequence[Question], rows: int) -> Iterator[list[tuple[int, list[int]]]]:
    """Yield question -> the numbers of its examples, with at most ``rows`` rows per piece."""
    piece: list[tuple[int, int]] = []
    size = 0
    for k, question in enumerate(questions):
        settings = len(question.distinct[1])
        for i in range(len(question.prepared)):
            if piece and size + settings > rows:
                yield _grouped(piece)
                piece, size = [], 0
            piece.append((k, i))
            size += settings
    yield _grouped(piece)


def _grouped(piece: list[tuple[int, int]]) -> list[tuple[int, list[int]]]:
    return [(k, [i for _, i in pairs]) for k, pairs in groupby(piece, key=lambda pair: pair[0])]


def _record(question: Question, output: torch.Tensor, batch: Any) -> Any:
    """Return what the prediction keeps of the outputs (s, b, ...), one for each setting."""
    outputs = output.repeat_interleave(question.distinct[1].to(output.device), 0)
    return question.predictor.joint.task.prediction.reduce(_task(question), [outputs], batch)


def _task(question: Question) -> Any:
    return question.predictor.joint.task.at(question.predictor.temperature)
