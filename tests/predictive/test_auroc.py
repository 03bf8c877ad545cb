"""The AUROC is the Mann-Whitney statistic, whatever the scale of the scores."""

from __future__ import annotations

import math

import pytest
import torch
from problems import bert, reviews, tokenizer
from scipy.stats import mannwhitneyu
from torch import Tensor

import pyrolora
from pyrolora.errors import DataError
from pyrolora.predictive import ClassPrediction, RegressionPrediction, auroc, evaluate


def reference(low: Tensor, high: Tensor) -> float:
    """P(low < high) + P(low = high) / 2, by rank sums."""
    statistic = mannwhitneyu(high.double().numpy(), low.double().numpy()).statistic
    return float(statistic / (len(low) * len(high)))


def draws(kind: str) -> tuple[Tensor, Tensor]:
    low, high = torch.randn(40), torch.randn(25) + 0.5
    changed = {
        "random": (low, high),
        "tied": (low.round(), high.round()),
        "probabilities": (low.sigmoid(), high.sigmoid()),
        "large": (1e6 * low, 1e6 * high),
        "far above one": (1000 + low, 1000 + high),
        "far below zero": (low - 1000, high - 1000),
        "half precision": (low.half(), high.half()),
        "infinite": (torch.cat([low, torch.tensor([-math.inf])]),
                     torch.cat([high, torch.tensor([math.inf, math.inf])])),
    }  # fmt: skip
    return changed[kind]


KINDS = ["random", "tied", "probabilities", "large", "far above one", "far below zero"]


@pytest.mark.parametrize("kind", [*KINDS, "half precision", "infinite"])
def test_auroc_is_the_mann_whitney_statistic(kind: str) -> None:
    low, high = draws(kind)
    expected = reference(low, high)
    assert auroc(low, high) == pytest.approx(expected, abs=1e-6)
    assert auroc(high, low) == pytest.approx(1 - expected, abs=1e-6)


def test_scores_that_differ_in_their_ninth_digit_differ() -> None:
    steps = torch.arange(50, dtype=torch.float64)
    low, high = 0.5 + 2e-9 * steps, 0.5 + 1e-9 + 2e-9 * steps
    assert auroc(low, high) == pytest.approx(reference(low, high), abs=1e-6)
    assert auroc(low, low + 1e-9) != pytest.approx(0.5, abs=1e-3)


def test_many_scores_keep_their_order() -> None:
    """More of them than single precision has steps between 0 and 1 near 1 would blur."""
    low, high = torch.randn(60_000, dtype=torch.float64), torch.randn(60_000, dtype=torch.float64)
    assert auroc(low, high) == pytest.approx(reference(low, high), abs=1e-6)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        ([0.1, 0.2], [0.3, 0.4], 1.0),
        ([0.3, 0.4], [0.1, 0.2], 0.0),
        ([0.5, 0.5], [0.5], 0.5),
        ([0.0, 0.0], [0.0, 0.0], 0.5),
        ([1.0, 3.0], [2.0, 4.0], 0.75),
        ([0.0], [0.0, 1.0], 0.75),
    ],
)
def test_auroc_of_a_few_numbers(low: list[float], high: list[float], expected: float) -> None:
    assert auroc(torch.tensor(low), torch.tensor(high)) == pytest.approx(expected)


def test_an_empty_side_says_nothing() -> None:
    some, none = torch.tensor([0.5, 0.7]), torch.tensor([])
    assert math.isnan(auroc(none, some))
    assert math.isnan(auroc(some, none))
    assert math.isnan(auroc(none, none))


# The errors of a prediction -----------------------------------------------------------------------


def prediction(probs: list[list[float]], targets: list[int]) -> ClassPrediction:
    """A prediction of one draw."""
    draw = torch.tensor([probs])
    labels = torch.tensor(targets)
    scores = draw[:, torch.arange(len(labels)), labels].log()
    return ClassPrediction(draws=draw, targets=labels, log_likelihood=scores)


SURE, UNSURE, HALF = [0.9, 0.1], [0.6, 0.4], [0.5001, 0.4999]


@pytest.mark.parametrize(
    ("probs", "targets", "expected"),
    [
        pytest.param([SURE, SURE, UNSURE], [0, 0, 1], 1.0, id="the unsure one is wrong"),
        pytest.param([SURE, UNSURE, UNSURE], [1, 0, 0], 0.0, id="the sure one is wrong"),
        pytest.param([SURE, SURE], [0, 1], 0.5, id="no difference"),
        pytest.param([SURE, UNSURE, HALF], [0, 1, 0], 0.5, id="in between"),
        pytest.param([SURE, [0.1, 0.9], UNSURE], [0, 1, 1], 1.0, id="either class"),
    ],
)
def test_error_auroc_says_whether_entropy_finds_the_wrong_answers(
    probs: list[list[float]], targets: list[int], expected: float
) -> None:
    assert evaluate(prediction(probs, targets))["error_auroc"] == pytest.approx(expected)


@pytest.mark.parametrize("targets", [[0, 0], [1, 1]])
def test_error_auroc_is_not_defined_without_both_kinds_of_answers(targets: list[int]) -> None:
    assert math.isnan(evaluate(prediction([SURE, UNSURE], targets))["error_auroc"])


def test_error_auroc_is_that_of_the_entropy_of_the_mean_over_draws() -> None:
    probs = torch.distributions.Dirichlet(torch.ones(4)).sample((7, 200))
    targets = torch.randint(4, (200,))
    scores = probs[:, torch.arange(200), targets].log()
    found = evaluate(ClassPrediction(draws=probs, targets=targets, log_likelihood=scores))
    mean = probs.mean(0)
    entropy, right = -(mean * mean.log()).sum(-1), mean.argmax(-1) == targets
    assert found["error_auroc"] == pytest.approx(
        reference(entropy[right], entropy[~right]), abs=1e-5
    )


def test_a_posterior_scores_its_errors() -> None:
    posterior = pyrolora.fit(
        bert(initializer_range=0.3), reviews(16), tokenizer=tokenizer(), epochs=1, seed=0
    )
    found = posterior.predict(reviews(40, 1), 4, seed=0)
    right = found.predicted == found.targets
    assert 0 < right.sum() < 40, "the test says nothing"
    scores = posterior.evaluate(reviews(40, 1), 4, seed=0)
    expected = reference(found.entropy[right], found.entropy[~right])
    assert scores["error_auroc"] == pytest.approx(expected, abs=1e-6)


def test_scores_that_are_not_defined_do_not_count() -> None:
    nan = float("nan")
    found = auroc(torch.tensor([0.1, nan, 0.4]), torch.tensor([0.3, nan]))
    assert found == auroc(torch.tensor([0.1, 0.4]), torch.tensor([0.3])) == 0.5


def test_other_data_have_to_be_of_the_same_kind() -> None:
    numbers = RegressionPrediction(None, None, torch.zeros(1, 2), noise_scale=1.0)
    with pytest.raises(DataError, match="got a RegressionPrediction beside a ClassPrediction"):
        evaluate(prediction([SURE, UNSURE], [0, 1]), numbers)
