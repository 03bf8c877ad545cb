"""Predictions and their scores, against direct computation and Monte Carlo."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import Rows, bert, bert_choice, llama, mlp, reviews, texts, tokenizer, tokens
from torch.nn import functional as F

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.errors import ConfigError, DataError
from pyrolora.guides import MonteCLoRA
from pyrolora.predictive import ClassPrediction, RegressionPrediction, draw_factors, evaluate
from pyrolora.predictive.predict import predict
from pyrolora.tasks import Classification, Regression


def class_prediction(s=7, n=50, c=4) -> ClassPrediction:
    draws = torch.distributions.Dirichlet(torch.ones(c)).sample((s, n))
    targets = torch.randint(c, (n,))
    scores = draws[:, torch.arange(n), targets].log()
    return ClassPrediction(draws=draws, targets=targets, log_likelihood=scores)


def regression_prediction(s=40, n=6, noise=0.4) -> RegressionPrediction:
    draws, targets = torch.randn(s, 1) + torch.randn(s, n), torch.randn(n)
    scores = torch.distributions.Normal(draws, noise).log_prob(targets)
    return RegressionPrediction(
        draws=draws, noise_scale=noise, targets=targets, log_likelihood=scores
    )


def test_uncertainty_splits_into_what_draws_share_and_what_they_disagree_on():
    prediction = class_prediction()
    law = torch.distributions.Categorical
    total = law(probs=prediction.draws.mean(0)).entropy()
    each = law(probs=prediction.draws).entropy().mean(0)
    torch.testing.assert_close(prediction.entropy, total)
    torch.testing.assert_close(prediction.aleatoric, each)
    torch.testing.assert_close(prediction.epistemic, total - each)
    assert (prediction.epistemic > 0).all()


def test_draws_that_agree_have_no_epistemic_part_and_certainty_no_entropy():
    draws = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]).expand(5, 2, 2)
    prediction = ClassPrediction(draws=draws, targets=None, log_likelihood=None)
    assert torch.equal(prediction.epistemic, torch.zeros(2))
    torch.testing.assert_close(prediction.entropy, torch.tensor([0.0, np.log(2)]).float())


def test_classification_metrics_against_numpy():
    prediction = class_prediction(n=400)
    probs, targets = prediction.probs.numpy(), prediction.targets.numpy()
    confidence, hit = probs.max(1), probs.argmax(1) == targets
    bins = np.minimum((confidence * 15).astype(int), 14)
    ece = sum(
        (bins == b).mean() * abs(confidence[bins == b].mean() - hit[bins == b].mean())
        for b in set(bins)
    )
    scores = evaluate(prediction)
    assert scores["accuracy"] == pytest.approx(hit.mean())
    assert scores["nll"] == pytest.approx(-np.log(probs[np.arange(400), targets]).mean(), rel=1e-5)
    assert scores["ece"] == pytest.approx(ece, rel=1e-4)
    assert scores["brier"] == pytest.approx(((probs - np.eye(4)[targets]) ** 2).sum(1).mean(), 1e-5)


def test_regression_intervals_and_scores_against_monte_carlo():
    prediction = regression_prediction()
    m = 200_000
    picks = torch.randint(len(prediction.draws), (m,))
    sampled = prediction.draws[picks] + 0.4 * torch.randn(m, 6)
    low, high = prediction.interval(0.8)
    torch.testing.assert_close(low, sampled.quantile(0.1, dim=0), atol=0.03, rtol=0)
    torch.testing.assert_close(high, sampled.quantile(0.9, dim=0), atol=0.03, rtol=0)
    torch.testing.assert_close(prediction.mean, sampled.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(prediction.std, sampled.std(0), atol=0.02, rtol=0)
    scores = evaluate(prediction)
    y = prediction.targets
    spread = (sampled - sampled[torch.randperm(m)]).abs().mean(0)
    crps = (sampled - y).abs().mean(0) - 0.5 * spread
    assert scores["crps"] == pytest.approx(crps.mean().item(), abs=0.01)
    assert scores["rmse"] == pytest.approx((prediction.mean - y).square().mean().sqrt().item())
    density = torch.distributions.Normal(prediction.draws, 0.4).log_prob(y).exp().mean(0)
    assert scores["nll"] == pytest.approx(-density.log().mean().item(), rel=1e-4)
    inside = ((y >= prediction.interval(0.9)[0]) & (y <= prediction.interval(0.9)[1])).float()
    assert scores["coverage"] == pytest.approx(inside.mean().item())


@pytest.fixture(scope="module")
def posterior():
    return pyrolora.fit(
        bert(3, initializer_range=0.3), tokens(classes=3), learning_rate=0.01, epochs=4, seed=1,
        guide=MonteCLoRA(sample_scale=0.5),
    )  # fmt: skip


def test_a_draw_is_one_function_whatever_the_batches_and_passes(posterior):
    """Same seed: the same draws for any batch size and any number of rows in a pass."""
    data = tokens(11, classes=3, seed=3)
    prepared = posterior.predictor.prepare(data, need_labels=True)
    factors = draw_factors(posterior.model, 6, seed=0)
    whole = predict(posterior.model, prepared, factors, batch_size=11, rows=1000).draws
    assert (whole.std(0) > 1e-4).any(), "draws must differ for this test to say anything"
    for batch_size, rows in ((1, 1), (4, 8), (5, 1000), (11, 11)):
        cut = predict(posterior.model, prepared, factors, batch_size=batch_size, rows=rows).draws
        torch.testing.assert_close(cut, whole, atol=1e-6, rtol=1e-5)


def test_draws_equal_networks_with_the_drawn_weights(posterior):
    """Against plain networks whose weights were changed by hand, draw by draw."""
    from pyrolora.storage import merged

    data = tokens(5, classes=3)
    factors = draw_factors(posterior.model, 3, seed=2)
    prepared = posterior.predictor.prepare(data, need_labels=True)
    found = predict(posterior.model, prepared, factors).draws
    ids = torch.tensor(data["input_ids"][:])
    for s in range(3):
        network = merged(posterior.model, factors[s])
        with torch.no_grad():
            expected = network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.softmax(
                -1
            )
        torch.testing.assert_close(found[s], expected, atol=1e-6, rtol=1e-5)


def test_no_samples_means_the_mean_adapter_with_one_draw(posterior):
    prediction = posterior.predict(tokens(5, classes=3), num_samples=0)
    assert prediction.draws.shape == (1, 5, 3)
    assert torch.equal(prediction.epistemic, torch.zeros(5))
    assert torch.equal(prediction.draws, posterior.predict(tokens(5, classes=3), 0).draws)


def test_prediction_without_labels_and_as_a_table(posterior):
    data = tokens(5, classes=3).remove_columns("labels")
    prediction = posterior.predict(data, num_samples=4)
    assert prediction.targets is None
    table = prediction.to_pandas()
    columns = ["prob_0", "prob_1", "prob_2", "predicted", "entropy", "aleatoric", "epistemic"]
    assert list(table.columns) == columns
    assert len(table) == 5
    low, high = prediction.interval(0.5)
    assert (low <= high).all()
    assert low.shape == (5, 3)


def test_prediction_leaves_mode_gradients_and_random_numbers_alone(posterior):
    posterior.base.bert.encoder.train()
    modes = [m.training for m in posterior.model.modules()]
    before = torch.random.get_rng_state()
    posterior.predict(tokens(5, classes=3), num_samples=3, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [m.training for m in posterior.model.modules()] == modes
    assert all(p.grad is None for p in posterior.model.parameters())
    posterior.model.eval()


def test_texts_can_be_predicted_directly():
    posterior = pyrolora.fit(
        bert(initializer_range=0.3), reviews(64), tokenizer=tokenizer(), learning_rate=0.01,
        epochs=40, batch_size=16, seed=0,
    )  # fmt: skip
    prediction = posterior.predict(["the film was good", "a bad book", "bad"], num_samples=8)
    assert prediction.predicted.tolist() == [1, 0, 0]


def test_log_likelihood_is_what_the_probabilities_say(posterior):
    data = tokens(9, classes=3)
    scores = posterior.log_likelihood(data, num_samples=5, seed=4)
    draws = posterior.predict(data, num_samples=5, seed=4).draws
    labels = torch.tensor(data["labels"][:])
    torch.testing.assert_close(
        scores, draws[:, torch.arange(9), labels].log(), atol=1e-5, rtol=1e-4
    )


def test_language_model_scores_are_sums_over_labelled_tokens():
    """Against cross entropy on the merged model, with padding; entropy against the full softmax."""
    network, data = llama(initializer_range=0.3), texts(7)
    posterior = pyrolora.fit(
        network, data, guide="map", tokenizer=tokenizer(), epochs=2, learning_rate=0.02
    )
    prediction = posterior.predict(data, num_samples=0)
    plain = posterior.merge()
    expected, entropies = [], []
    for text in data["text"]:
        ids = torch.tensor(tokenizer()(text)["input_ids"])
        with torch.no_grad():
            logits = plain(input_ids=ids[None]).logits[0, :-1]
        expected.append(-F.cross_entropy(logits, ids[1:], reduction="sum"))
        entropies.append(torch.distributions.Categorical(logits=logits).entropy().mean())
    torch.testing.assert_close(
        prediction.log_likelihood[0], torch.stack(expected), atol=1e-4, rtol=1e-4
    )
    table = prediction.to_pandas()
    assert table["entropy"].tolist() == pytest.approx(torch.stack(entropies).tolist(), rel=1e-3)
    scores = evaluate(prediction)
    count = prediction.num_tokens.sum()
    assert scores["nll"] == pytest.approx((-sum(expected) / count).item(), rel=1e-4)
    assert scores["perplexity"] == pytest.approx(np.exp(scores["nll"]))
    assert prediction.entropy.isnan().any(), "padding must not count"


def test_regression_learns_its_noise():
    """The learned noise scale approaches the residual's, and 90 % intervals cover 90 %."""
    torch.manual_seed(0)
    x = torch.randn(400, 4)
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0]) + 0.3 * torch.randn(400)
    posterior = pyrolora.fit(
        mlp(4, 1), (x[:300], y[:300]), task="regression", adapter=AdapterConfig(r=1),
        guide=MonteCLoRA(sample_scale=0.05, scale_learning_rate=0.05),
        epochs=60, learning_rate=0.05, batch_size=100, seed=0,
    )  # fmt: skip
    scores = posterior.evaluate((x[300:], y[300:]))
    assert posterior.task.param("noise_scale").item() < 0.7
    assert scores["rmse"] < 0.7
    assert 0.75 < scores["coverage"] <= 1


