"""Conformal sets: the guarantee, by simulation and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from counting import CountPrediction

from pyrolora.errors import ConfigError, DataError
from pyrolora.predictive import (
    ClassPrediction,
    Conformal,
    RegressionPrediction,
    TokenPrediction,
)
from pyrolora.tasks import TagPrediction


def classes(n, sharpness, generator):
    """Labels drawn from probabilities of which the prediction gives a power: overconfident."""
    weights = torch.rand(n, 5, generator=generator).pow(3) + 1e-3
    truth = weights / weights.sum(-1, keepdim=True)
    targets = torch.multinomial(truth, 1, generator=generator).squeeze(-1)
    given = truth.pow(sharpness)
    return ClassPrediction(targets, None, (given / given.sum(-1, keepdim=True))[None])


def numbers(n, generator, claimed=0.3):
    """Errors of scale 1 of a model that claims less."""
    mean = torch.randn(n, generator=generator)
    targets = mean + torch.randn(n, generator=generator)
    return RegressionPrediction(targets, None, mean[None], noise_scale=claimed)


@pytest.mark.parametrize("mass", [0.8, 0.95])
@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_coverage_is_what_was_asked_for_however_wrong_the_model(kind, mass):
    """Over calibration sets of n = 99 the coverage is Beta(k, n + 1 - k) with k = ⌈100 mass⌉, whose
    mean is ``mass``: exactly the guarantee, not more."""
    generator = torch.Generator().manual_seed(0)

    def draw(n):
        return classes(n, 4.0, generator) if kind == "classes" else numbers(n, generator)

    found = [Conformal(draw(99), mass).evaluate(draw(1000))["coverage"] for _ in range(60)]
    mean = torch.tensor(found)
    error = (mass * (1 - mass) / 101) ** 0.5 / 60**0.5 + (mass * (1 - mass) / 60_000) ** 0.5
    assert float(mean.mean()) == pytest.approx(mass, abs=4 * error)


def test_the_threshold_is_the_right_order_statistic():
    probs = torch.tensor([[[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]]])  # scores .1 .2 .4 .7
    calibration = ClassPrediction(torch.zeros(4, dtype=torch.long), None, probs)
    assert Conformal(calibration, 0.8).threshold == pytest.approx(0.7)  # the 4th of 4
    half = Conformal(calibration, 0.6)  # the 3rd
    assert half.threshold == pytest.approx(0.4)
    new = ClassPrediction(torch.tensor([1, 0]), None, torch.tensor([[[0.7, 0.3], [0.5, 0.5]]]))
    assert half(new).tolist() == [[True, False], [False, False]]
    assert half.evaluate(new) == {"coverage": 0.0, "size": 0.5}


def test_intervals_are_means_plus_minus_the_threshold_in_standard_deviations():
    draws = torch.tensor([[0.0, 1.0], [0.0, 3.0]])
    calibration = RegressionPrediction(torch.tensor([2.0, 2.0]), None, draws, noise_scale=1.0)
    fitted = Conformal(calibration, 0.5)  # scores 2 and 0; the ⌈1.5⌉ = 2nd
    low, high = fitted(calibration).unbind(-1)
    spread = torch.tensor([1.0, 2**0.5])
    torch.testing.assert_close(low, torch.tensor([0.0, 2.0]) - 2 * spread)
    torch.testing.assert_close(high, torch.tensor([0.0, 2.0]) + 2 * spread)
    assert fitted.evaluate(calibration)["size"] == pytest.approx(float(4 * spread.mean()))


def test_what_cannot_be_calibrated_is_refused():
    generator = torch.Generator().manual_seed(0)
    nine = classes(9, 1.0, generator)
    Conformal(nine, 0.9)
    with pytest.raises(DataError, match=r"mass 0\.9 need at least 9 calibration examples, got 8"):
        Conformal(classes(8, 1.0, generator), 0.9)
    with pytest.raises(ConfigError, match=r"mass must be a number in \(0, 1\), got 1"):
        Conformal(nine, 1)
    with pytest.raises(ConfigError, match="calibrated on a ClassPrediction, got a Regression"):
        Conformal(nine)(numbers(3, generator))
    with pytest.raises(DataError, match="calibration needs labels"):
        Conformal(ClassPrediction(None, None, nine.draws))
    with pytest.raises(DataError, match="coverage needs labels"):
        Conformal(nine).evaluate(ClassPrediction(None, None, nine.draws))
    empty = torch.zeros(1, 1)
    with pytest.raises(ConfigError, match="too many to list"):
        Conformal(TokenPrediction(None, None, empty, empty, torch.ones(1)))


@pytest.mark.parametrize("kind", [0, 1])
def test_a_prediction_that_is_nan_calibrates_nothing(kind):
    draws = torch.rand(3, 40, 2) if kind == 0 else torch.randn(3, 40)
    draws[:, 7] = torch.nan
    found: Any
    if kind == 0:
        found = ClassPrediction(torch.zeros(40).long(), None, draws)
    else:
        found = RegressionPrediction(torch.zeros(40), None, draws, 1.0)
    with pytest.raises(DataError, match="example 7 of the calibration is NaN"):
        Conformal(found)


def test_a_choice_that_does_not_exist_is_in_no_set():
    """The right choice of the second example is so improbable that 1 - p rounds to 1."""
    probs = torch.tensor([[[1.0, 0.0, 0.0], [1 - 1e-9, 1e-9, 0.0]]])
    calibration = ClassPrediction(torch.tensor([0, 1]), None, probs)
    conformal = Conformal(calibration, 0.6)
    assert conformal.threshold == pytest.approx(1)
    assert conformal(calibration).tolist() == [[True, False, False], [True, True, False]]


def test_the_threshold_of_tags_is_that_of_classes():
    probs = torch.tensor([[[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]]])
    given = {"targets": torch.zeros(4, dtype=torch.long), "log_likelihood": None, "draws": probs}
    place = {"example": torch.arange(4), "position": torch.zeros(4, dtype=torch.long)}
    assert Conformal(TagPrediction(**given, **place), 0.8).threshold == pytest.approx(0.7)


def test_a_prediction_of_another_kind_is_not_called_a_text():
    counts = CountPrediction(torch.ones(30), None, torch.ones(2, 30))
    with pytest.raises(ConfigError, match=r"got a CountPrediction; for .* make it a subclass"):
        Conformal(counts)


def test_what_is_no_prediction_is_refused():
    with pytest.raises(ConfigError, match="conformal sets are of one class per row, or of numbers"):
        Conformal(object())
    for mass in (0.0, 1.0, float("nan"), "high"):
        with pytest.raises(ConfigError, match="mass must be a number in"):
            Conformal(classes(9, 1.0, torch.Generator()), mass)
