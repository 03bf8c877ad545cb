"""Chance: whether predictions know more about the labels than can be known without the inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from pyrolora import defaults
from pyrolora.adapters import FlatFactors
from pyrolora.data import prepare
from pyrolora.model import JointModel
from pyrolora.predictive import Prediction, predict
from pyrolora.tasks import Task


class Fitted(Protocol):
    """The attributes of a posterior that a prediction without its adapters takes."""

    model: JointModel
    tokenizer: Any
    temperature: float

    @property
    def base(self) -> nn.Module: ...

    @property
    def task(self) -> Task: ...


@dataclass(frozen=True)
class NoGain:
    """The gain of a prediction over its baseline, where it is within two standard errors of zero.

    Attributes
    ----------
    baseline
        The name of the baseline.
    nats
        The mean gain in log-likelihood per row.
    error
        The standard error of ``nats``.
    n
        How many rows there are.
    losses_too
        Whether the losses were compared as well; they are no better either.
    """

    baseline: str
    nats: float
    error: float
    n: int
    losses_too: bool


def no_gain(
    prediction: Prediction, without_adapters: Callable[[], Prediction | None]
) -> NoGain | None:
    """Return the gain over `Prediction.baseline` where nothing shows that it is positive.

    It is None where the log-likelihood, or the loss where the baseline has one, is better by more
    than two standard errors of the paired differences: a prediction that is overconfident has still
    learnt. On training data that says little, since labels can be memorised, random ones too.
    """
    scores, losses = prediction.log_predictive, prediction.loss
    if scores is None or losses is None or len(scores) < 2:
        return None
    baseline = prediction.baseline(without_adapters)
    if baseline is None:
        return None
    gains = [scores.double() - baseline.log_likelihood.double()]
    if baseline.loss is not None:
        gains.append(baseline.loss.double() - losses.double())
    n = len(scores)
    tests = [(g.mean(), g.std(ddof=1) / n**0.5) for g in (gain.numpy() for gain in gains)]
    if any(mean > 2 * error for mean, error in tests):
        return None
    nats, error = tests[0]
    return NoGain(baseline.name, float(nats), float(error), n, len(tests) > 1)


def without_adapters(posterior: Fitted, data: Any, batch_size: int) -> Prediction | None:
    """Return the prediction by the network without its adapters.

    None where the weights of the network itself are fitted, so that there is nothing to leave out.
    """
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