def test_every_task_names_its_prediction():
    assert Classification.prediction is ClassPrediction
    assert Regression.prediction is RegressionPrediction


def test_a_point_mass_is_run_once_whatever_the_number_of_draws(monkeypatch):
    posterior = pyrolora.fit(bert(), tokens(), guide="map", epochs=1)
    calls = []
    network = posterior.model.network
    monkeypatch.setattr(
        posterior.model, "network", lambda *args: calls.append(args) or network(*args)
    )
    prediction = posterior.predict(tokens(), num_samples=50)
    assert len(calls) == 1
    assert prediction.draws.shape == (50, 16, 2)
    assert torch.equal(prediction.draws[:1], posterior.predict(tokens(), num_samples=0).draws)


@pytest.mark.parametrize("kind", ["int8", "uint8", "int32", "uint16", "bool"])
def test_labels_of_any_whole_type_are_scored(kind):
    inputs = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    codes = np.arange(12) % 2
    small = (inputs, codes.astype(kind))
    found = pyrolora.fit(
        mlp(outputs=2), small, "map", task="classification", adapter=AdapterConfig(r=2),
        epochs=1, eval_data=small,
    )  # fmt: skip
    expected = found.evaluate((inputs, codes), 0)
    rows = Rows([(x, torch.tensor(y)) for x, y in zip(*small, strict=True)])
    assert found.evaluate(small, 0) == found.evaluate(rows, 0) == expected


