"""Each warning fires where it should, and not next to it; its numbers are computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyrolora.diagnostics.contraction import Contraction
from pyrolora.predictive import ClassPrediction, Prediction, RegressionPrediction, TokenPrediction
from pyrolora.report.findings import (
    chains_disagree,
    few_draws,
    few_examples,
    not_converged,
    overconfident,
    prior_dominated,
)

# Overconfidence -----------------------------------------------------------------------------------


def classes(confidence: float, right: int, n: int) -> ClassPrediction:
    """n answers of one confidence, of which some are right."""
    draws = torch.tensor([confidence, 1 - confidence], dtype=torch.float64).repeat(1, n, 1)
    targets = (torch.arange(n) >= right).long()
    return ClassPrediction(targets, draws.gather(-1, targets[None, :, None])[..., 0].log(), draws)


def test_confidence_above_accuracy_is_found_with_its_numbers() -> None:
    """0.9 − 0.8 = 0.1, and the standard error is sqrt(0.8 · 0.2 / 99) = 0.0402."""
    found = overconfident(classes(0.9, 80, 100))
    assert found is not None
    assert found.name == "overconfident"
    for number in ("0.900", "0.800", "0.100", "0.040"):
        assert number in found.found
    assert found.advice


@pytest.mark.parametrize(
    ("confidence", "right", "n"),
    [
        pytest.param(0.9, 83, 100, id="0.07, within two standard errors of 0.038"),
        pytest.param(0.9, 100, 100, id="underconfident"),
        pytest.param(0.999, 99, 100, id="one error of a hundred"),
        pytest.param(0.6, 0, 2, id="two wrong answers"),
        pytest.param(0.99, 0, 1, id="one answer"),
    ],
)
def test_what_chance_may_do_is_no_overconfidence(confidence: float, right: int, n: int) -> None:
    assert overconfident(classes(confidence, right, n)) is None


def test_calibrated_classes_rarely_seem_overconfident() -> None:
    """A one-sided test at two standard errors: 2.3 % of calibrated data sets."""
    generator = torch.Generator().manual_seed(0)
    fired = 0
    for _ in range(300):
        p = 0.5 + 0.5 * torch.rand(200, generator=generator, dtype=torch.float64)
        wrong = torch.rand(200, generator=generator) > p
        draws = torch.stack([p, 1 - p], -1)[None]
        fired += overconfident(ClassPrediction(wrong.long(), draws[..., 0], draws)) is not None
    assert fired <= 15, "beyond 0.023 * 300 = 7 by three standard deviations"


def regression(inside: int, n: int) -> RegressionPrediction:
    """N(0, 1) for all, and targets in the middle but for those that are far outside."""
    targets = torch.where(torch.arange(n) < inside, 0.0, 9.0)
    return RegressionPrediction(targets, torch.zeros(1, n), torch.zeros(1, n), noise_scale=1.0)


@pytest.mark.parametrize(("inside", "fires"), [(83, True), (84, False), (90, False), (100, False)])
def test_coverage_below_what_was_promised(inside: int, fires: bool) -> None:
    """0.9 − 2 sqrt(0.09 / 100) = 0.84."""
    found = overconfident(regression(inside, 100))
    assert (found is not None) == fires
    if found is not None:
        assert "83.0%" in found.found
        assert "3.0%" in found.found


def tokens(nll: float, n: int = 20) -> TokenPrediction:
    """Texts of two tokens of 1 nat of entropy each, the first half of which costs a bit more."""
    entropy = torch.tensor([[1.0, 1.0, torch.nan]]).repeat(n, 1)
    cost = 2 * nll + torch.where(torch.arange(n) < n / 2, 0.1, -0.1)
    return TokenPrediction(torch.zeros(n, 3), -cost[None], entropy, entropy, torch.full((n,), 2))


@pytest.mark.parametrize(("nll", "fires"), [(1.03, True), (1.015, False), (0.5, False)])
def test_texts_that_cost_more_than_their_entropy(nll: float, fires: bool) -> None:
    """The standard error of a token's excess is 0.1 / 2 / sqrt(19) = 0.0115."""
    found = overconfident(tokens(nll))
    assert (found is not None) == fires
    if found is not None:
        for number in ("1.030", "1.000", "0.030", "0.011"):
            assert number in found.found


@pytest.mark.parametrize(
    "prediction",
    [
        ClassPrediction(None, None, torch.ones(1, 50, 2) / 2),
        RegressionPrediction(None, None, torch.zeros(1, 50), 1.0),
        TokenPrediction(None, None, torch.ones(9, 3), torch.ones(9, 3), torch.full((9,), 3)),
    ],
    ids=["classes", "regression", "texts"],
)
def test_without_labels_nothing_is_said_of_confidence(prediction: Prediction) -> None:
    assert overconfident(prediction) is None


