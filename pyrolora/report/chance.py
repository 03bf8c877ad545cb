"""Whether predictions know more of the labels than can be known without the inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import singledispatch
from typing import Any

import numpy as np
import torch

from pyrolora import defaults
from pyrolora.adapters import FlatFactors
from pyrolora.data import prepare
from pyrolora.predictive import (
    ClassPrediction,
    Prediction,
    RegressionPrediction,
    TokenPrediction,
    predict,
)
from pyrolora.report.facts import Subject
from pyrolora.report.findings import Finding


@singledispatch
def no_better_than_chance(
    prediction: Prediction, plain: Callable[[], Prediction | None]
) -> Finding | None:
    """Whether predictions are no better, on these labels, than the best law without the inputs.

    Of classes those are the frequencies of these labels, of a regression the normal law of these
    targets: no prediction that is the same for all examples is better. Of texts it is
    ``plain``, the prediction by the network without the adapters. It fires where neither the
    log-likelihood nor (of classes and numbers) the error is better by more than two standard errors
    of the paired differences: one that is overconfident has still learnt. On training data it says
    little: labels can be memorised, random ones too.
    """
    raise TypeError(f"no chance is known for {type(prediction).__name__}")


@no_better_than_chance.register
def _(prediction: ClassPrediction, plain: Callable[[], Prediction | None]) -> Finding | None:
    if prediction.targets is None or prediction.log_predictive is None or prediction.loss is None:
        return None
    hits = np.eye(prediction.probs.shape[-1])[prediction.targets.numpy()]
    there = (prediction.probs.numpy() > 0) | (hits > 0)  # choices are not as many everywhere
    counts = hits.sum(0) * there
    scores = np.log((counts * hits).sum(1) / counts.sum(1))
    wrong = counts.argmax(1) != hits.argmax(1)
    return _unless_better(
        "frequencies of the labels",
        prediction.log_predictive.double().numpy() - scores,
        wrong - prediction.loss.double().numpy(),
    )


@no_better_than_chance.register
def _(prediction: RegressionPrediction, plain: Callable[[], Prediction | None]) -> Finding | None:
    if prediction.targets is None or prediction.log_predictive is None or prediction.loss is None:
        return None
    y = prediction.targets.double().numpy()
    if not np.ptp(y):
        return None
    error = np.square(y - y.mean())
    scores = -0.5 * (error / error.mean() + math.log(2 * math.pi * error.mean()))
    return _unless_better(
        "normal law of the targets",
        prediction.log_predictive.double().numpy() - scores,
        error - prediction.loss.double().numpy(),
    )


@no_better_than_chance.register
def _(prediction: TokenPrediction, plain: Callable[[], Prediction | None]) -> Finding | None:
    if prediction.log_predictive is None:
        return None
    other = plain()
    if other is None or other.log_predictive is None:
        return None
    gain = prediction.log_predictive - other.log_predictive
    return _unless_better("network without the adapters", gain.double().numpy())


def unadapted(posterior: Subject, data: Any, batch_size: int) -> Prediction | None:
    """The prediction by the network without the adapters; None where its own weights are fitted."""
    program = posterior.model.program
    bank = program.bank
    if not bank.specs:
        return None
    device = next(program.parameters()).device
    A, B = (torch.zeros(bank.layouts[factor].total, device=device) for factor in "AB")
    member = torch.tensor(0, device=device) if program.members > 1 else None
    factors = replace(bank.origin or FlatFactors(A, B), members=member)
    prepared = prepare(
        data,
        posterior.base,
        posterior.task,
        posterior.tokenizer,
        splits=defaults.SCORE_SPLITS,
        to_learn=False,
    )
    return predict(
        posterior.model,
        prepared,
        factors,
        batch_size=batch_size,
        temperature=posterior.temperature,
    )


def _unless_better(baseline: str, *gains: np.ndarray) -> Finding | None:
    """The finding, unless one of these differences (n,) is positive by two standard errors."""
    n = len(gains[0])
    if n < 2:
        return None
    found = [(gain.mean(), gain.std(ddof=1) / n**0.5) for gain in gains]
    if any(mean > 2 * error for mean, error in found):
        return None
    nats, error = found[0]
    also = ", and the answers are not closer either" if len(gains) > 1 else ""
    return Finding(
        "no_better_than_chance",
        f"The predictions are no better than the {baseline}",
        f"An example has {nats:+.3f} nats (standard error {error:.3f}) of log-likelihood beyond "
        f"the {baseline}{also}: on these {n} examples nothing shows that anything was learnt.",
        "Look whether labels and inputs belong together and whether the loss fell; train longer, "
        "or with more data. The width of the posterior is no evidence of learning: random labels "
        "change it as real ones do.",
    )
