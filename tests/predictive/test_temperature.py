"""A temperature for every prediction of a posterior, against known answers."""

from __future__ import annotations

import json
import math
import shutil

import datasets
import pytest
import torch
from problems import (
    LETTERED,
    bert,
    bert_choice,
    bert_labels,
    bert_mlm,
    bert_spans,
    bert_tags,
    letter_tokenizer,
    llama,
    llama_reward,
    mask_tokenizer,
    preferences,
    questions,
    several,
    squad,
    summaries,
    t5,
    tagged,
    texts,
    tokenizer,
    tokens,
    writer_tokenizer,
)
from scipy.optimize import minimize_scalar
from torch import nn

import pyrolora
from pyrolora import AdapterConfig, tasks
from pyrolora.errors import ConfigError, NonFiniteError
from pyrolora.predictive.calibration import lowest
from pyrolora.storage import digest_of
from pyrolora.tasks import Classification, Task

OPTIONS = {"epochs": 1, "adapter": AdapterConfig(r=2), "seed": 0}


def identity(guide="map", inputs=3, **options):
    """A posterior whose network gives its inputs back, as good as."""
    network = nn.Sequential(nn.Linear(inputs, inputs, bias=False))
    with torch.no_grad():
        network[0].weight.copy_(torch.eye(inputs))
    data = torch.randn(6, inputs), torch.arange(6) % inputs
    return pyrolora.fit(
        network, data, guide, task="classification", learning_rate=1e-9, **OPTIONS, **options
    )


def labelled(logits, factor):
    """Labels drawn from softmax(logits), and the logits times ``factor``."""
    drawn = torch.distributions.Categorical(logits=logits).sample()
    return factor * logits, drawn


@pytest.mark.parametrize("factor", [0.4, 3.0])
def test_the_factor_of_the_logits_is_found(factor):
    posterior = identity()
    found = posterior.calibrate(labelled(2 * torch.randn(20_000, 3), factor), batch_size=5000)
    assert found.temperature == pytest.approx(factor, rel=0.05)
    assert posterior.temperature == found.temperature
    assert found.nll_after < found.nll_before


def test_a_point_gets_classical_temperature_scaling():
    posterior = identity()
    data = labelled(torch.randn(300, 3), 2.5)
    found = posterior.calibrate(data)

    def nll(log_temperature):
        logits = data[0].double() / math.exp(log_temperature)
        return float(nn.functional.cross_entropy(logits, data[1]))

    direct = minimize_scalar(nll, bounds=(-2, 2), method="bounded", options={"xatol": 1e-9})
    assert found.temperature == pytest.approx(math.exp(direct.x), rel=1e-3)
    assert found.nll_after == pytest.approx(direct.fun, abs=1e-6)
    assert found.nll_before == pytest.approx(nll(0.0), abs=1e-6)
    assert posterior.evaluate(data)["nll"] == pytest.approx(direct.fun, abs=1e-5)


def test_the_noise_of_a_point_regression_gets_the_variance_of_the_residuals():
    network = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    data = torch.randn(20, 2), torch.randn(20)
    options = {**OPTIONS, "adapter": AdapterConfig(r=1), "task": "regression"}
    posterior = pyrolora.fit(network, data, "map", **options)
    held_out = torch.randn(50, 2), 3 * torch.randn(50)
    before = posterior.predict(held_out)
    found = posterior.calibrate(held_out)
    after = posterior.predict(held_out)
    variance = float((held_out[1] - before.mean).square().mean())
    assert found.temperature == pytest.approx(variance / before.noise_scale**2, rel=1e-3)
    assert after.noise_scale**2 == pytest.approx(variance, rel=1e-3)
    assert torch.equal(after.draws, before.draws)


