"""Risk-coverage curves: by hand, and in the limits of a perfect and a useless uncertainty."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import llama, tokens

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.errors import DataError
from pyrolora.predictive import (
    ClassPrediction,
    RegressionPrediction,
    aurc,
    evaluate,
    risk_coverage,
)


def classes(confidence, right):
    """A two-class prediction with these confidences, right where asked."""
    first = torch.tensor(confidence, dtype=torch.float64)
    probs = torch.stack([first, 1 - first], -1)[None]
    targets = 1 - torch.tensor(right).long()
    return ClassPrediction(targets, probs.log()[:, range(len(targets)), targets], probs)


def test_the_curve_is_the_error_rate_of_the_most_certain():
    prediction = classes([0.6, 0.99, 0.8, 0.9], [False, True, False, True])
    table = risk_coverage(prediction)
    np.testing.assert_allclose(table["coverage"], [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(table["risk"], [0, 0, 1 / 3, 1 / 2])
    assert aurc(prediction) == pytest.approx((0 + 0 + 1 / 3 + 1 / 2) / 4)
    assert evaluate(prediction)["aurc"] == aurc(prediction)


def test_ties_are_counted_in_expectation():
    tied = classes([0.9, 0.7, 0.7, 0.7], [True, True, False, False])
    np.testing.assert_allclose(
        risk_coverage(tied)["risk"], [0, (2 / 3) / 2, (4 / 3) / 3, 2 / 4], atol=1e-12
    )


def test_an_uncertainty_that_knows_nothing_has_the_error_rate_everywhere():
    tied = classes([0.7] * 8, [True] * 6 + [False] * 2)
    np.testing.assert_allclose(risk_coverage(tied)["risk"], 0.25)
    assert aurc(tied) == pytest.approx(evaluate(tied)["accuracy"] / 3)


def test_the_loss_of_a_regression_is_its_squared_error_in_the_order_of_its_spread():
    draws = torch.tensor([[1.0, 5.0, 2.0], [1.2, 9.0, 4.0]])  # spreads 0.1, 2, 1
    targets = torch.tensor([1.1, 8.0, 2.0])  # squared errors 0, 1, 1
    prediction = RegressionPrediction(targets, torch.zeros(2, 3), draws, noise_scale=0.5)
    np.testing.assert_allclose(risk_coverage(prediction)["risk"], [0, 0.5, 2 / 3], atol=1e-6)


def test_texts_are_ordered_by_their_mean_entropy_and_lose_nats_a_token():
    posterior = pyrolora.fit(
        llama(initializer_range=0.3), tokens(12).remove_columns("labels"), epochs=1,
        adapter=AdapterConfig(r=1), seed=0,
    )  # fmt: skip
    prediction = posterior.predict(tokens(6).remove_columns("labels"), 3, seed=0)
    assert prediction.log_predictive is not None
    order = prediction.entropy.mean(-1).argsort()
    losses = (-prediction.log_predictive / 7)[order]
    expected = losses.cumsum(0) / torch.arange(1, 7)
    np.testing.assert_allclose(risk_coverage(prediction)["risk"], expected, rtol=1e-5)


def test_without_labels_there_is_no_risk():
    with pytest.raises(DataError, match="needs labels"):
        risk_coverage(ClassPrediction(None, None, torch.full((1, 3, 2), 0.5)))


def test_a_text_in_which_nothing_counts_is_left_out():
    posterior = pyrolora.fit(llama(), texts := tokens(6).remove_columns("labels"), epochs=1)
    rows = [{**row, "labels": row["input_ids"]} for row in texts]
    silent = {**rows[0], "labels": [-100] * len(rows[0]["input_ids"])}
    alone, beside = (posterior.predict(r, 2, seed=0) for r in (rows, [silent, *rows]))
    assert len(beside.num_tokens) == 7
    assert aurc(beside) == pytest.approx(aurc(alone))
    assert len(risk_coverage(beside)) == 6
    both = {"a": posterior, "b": pyrolora.fit(llama(seed=1), texts, epochs=1)}
    found, expected = (pyrolora.compare(both, r, 2, seed=0) for r in ([silent, *rows], rows))
    for name in ("nll_difference", "nll_difference_se"):
        assert found[name].tolist() == pytest.approx(expected[name].tolist())
