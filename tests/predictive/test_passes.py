"""How often the network runs for a prediction: once for each setting that differs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import pytest
import torch
from problems import bert, bert_choice, llama, mlp, questions, tokenizer
from torch import Tensor, nn

import pyrolora
from pyrolora import AdapterConfig, Posterior, defaults
from pyrolora.guides import MAP, Ensemble, Flat, Guide, Laplace, MeanField, MonteCLoRA
from pyrolora.predictive import draw_factors
from pyrolora.predictive.predict import pass_rows, passes

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3


class Counting(nn.Module):
    """A network that notes how many rows each call has."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.rows = mlp(), []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return self.body(x)


def fitted(guide: Guide) -> Posterior:
    return pyrolora.fit(
        Counting(), (X, Y), guide=guide, task="classification",
        adapter=AdapterConfig(r=2), epochs=3, learning_rate=0.05, batch_size=4, seed=1,
    )  # fmt: skip


def rows_of(posterior: Posterior, *args: Any, **options: Any) -> list[int]:
    """The rows of each call of the network for a prediction."""
    assert posterior.model.together({"inputs": X})  # which a network is asked once
    posterior.base.rows.clear()
    posterior.predict((X,), *args, **options)
    return list(posterior.base.rows)


@pytest.mark.parametrize(
    ("guide", "settings"),
    [
        (MAP(), 1),
        (MAP(prior_scale=0.5), 1),
        (Flat(rho=0.1), 1),
        (Flat(rho=0.1, at_prediction=True), 32),
        (MonteCLoRA(), 32),
        (Flat(inner=MonteCLoRA()), 32),
        (MeanField(latent="B"), 32),
        (Laplace(linearised=False, prior_scale=0.1), 32),
        (Laplace(prior_scale=0.1), 1),  # one pass; draws are products with its Jacobian
        (Ensemble(members=5), 5),
        (Flat(inner=Ensemble(members=5), rho=0.1), 5),
        (Flat(inner=Ensemble(members=5), rho=0.1, at_prediction=True), 32),
    ],
    ids=str,
)
def test_32_draws_cost_as_many_rows_as_there_are_different_settings(
    guide: Guide, settings: int
) -> None:
    posterior = fitted(guide)
    rows = rows_of(posterior, 32)
    assert sum(rows) == settings * len(X)
    assert posterior.predict((X,), 32).draws.shape == (32, 8, 3)
    assert rows_of(posterior, 0) == [len(X)]
    assert posterior.predict((X,), 0).draws.shape == (1, 8, 3)


@pytest.mark.parametrize(
    ("rows", "calls"),
    [(8, [8] * 5), (16, [16, 16, 8]), (40, [40]), (1, [8] * 5), (23, [16, 16, 8])],
)
def test_settings_ride_in_one_pass_as_far_as_the_rows_reach(rows: int, calls: list[int]) -> None:
    """Thirty-two draws of five members; the outputs are the same, however they are cut."""
    posterior = fitted(Ensemble(members=5))
    factors = draw_factors(posterior.model, 32)
    assert posterior.model.together({"inputs": X})
    posterior.base.rows.clear()
    with torch.no_grad():
        found = torch.cat(list(passes(posterior.model, {"inputs": X}, factors, rows)))
        assert posterior.base.rows == calls
        each = [posterior.model.network({"inputs": X}, factors[i]) for i in range(32)]
    torch.testing.assert_close(found, torch.stack(each))