# Prior --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "shift", "same"),
    [(1.0, 0.0, True), (0.96, 0.1, True), (0.9, 0.0, False), (1.0, 0.5, False), (0.0, 0.0, False)],
)
def test_a_block_is_its_prior_where_spread_and_place_are(
    scale: float, shift: float, same: bool
) -> None:
    assert Contraction("0.A", scale, shift).prior_dominated == same


def test_more_than_half_of_the_blocks_have_to_be_their_prior() -> None:
    prior, learned = Contraction("0.A", 1.0, 0.0), Contraction("1.A", 0.4, 2.0)
    found = prior_dominated([prior, learned, prior])
    assert found is not None
    assert found.name == "prior_dominated"
    assert "2 of 3 blocks" in found.found
    assert "1.00" in found.found
    assert prior_dominated([prior, learned]) is None
    assert prior_dominated([]) is None, "plain LoRA has no prior"


# Convergence --------------------------------------------------------------------------------------


def history(values: list[float], **more: int) -> list[dict[str, float]]:
    return [{"step": float(i), "elbo": float(v), **more} for i, v in enumerate(values)]


NOISE = np.random.default_rng(0).normal(size=40)
STEPS = np.arange(40) / 40
CURVES = {
    "a straight rise": (100 * STEPS, True),
    "a rise in noise": (100 * STEPS + 3 * NOISE, True),
    "a slow exponential": (-100 * np.exp(-2 * STEPS), True),
    "a fast exponential": (-100 * np.exp(-8 * STEPS), False),
    "a plateau in noise": (-100 * np.exp(-8 * STEPS) + 3 * NOISE, False),
    "a rise below the noise": (4 * STEPS + 10 * NOISE, False),
    "a fall": (-100 * STEPS, False),
    "a constant": (np.zeros(40), False),
    "too few entries": (np.arange(7), False),
}


@pytest.mark.parametrize("curve", CURVES)
def test_a_fit_has_converged_where_its_objective_has_stopped_rising(curve: str) -> None:
    values, fires = CURVES[curve]
    assert (not_converged(history(list(values))) is not None) == fires


def test_the_share_of_the_rise_is_told() -> None:
    """0 to 7: the last quarters have the means 4.5 and 6.5, the whole rise is 6.5."""
    found = not_converged([{"eval_nll": 1.0}, *history([0, 1, 2, 3, 4, 5, 6, 7])])
    assert found is not None
    assert found.name == "not_converged"
    assert "31%" in found.found


def test_the_member_that_rises_most_speaks_for_an_ensemble() -> None:
    done, rising = list(-np.exp(-9 * STEPS)), list(STEPS)
    assert not_converged(history(done, member=0) + history(done, member=1)) is None
    assert not_converged(history(done, member=0) + history(rising, member=1)) is not None


@pytest.mark.parametrize(
    ("entry", "fires"),
    [
        ({"r_hat": 1.01, "effective_sample_size": 90.0, "divergences": 0}, False),
        ({"r_hat": 1.2, "effective_sample_size": 9.0, "divergences": 0}, True),
        ({"r_hat": 1.01, "effective_sample_size": 90.0, "divergences": 3}, True),
        ({"r_hat": float("nan"), "effective_sample_size": 1.0, "divergences": 0}, True),
        ({"loss": 1.0}, False),
    ],
)
def test_chains_have_to_mix(entry: dict[str, float], fires: bool) -> None:
    found = chains_disagree([{"loss": 2.0}, entry])
    assert (found is not None) == fires
    if found is not None:
        assert f"{entry['r_hat']:.2f}" in found.found
        assert f"{entry['divergences']} steps diverged" in found.found


# How much there is --------------------------------------------------------------------------------


def test_fewer_than_a_hundred_examples_are_few() -> None:
    found = few_examples(25)
    assert found is not None
    assert found.name == "few_examples"
    assert "±0.10" in found.found
    assert few_examples(99) is not None
    assert few_examples(100) is None


def test_fewer_than_sixteen_draws_are_few() -> None:
    found = few_draws(4)
    assert found is not None
    assert found.name == "few_draws"
    assert "±0.25" in found.found
    assert few_draws(15) is not None
    assert few_draws(16) is None


def test_one_setting_has_no_mutual_information() -> None:
    for draws in (0, 1):
        found = few_draws(draws)
        assert found is not None
        assert "mutual information is zero" in found.found


def test_all_that_there_is_is_not_few() -> None:
    assert few_draws(5, stored=5) is None, "every member of an ensemble"
    assert few_draws(3, stored=5) is not None
    assert few_draws(10, stored=400) is not None, "some of the draws of NUTS"
    assert few_draws(1, point=True) is None
