"""Acquisition: BatchBALD against all joint labels, the ranks of the others, and refusals."""

from __future__ import annotations

from itertools import product

import datasets
import pytest
import torch
from problems import bert, llama, reviews, tokenizer, tokens

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.errors import ConfigError, DataError
from pyrolora.predictive import (
    ClassPrediction,
    MultiLabelPrediction,
    RegressionPrediction,
    acquisition,
)
from pyrolora.predictive.acquisition import acquire, batchbald


def probabilities(draws=6, n=5, classes=3, seed=0, sharp=2.0):
    rng = torch.Generator().manual_seed(seed)
    return (sharp * torch.randn(draws, n, classes, generator=rng, dtype=torch.float64)).softmax(-1)


def information(probs, rows):
    """I(y_rows; draw), by the sum over all joint labels."""
    total = 0.0
    for labels in product(range(probs.shape[-1]), repeat=len(rows)):
        each = torch.stack([probs[:, i, c] for i, c in zip(rows, labels, strict=True)]).prod(0)
        mean = each.mean()
        total += float(torch.special.xlogy(each, each).mean() - torch.special.xlogy(mean, mean))
    return total


def greedy(probs, k):
    chosen = []
    for _ in range(k):
        left = [i for i in range(probs.shape[1]) if i not in chosen]
        chosen.append(max(left, key=lambda i: information(probs, [*chosen, i])))
    return chosen


@pytest.mark.parametrize("seed", range(6))
def test_batchbald_is_the_greedy_search_over_all_joint_labels(seed):
    probs = probabilities(draws=60, seed=seed)
    assert batchbald(probs, 4) == greedy(probs, 4)


def test_joint_entropies_are_those_of_all_joint_labels_also_when_they_are_sampled():
    probs = probabilities(draws=16, n=6, sharp=1.0)
    expected = -torch.special.xlogy(probs, probs).sum(-1).mean(0)
    exact, sampled = acquisition._Batch(probs, 0), acquisition._Batch(probs, 0, most=3)
    for row in (4, 1, 2):
        exact.add(row)
        sampled.add(row)
    assert (len(exact.joint), len(sampled.joint)) == (27, acquisition.CONFIGURATIONS)
    for i in (0, 3, 5):
        rows = [4, 1, 2, i]
        truth = information(probs, rows) + float(expected[rows].sum())
        assert float(exact.joint_entropies()[i]) == pytest.approx(truth)
        assert float(sampled.joint_entropies()[i]) == pytest.approx(truth, abs=0.03)


def test_a_long_batch_does_not_underflow():
    probs = probabilities(draws=8, n=900, sharp=0.3)
    batch = acquisition._Batch(probs, 0, most=3)
    for row in range(899):
        batch.add(row)
    assert batch.scale.max() < -800  # e^-745 is 0 in float64
    assert batch.joint_entropies().isfinite().all()
    with pytest.warns(RuntimeWarning, match="8 draws have no more than 2.08"):
        assert len({*batchbald(probabilities(draws=8, n=12, sharp=6.0), 8, seed=0)}) == 8


def test_batchbald_does_not_ask_twice_what_the_others_do():
    """Two copies of the most disputed example, and one that is a little less so."""
    one, other = torch.tensor([0.95, 0.05] * 4), torch.tensor([0.9, 0.9, 0.1, 0.1] * 2)
    probs = torch.stack([torch.stack([p, 1 - p], -1) for p in (one, one, other)], 1)
    prediction = ClassPrediction(None, None, probs)
    assert acquire(prediction, 2, "epistemic") == [0, 1]
    assert acquire(prediction, 2, "batchbald") == [0, 2]


def test_each_criterion_takes_the_highest():
    draws = probabilities(n=30)
    prediction = ClassPrediction(None, None, draws)
    for by in ("entropy", "epistemic"):
        order = getattr(prediction, by).argsort(descending=True)
        assert acquire(prediction, 5, by) == order[:5].tolist()
    several = MultiLabelPrediction(None, None, draws)
    assert acquire(several, 3) == several.epistemic.argsort(descending=True)[:3].tolist()
    regression = RegressionPrediction(None, None, draws[..., 0], 0.3)
    assert acquire(regression, 1) == [int(draws[..., 0].std(0).argmax())]


def test_what_cannot_be_asked_is_refused_by_name():
    draws = probabilities()
    several = MultiLabelPrediction(None, None, draws)
    with pytest.raises(ConfigError, match=r"batchbald.*one class per example.*MultiLabelPred"):
        acquire(several, 2, "batchbald")
    prediction = ClassPrediction(None, None, draws)
    with pytest.raises(ConfigError, match="by must be one of 'epistemic', 'entropy', 'batchbald'"):
        acquire(prediction, 2, "bald")
    with pytest.raises(DataError, match="the pool has 5 examples, and k=6"):
        acquire(prediction, 6)
    with pytest.raises(ConfigError, match="k must be a whole number >= 1"):
        acquire(prediction, 0)
    point = ClassPrediction(None, None, draws[:1].repeat(3, 1, 1))
    with pytest.raises(ConfigError, match="asks where draws disagree, and all 3 are the same"):
        acquire(point, 2, "batchbald")
    assert len(acquire(point, 2, "entropy")) == 2


@pytest.fixture(scope="module")
def posterior():
    return pyrolora.fit(
        bert(initializer_range=0.3), tokens(16), epochs=2, adapter=AdapterConfig(r=2), seed=0,
        learning_rate=0.02,
    )  # fmt: skip


def test_a_posterior_acquires_from_a_pool_whose_labels_it_does_not_read(posterior):
    pool = tokens(20, seed=3)
    for by in ("epistemic", "entropy", "batchbald"):
        chosen = posterior.acquire(pool, 4, by, num_samples=8, seed=0)
        assert chosen == acquire(posterior.predict(pool, 8, seed=0), 4, by)
        assert pool.select(chosen)["labels"]
        assert posterior.acquire(pool.remove_columns("labels"), 4, by, 8, seed=0) == chosen
        strange = tokens(20, seed=3, classes=7)  # labels that are no classes
        assert posterior.acquire(strange, 4, by, 8, seed=0) == chosen
        assert len(posterior.acquire(pool, 2, by, draws=[0, 3, 5])) == 2
    splits = datasets.DatasetDict(train=pool, test=tokens(8))
    with pytest.raises(DataError, match="one data set"):
        posterior.acquire(splits, 2)


def test_a_language_model_is_refused():
    texts = reviews(6).remove_columns("label")
    model = pyrolora.fit(
        llama(), texts, epochs=1, tokenizer=tokenizer(), adapter=AdapterConfig(r=1)
    )
    with pytest.raises(ConfigError, match=r"TokenPrediction has none: acquire\(\) serves classes"):
        model.acquire(texts, 2, num_samples=2)