def test_a_batch_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few rows are asked for, an example runs with its whole batch."""
    posterior = fitted(MonteCLoRA())
    assert rows_of(posterior, 3, batch_size=5) == [15, 9]
    factors = draw_factors(posterior.model, 3, seed=0)
    posterior.base.rows.clear()
    with torch.no_grad():
        assert len(list(passes(posterior.model, {"inputs": X}, factors, 2))) == 3
    assert posterior.base.rows == [8, 8, 8]


def test_no_draw_of_an_ensemble_is_its_mean_update_in_one_pass() -> None:
    posterior = fitted(Ensemble(members=3))
    factors = draw_factors(posterior.model, 0)
    assert factors.pooled
    with torch.no_grad():
        (output,) = passes(posterior.model, {"inputs": X}, factors, 1)
    torch.testing.assert_close(output[0], posterior.merge()(X))


def test_a_draw_is_one_function_whatever_the_number_of_draws() -> None:
    """Linearised ones, too: the first of many is the one that comes alone."""
    posterior = fitted(Laplace(prior_scale=0.1))
    mean = posterior.predict((X,), 0).draws
    many = draw_factors(posterior.model, 3, seed=0)
    for count in (1, 2):
        with torch.no_grad():
            found = list(passes(posterior.model, {"inputs": X}, many[:count], 100))
            whole = list(passes(posterior.model, {"inputs": X}, many, 100))
        torch.testing.assert_close(torch.cat(found), torch.cat(whole)[:count])
    assert (posterior.predict((X,), 1, seed=0).draws - mean).abs().max() > 1e-3


# Texts of like length ---------------------------------------------------------------------------


def texts(n: int = 17) -> datasets.Dataset:
    """Of 1 to 9 words, long and short ones mixed."""
    lengths = [1 + (7 * i) % 9 for i in range(n)]
    rows = [{"text": " ".join(["good", "bad", "film"][:k] * k)[: 5 * k]} for k in lengths]
    return datasets.Dataset.from_list(rows)


def labelled_reviews() -> datasets.Dataset:
    return texts().add_column("label", [i % 2 for i in range(17)])


def labelled_questions() -> datasets.Dataset:
    rows = questions(9).to_list()
    return datasets.Dataset.from_list(
        [
            {**row, "question": " ".join([row["question"]] * (1 + i % 4))}
            for i, row in enumerate(rows)
        ]
    )


@pytest.mark.parametrize(
    ("network", "data"),
    [
        (bert, labelled_reviews),
        (llama, texts),
        (bert_choice, labelled_questions),
    ],
    ids=["classes", "tokens", "choices"],
)
def test_examples_keep_their_order_and_their_values_though_batches_are_of_like_length(
    network: Callable[[], nn.Module], data: Callable[[], datasets.Dataset],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    posterior = pyrolora.fit(network(), data(), tokenizer=tokenizer(), epochs=1, seed=0)
    sizes: list[tuple[int, ...]] = []
    inner = posterior.base.forward

    def spy(input_ids: Tensor, **more: Any) -> Any:
        sizes.append(tuple(input_ids.shape))
        return inner(input_ids=input_ids, **more)

    monkeypatch.setattr(posterior.base, "forward", spy)
    together = posterior.predict(data(), 3, batch_size=4, seed=0)
    lengths = [size[-1] for size in sizes]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]
    for i, row in enumerate(data()):
        alone = posterior.predict([row], 3, seed=0)
        torch.testing.assert_close(
            together.uncertainty[i], alone.uncertainty[0], rtol=1e-4, atol=1e-6
        )
        if together.log_likelihood is not None:
            torch.testing.assert_close(
                together.log_likelihood[:, i], alone.log_likelihood[:, 0], rtol=1e-4, atol=1e-5
            )
        chosen = together.select(torch.tensor([i]))
        for name in ("entropy", "aleatoric", "targets"):
            found, whole = getattr(chosen, name), getattr(together, name)
            assert (found is None) == (whole is None)
            assert found is None or torch.equal(found[0].nan_to_num(), whole[i].nan_to_num())


def test_an_order_is_made_of_columns_of_tokens_that_differ_in_length_alone() -> None:
    posterior = pyrolora.fit(bert(), labelled_reviews(), tokenizer=tokenizer(), epochs=1)

    def order(data: Any) -> list[int] | None:
        return posterior.predictor.prepare(data, need_labels=False).by_length()

    found = order(texts())
    lengths = [len(ids) for ids in tokenizer()(texts()["text"][:])["input_ids"]]
    assert found is not None
    assert sorted(found) == list(range(17))
    assert [lengths[i] for i in found] == sorted(lengths, reverse=True)
    assert order(["good film", "bad book"]) is None
    assert order((torch.full((3, 4), 5),)) is None


def test_rows_of_a_pass_are_as_many_as_their_tokens_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "PREDICT_TOKENS_CPU", 40)
    for shape, rows in {(2, 10): 4, (2, 5): 6, (2, 50): 1, (2, 4, 5): 2}.items():
        assert pass_rows({"input_ids": torch.zeros(shape, dtype=torch.long)}, 6) == rows
    assert pass_rows({"inputs": torch.zeros(2, 100)}, 6) == 6