def test_several_draws_are_tempered_each_and_a_second_calibration_starts_anew():
    posterior = pyrolora.fit(
        bert(initializer_range=0.5), tokens(16), "montec", learning_rate=0.02, **OPTIONS
    )
    before = posterior.predict(tokens(40, seed=2), 5, seed=1)
    found = posterior.calibrate(tokens(40, seed=3, classes=2), 5, seed=1)
    assert found.temperature != 1
    after = posterior.predict(tokens(40, seed=2), 5, seed=1)
    expected = (before.draws.log() / found.temperature).softmax(-1)
    torch.testing.assert_close(after.draws, expected)
    assert torch.equal(after.draws.argmax(-1), before.draws.argmax(-1))
    torch.testing.assert_close(after.entropy - after.aleatoric, after.epistemic, atol=1e-6, rtol=0)
    scored = posterior.log_likelihood(tokens(40, seed=3), 5, seed=1)
    nll = -float((scored.double().logsumexp(0) - math.log(5)).mean())
    assert found.nll_after == pytest.approx(nll, abs=1e-5)
    assert posterior.calibrate(tokens(40, seed=3), 5, seed=1) == found
    assert f"temperature={found.temperature:.4g}" in repr(posterior)
    posterior.temperature = 1.0
    assert torch.equal(posterior.predict(tokens(40, seed=2), 5, seed=1).draws, before.draws)


def numbers(n, seed=0):
    return tokens(n, seed=seed).cast_column("labels", datasets.Value("float32"))


CASES = {
    "classification": (bert, tokens, None),
    "regression": (lambda: bert(1), numbers, None),
    "text-generation": (llama, texts, tokenizer),
    "multiple-choice": (bert_choice, questions, tokenizer),
    "fill-mask": (bert_mlm, texts, mask_tokenizer),
    "text2text-generation": (t5, summaries, writer_tokenizer),
    "token-classification": (bert_tags, tagged, tokenizer),
    "reward-modelling": (llama_reward, preferences, letter_tokenizer),
    "multi-label-classification": (bert_labels, several, tokenizer),
    "question-answering": (bert_spans, squad, tokenizer),
    **dict.fromkeys(
        [kind.name for kind in tasks.BY_CAUSAL_LM.values()],
        (lambda: llama(vocab_size=len(LETTERED)), questions, letter_tokenizer),
    ),
}


@pytest.mark.filterwarnings("ignore:the temperature .* is the end:RuntimeWarning")
@pytest.mark.parametrize(
    "name", [name for name in tasks.available() if tasks.task_class(name).tempers]
)
def test_every_likelihood_has_its_lowest_nll_there(name):
    network, data, words = CASES[name]
    posterior = pyrolora.fit(
        network(), data(8), "montec", task=name, tokenizer=words and words(), **OPTIONS
    )
    held_out = data(12, seed=5)
    found = posterior.calibrate(held_out, 3, seed=2)
    assert posterior.evaluate(held_out, 3, seed=2)["nll"] == pytest.approx(
        found.nll_after, abs=1e-4
    )
    if not found.at_an_end:
        for factor in (0.9, 1.1):
            posterior.temperature = found.temperature * factor
            assert posterior.evaluate(held_out, 3, seed=2)["nll"] >= found.nll_after - 1e-6


@pytest.mark.parametrize("temperature", [0.5, 2.5])
def test_a_tempered_law_is_the_power_normalised(temperature):
    logits = torch.randn(4, 3, dtype=torch.float64)
    law = tasks.Classification().at(temperature)
    for y in range(3):
        got = law.log_prob(logits, {"labels": torch.full((4,), y)})
        powers = logits.softmax(-1) ** (1 / temperature)
        torch.testing.assert_close(got, (powers[:, y] / powers.sum(-1)).log())
    gaussian = tasks.Regression()
    grid = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    batch = {"labels": grid}
    powers = (gaussian.log_prob(torch.zeros_like(grid), batch) / temperature).exp().double()
    powers /= powers.sum() * (grid[1] - grid[0])
    got = gaussian.at(temperature).log_prob(torch.zeros_like(grid), batch).exp().double()
    torch.testing.assert_close(got, powers, atol=1e-6, rtol=1e-4)
    assert gaussian.temperature == 1


def test_a_likelihood_without_a_temperature_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(Classification, "tempers", Task.tempers)
    posterior = identity()
    with pytest.raises(ConfigError, match=r"'classification' has no temperature.*Conformal"):
        posterior.calibrate(labelled(torch.randn(9, 3), 2.0))
    assert posterior.temperature == 1


