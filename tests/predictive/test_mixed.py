"""Rows of several posteriors in one pass: each has the answer of its posterior alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import bert, reviews, tokenizer

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.model import mixed
from pyrolora.predictive import Question, predict_mixed

TEXTS = ["the film was good", "bad", "a very very dull book is not fine", "fine"]


def fitted(network: Any, guide: Any, rank: int, seed: int, **options: Any) -> pyrolora.Posterior:
    adapter = AdapterConfig(r=rank, lora_alpha=2 * rank + seed)
    settings = {"adapter": adapter, "epochs": 2, "learning_rate": 0.05, "batch_size": 8}
    data = reviews(16, seed=seed)
    return pyrolora.fit(
        network, data, guide, tokenizer=tokenizer(), seed=seed, **{**settings, **options}
    )


@pytest.fixture(scope="module")
def posteriors() -> list[pyrolora.Posterior]:
    """Ranks, scalings, numbers of draws, heads and temperatures that differ."""
    torch.manual_seed(0)
    network = bert(initializer_range=0.3)
    pissa = AdapterConfig(r=2, init_lora_weights="pissa")
    several = [
        fitted(network, "meanfield", 2, 0),
        fitted(network, "montec", 4, 1),
        fitted(network, "map", 1, 2),
        fitted(network, pyrolora.guides.Ensemble(members=2), 3, 3),
        fitted(network, "meanfield", 2, 4, adapter=pissa),
    ]
    several[1].temperature = 1.7
    return several


def questions(
    posteriors: list[pyrolora.Posterior], draws: list[int | None], *, measured: bool = False
) -> list[Question]:
    asked = []
    for number, posterior in enumerate(posteriors):
        predictor, texts = posterior.predictor, TEXTS[: 1 + number % 3]
        rows = predictor.prepare(texts, need_labels=False)
        lengths = [len(ids) for ids in tokenizer()(texts)["input_ids"]] if measured else None
        factors = predictor.factors(draws[number], 5, None)
        asked.append(Question(predictor, factors, rows, lengths))
    return asked


@pytest.mark.parametrize("rows", [256, 11])
def test_each_answer_is_that_of_the_posterior_alone(
    posteriors: list[pyrolora.Posterior], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    run = mixed.mixed_pass
    monkeypatch.setattr(
        "pyrolora.predictive.mixed.mixed_pass", lambda *a: passes.append(run(*a)) or passes[-1]
    )
    draws = [4, 3, 8, 2, 0]
    for number, got in enumerate(predict_mixed(questions(posteriors, draws), rows=rows)):
        texts = TEXTS[: 1 + number % 3]
        alone = posteriors[number].predict(texts, draws[number], seed=5)
        torch.testing.assert_close(got.draws, alone.draws, atol=1e-6, rtol=1e-5)
        assert got.classes == alone.classes
    assert len(passes) == (1 if rows == 256 else 2)
    assert all(outputs is not None for outputs in passes)


def test_texts_of_like_length_share_passes_of_few_tokens(
    posteriors: list[pyrolora.Posterior], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers come in the order of the examples all the same."""
    shapes = []
    run = mixed.mixed_pass

    def seen(shares: Any, batch: Any) -> Any:
        rows = sum(share.size * (share.factors.draws or 1) for share in shares)
        shapes.append((rows, batch["input_ids"].shape[1]))
        assert batch["attention_mask"].sum(1).max() == shapes[-1][1]
        return run(shares, batch)

    monkeypatch.setattr("pyrolora.predictive.mixed.mixed_pass", seen)
    monkeypatch.setattr("pyrolora.defaults.PREDICT_TOKENS_CPU", 48)
    draws: list[int | None] = [4, 3, 8, 2, 0]
    for number, got in enumerate(predict_mixed(questions(posteriors, draws, measured=True))):
        alone = posteriors[number].predict(TEXTS[: 1 + number % 3], draws[number], seed=5)
        torch.testing.assert_close(got.draws, alone.draws, atol=1e-6, rtol=1e-5)
    widths = [width for _, width in shapes]
    assert widths == sorted(widths, reverse=True)
    assert len({*widths}) > 1
    assert all(rows * width <= 48 for rows, width in shapes)


def test_draws_that_fill_a_pass_have_their_own(
    posteriors: list[pyrolora.Posterior], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mixed pass holds all draws of an example; other passes take some of them."""
    sizes = []
    run = mixed.mixed_pass
    monkeypatch.setattr(
        "pyrolora.predictive.mixed.mixed_pass", lambda *a: sizes.append(len(a[0])) or run(*a)
    )
    monkeypatch.setattr("pyrolora.defaults.PREDICT_TOKENS_CPU", 48)
    draws: list[int | None] = [3, 20, 1]
    for number, got in enumerate(predict_mixed(questions(posteriors[:3], draws, measured=True))):
        alone = posteriors[number].predict(TEXTS[: 1 + number % 3], draws[number], seed=5)
        torch.testing.assert_close(got.draws, alone.draws, atol=1e-6, rtol=1e-5)
    assert max(sizes) == 2


def test_classes_may_differ_in_number_and_name() -> None:
    """Two networks whose weights are equal but for the heads; the first runs both."""
    few, many = bert(2), bert(3)
    many.bert.load_state_dict(few.bert.state_dict())
    posteriors = [fitted(few, "meanfield", 2, 0), fitted(many, "meanfield", 2, 1)]
    for order in (posteriors, posteriors[::-1]):
        for posterior, got in zip(order, predict_mixed(questions(order, [3, 2])), strict=True):
            draws = 3 if posterior is order[0] else 2
            alone = posterior.predict(TEXTS[: len(got.draws[0])], draws, seed=5)
            torch.testing.assert_close(got.draws, alone.draws, atol=1e-6, rtol=1e-5)
            assert got.classes == alone.classes


def test_linearised_draws_are_read_alone(
    posteriors: list[pyrolora.Posterior], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = fitted(posteriors[0].base, "laplace", 2, 6)
    monkeypatch.setattr("pyrolora.predictive.mixed.mixed_pass", None)
    got = predict_mixed(questions([posteriors[0], other], [2, 2]))
    alone = other.predict(TEXTS[:2], 2, seed=5)
    torch.testing.assert_close(got[1].draws, alone.draws, atol=1e-6, rtol=1e-5)