def test_features_that_are_not_finite_are_found_wherever_they_are():
    data = (torch.randn(12, 4), torch.arange(12) % 3)
    adapter = AdapterConfig(r=2)
    found = pyrolora.fit(mlp(), data, "map", task="classification", adapter=adapter)
    inputs = torch.randn(1600, 4)
    inputs[1500, 2] = torch.nan
    rows = Rows([(x, 0) for x in inputs])
    with pytest.raises(DataError, match="example 1500 is not finite"):
        found.predict(rows, 0)


@pytest.mark.filterwarnings("ignore:training has not moved")
def test_where_there_is_one_choice_it_is_right():
    data = [{"question": "the film", "choices": ["is good"], "label": 0}] * 3
    adapter = AdapterConfig(r=2)
    options = {"tokenizer": tokenizer(), "adapter": adapter, "epochs": 1}
    chooser = pyrolora.fit(bert_choice(), data, "map", **options)
    writer = pyrolora.fit(llama(), [{"text": "the film is good"}] * 3, "map", **options)
    for posterior in (chooser, writer):
        metrics = posterior.evaluate(data, 0)
        assert (metrics["accuracy"], metrics["ece"]) == pytest.approx((1, 0), abs=1e-6)
        assert (metrics["nll"], metrics["brier"]) == pytest.approx((0, 0), abs=1e-6)


@pytest.mark.parametrize(
    "data",
    [
        [{"input_ids": [5]}, {"input_ids": [6]}],
        [{"input_ids": [5, 6], "labels": [5, -100]}],
    ],
)
def test_texts_in_which_nothing_is_predicted_are_refused(data):
    options = {"tokenizer": tokenizer(), "adapter": AdapterConfig(r=2), "epochs": 1}
    with pytest.raises(DataError, match="a text's first, which nothing predicts"):
        pyrolora.fit(llama(), data, "map", **options)
    writer = pyrolora.fit(llama(), [{"text": "the film is good"}], "map", **options)
    with pytest.raises(DataError, match="nothing to learn from, or to score"):
        writer.evaluate(data, 0)


def test_numbers_of_numpy_are_numbers(tmp_path):
    adapter = AdapterConfig(r=np.int64(2), lora_alpha=np.int64(4))
    guide = MonteCLoRA(num_components=np.int64(3), sample_scale=np.float32(0.5))
    inputs = np.random.default_rng(0).normal(size=(12, 4))
    data = (inputs, np.arange(12) % 3)
    found = pyrolora.fit(
        mlp(), data, guide, task="classification", adapter=adapter, epochs=np.int64(1)
    )
    four, seed, size = np.int64(4), np.int32(1), np.int16(5)
    probs = found.predict(data, four, seed=seed, batch_size=size).probs
    torch.testing.assert_close(probs, found.predict(data, 4, seed=1, batch_size=5).probs)
    found.save(tmp_path)
    again = pyrolora.load(tmp_path, mlp())
    assert (again.bank.config.r, again.options.num_components) == (2, 3)
    for wrong in (1.5, True, -1, "a"):
        with pytest.raises(ConfigError, match="seed must be a whole number >= 0"):
            found.predict(data, 4, seed=wrong)