def test_predictions_are_bit_equal_after_loading_and_older_folders_have_none(tmp_path):
    posterior = pyrolora.fit(bert(initializer_range=0.5), tokens(16), "montec", **OPTIONS)
    posterior.temperature = math.pi / 2
    posterior.save(tmp_path / "run")
    expected = posterior.predict(tokens(9), 4, seed=1).draws
    loaded = pyrolora.load(tmp_path / "run", bert(initializer_range=0.5))
    assert loaded.temperature == posterior.temperature
    assert torch.equal(loaded.predict(tokens(9), 4, seed=1).draws, expected)

    def described(**changes):
        folder = tmp_path / "other"
        shutil.copytree(tmp_path / "run", folder, dirs_exist_ok=True)
        meta = json.loads((tmp_path / "run" / "posterior.json").read_text(encoding="utf-8"))
        meta.update(changes)
        meta = {name: value for name, value in meta.items() if value != "absent"}
        meta["digest"] = digest_of(meta)
        (folder / "posterior.json").write_text(json.dumps(meta), encoding="utf-8")
        return pyrolora.load(folder, bert(initializer_range=0.5))

    assert described(temperature="absent").temperature == 1
    for bad in (0.0, -1.0, 1e9, "2", True, None):
        with pytest.raises(
            pyrolora.PyroLoraError, match=r"temperature must be a number from 0\.05"
        ):
            described(temperature=bad)


def test_what_is_about_the_fit_and_what_leaves_it_has_no_temperature(tmp_path):
    posterior = pyrolora.fit(bert(initializer_range=0.5), tokens(16), "montec", **OPTIONS)
    data, options = tokens(16), {"log_likelihood": True, "num_samples": 3, "seed": 0}
    khat = posterior.khat(data, 25, seed=0)
    before = posterior.to_arviz(data=data, **options)
    posterior.temperature = 2.0
    after = posterior.to_arviz(data=data, **options)
    same = before["log_likelihood"]["y"].values == after["log_likelihood"]["y"].values
    assert same.all()
    probs = [torch.tensor(i["posterior_predictive"]["probs"].values) for i in (before, after)]
    torch.testing.assert_close(probs[1], (probs[0].log() / 2).softmax(-1))
    assert after["posterior"].attrs["temperature"] == 2.0
    assert posterior.khat(data, 25, seed=0) == khat
    with pytest.warns(UserWarning, match="a merged model does not hold the temperature 2"):
        posterior.merge()
    with pytest.warns(
        UserWarning, match=r"an adapter does not hold the .* its logits are to be divided"
    ):
        posterior.to_peft(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="starts from has the temperature 2"):
        later = pyrolora.fit(posterior, data, "laplace", seed=0)
    assert later.temperature == 1
    posterior.report(tmp_path / "page.html", data, num_samples=2, seed=0)
    assert "temperature" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_texts_are_written_and_scored_at_the_temperature():
    posterior = pyrolora.fit(
        llama(initializer_range=0.5), texts(8), "montec", tokenizer=tokenizer(), **OPTIONS
    )
    options = {"max_new_tokens": 6, "do_sample": True, "top_k": 0, "seed": 3}
    written = posterior.generate(["the film"], 2, temperature=1.7, **options)
    posterior.temperature = 1.7
    again = posterior.generate(["the film"], 2, **options)
    assert torch.equal(written.sequences, again.sequences)
    assert not torch.allclose(written.log_likelihood, again.log_likelihood)
    assert not posterior.base._forward_hooks
    with pytest.raises(ConfigError, match=r"have 'choices' between texts.*calibrate on texts"):
        posterior.calibrate(questions(4))


def test_the_minimum_its_ends_and_what_cannot_be_one():
    found = lowest(lambda t: (t.log() - 0.37) ** 2 + 1, 5)
    assert found.temperature == pytest.approx(math.exp(0.37), rel=1e-9)
    assert (found.nll_before, found.nll_after) == pytest.approx((1.1369, 1.0))
    assert lowest(torch.ones_like, 5).temperature == 1.0, "nothing to gain"
    end = lowest(lambda t: t, 5)
    assert end.temperature == pytest.approx(0.05)
    assert end.at_an_end
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        lowest(lambda t: t * math.nan, 5)
    posterior = identity()
    x = torch.randn(10, 3)
    with pytest.warns(RuntimeWarning, match="is the end of what was looked at"):
        posterior.calibrate((x, x.argmax(-1)))
    for bad in (0, math.nan, 1e4, "1"):
        with pytest.raises(ConfigError, match="temperature must be"):
            posterior.temperature = bad
