"""The reliability table: by hand, and what the expected calibration error sums up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyrolora.errors import ConfigError, DataError
from pyrolora.predictive import (
    ClassPrediction,
    RegressionPrediction,
    evaluate,
    reliability_table,
)


def prediction(n=500, classes=4):
    probs = torch.distributions.Dirichlet(torch.full((classes,), 0.5)).sample((3, n))
    targets = torch.randint(classes, (n,))
    return ClassPrediction(targets, probs.log()[:, range(n), targets], probs)


def test_the_table_by_hand():
    probs = torch.tensor([[[0.95, 0.05], [0.9, 0.1], [0.3, 0.7], [0.55, 0.45]]])
    table = reliability_table(ClassPrediction(torch.tensor([0, 1, 1, 0]), None, probs), bins=5)
    assert table["count"].tolist() == [0, 0, 1, 1, 2]
    np.testing.assert_allclose(table["confidence"][2:], [0.55, 0.7, 0.925], rtol=1e-6)
    np.testing.assert_allclose(table["accuracy"][2:], [1, 1, 0.5])
    assert table["accuracy"][:2].isna().all()
    np.testing.assert_allclose(table["low"], [0, 0.2, 0.4, 0.6, 0.8])
    np.testing.assert_allclose(table["high"], [0.2, 0.4, 0.6, 0.8, 1])


def test_the_calibration_error_is_its_weighted_gap():
    found = prediction()
    table = reliability_table(found).dropna()
    gap = (table["count"] * (table["accuracy"] - table["confidence"]).abs()).sum() / 500
    assert gap == pytest.approx(evaluate(found)["ece"], abs=1e-6)
    assert table["count"].sum() == 500


def test_a_confidence_of_one_belongs_to_the_last_bin():
    probs = torch.tensor([[1.0, 0.0]] * 50 + [[0.95, 0.05]] * 50)
    targets = torch.tensor([0] * 40 + [1] * 10 + [0] * 50)  # 80 % and 100 % right
    found = ClassPrediction(targets, probs.log()[None, range(100), targets], probs[None])
    assert reliability_table(found)["count"].tolist() == [0] * 14 + [100]
    assert evaluate(found)["ece"] == pytest.approx(0.975 - 0.9, abs=1e-6)


def test_what_has_no_such_table_is_refused():
    numbers = RegressionPrediction(None, None, torch.zeros(1, 2), noise_scale=1.0)
    with pytest.raises(ConfigError, match=r"needs classes.*coverage"):
        reliability_table(numbers)
    with pytest.raises(DataError, match="needs labels"):
        reliability_table(ClassPrediction(None, None, torch.full((1, 3, 2), 0.5)))
    with pytest.raises(ConfigError, match="bins must be a whole number"):
        reliability_table(prediction(4), bins=0)


def test_confidences_on_the_edges_fall_where_the_ece_has_them():
    top = torch.arange(8, 15) / 15  # as float32 rounds them
    probs = torch.stack([top, 1 - top], -1).repeat(20, 1)
    targets = (torch.arange(len(probs)) % 3 == 0).long()
    picked = probs.gather(1, targets[:, None]).mT.log()
    found = ClassPrediction(targets, picked, probs[None])
    table = reliability_table(found).dropna()
    gaps = (table["accuracy"] - table["confidence"]).abs() * table["count"] / len(probs)
    assert evaluate(found)["ece"] == pytest.approx(gaps.sum(), abs=1e-6)
