"""Laplace through `fit`: its prior, its two predictives, what does not count.

Its law is tested on a linear layer, its curvature and its linear predictive each on their own.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import bert, llama, mlp, reviews, tokenizer, tokens
from torch import Tensor, nn

import pyrolora
from pyrolora import AdapterConfig, defaults
from pyrolora.adapters import attach
from pyrolora.errors import ConfigError
from pyrolora.guides import MAP, Laplace
from pyrolora.guides.laplace import GRID
from pyrolora.inference import log_marginal_likelihood
from pyrolora.model import build
from pyrolora.posterior import Posterior
from pyrolora.predictive import draw_factors
from pyrolora.predictive.linearised import linearised
from pyrolora.tasks import task_for


def data(n: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Labels that the inputs tell with some noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return x, (x[:, 0] + 0.7 * torch.randn(n, generator=generator) > 0).long()


def classifier(guide: Any, epochs: int = 20, **options: Any) -> Posterior:
    """A small classifier's posterior."""
    return pyrolora.fit(
        mlp(outputs=2),
        data(),
        guide=guide,
        task="classification",
        adapter=AdapterConfig(r=2),
        epochs=epochs,
        learning_rate=0.05,
        **options,
    )


def buffers(posterior: Posterior) -> dict[str, Tensor]:
    return dict(posterior.model.program.named_buffers())


# The prior ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent", ["A", "B", "AB"])
def test_marginal_likelihood_picks_its_maximum(latent):
    posterior = pyrolora.fit(classifier("map"), data(), guide=Laplace(latent=latent))
    found = posterior.history[-1]["prior_precision"]
    evidence = posterior.model.program.evidence()
    grid = [found * 10 ** (step / 10) for step in range(-40, 41)]
    values = [log_marginal_likelihood(0.0, *evidence, λ) for λ in grid]
    assert values.index(max(values)) == 40
    assert min(values) < max(values) - 1
    assert buffers(posterior)["precision"] == pytest.approx(found)
    assert evidence[0][0].max() > 0


def test_validation_picks_the_best_of_its_grid():
    held_out = data(seed=1)
    posterior = pyrolora.fit(
        classifier("map", epochs=60), data(), guide=Laplace(tune="validation"), eval_data=held_out
    )
    found = posterior.history[0]["prior_precision"]
    scores = {}
    for λ in GRID:
        posterior.model.program.precision.fill_(λ)
        drawn = posterior.evaluate(held_out, seed=defaults.SEED)
        scores[λ] = drawn["nll"]
    best = min(scores, key=lambda λ: scores[λ])
    assert found == pytest.approx(best)
    assert max(scores.values()) > scores[best] + 0.1, "the choice matters"
    assert posterior.history[-1]["eval_nll"] == pytest.approx(scores[best], rel=1e-5)


def test_held_out_data_tune_where_there_are_some():
    options: dict[str, Any] = {"epochs": 60, "eval_data": data(seed=1)}
    default, named = (classifier(g, **options) for g in (Laplace(), Laplace(tune="validation")))
    evidence = classifier(Laplace(tune="marginal_likelihood"), **options)
    precision = [buffers(found)["precision"] for found in (default, named, evidence)]
    assert precision[0] == precision[1] != precision[2]
    assert buffers(classifier(Laplace(), epochs=60))["precision"] == precision[2]


def test_validation_without_data_is_refused_before_any_step(steps):
    with pytest.raises(
        ConfigError, match="held-out data here, and there are none; pass eval_data="
    ):
        classifier(Laplace(tune="validation"))
    assert steps == []


@pytest.mark.parametrize(
    ("guide", "adapter"),
    [
        ("laplace", {"target_modules": ["q_proj", "lm_head"]}),
        ("flat+laplace", {"target_modules": ["lm_head"]}),
        (MAP(head="gaussian"), {"modules_to_save": ["lm_head"]}),
    ],
)
def test_a_vocabulary_too_wide_for_a_dense_curvature_is_refused_before_any_step(
    guide, adapter, steps, monkeypatch
):
    """The adapters of an output layer, and the law of one that is trained in full."""
    monkeypatch.setattr(defaults, "CURVATURE_WIDTH", 32)  # as wide as the widest other layer
    monkeypatch.setattr(defaults, "HEAD_ENTRIES", 100)
    rows = [{"input_ids": [4, 5, 6], "labels": [4, 5, 6]}] * 4
    options = {"adapter": AdapterConfig(r=2, **adapter), "epochs": 1, "eval_data": rows}
    with pytest.raises(
        ConfigError, match=r"'lm_head' has 40 of them.* at most 32 are taken; leave"
    ):
        pyrolora.fit(llama(vocab_size=40), rows, guide=guide, **options)
    assert steps == []
    pyrolora.fit(llama(vocab_size=32), rows, guide=guide, **options)
    assert steps


def test_a_fixed_prior_is_that_of_the_point_estimate_too():
    found = classifier(Laplace(prior_scale=0.3), epochs=3)
    plain, other = (classifier(MAP(prior_scale=scale), epochs=3) for scale in (0.3, 0.1))
    for name in ("A_loc", "B_loc"):
        assert torch.equal(found.bank.get_parameter(name), plain.bank.get_parameter(name))
        assert not torch.equal(found.bank.get_parameter(name), other.bank.get_parameter(name))
    assert buffers(found)["precision"] == pytest.approx(1 / 0.09)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior_scale": 0.0}, "prior_scale"),
        ({"tune": "evidence"}, "tune must be one of"),
        ({"latent": "C"}, "latent must be one of"),
        ({"linearised": "yes"}, "linearised must be"),
        ({"prior_scale": 0.1, "tune": "validation"}, "tune chooses the prior"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Laplace(**options)


# The predictives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [None, True, False])
def test_draws_are_those_of_the_linear_model_or_of_the_network(choice):
    posterior = pyrolora.fit(
        classifier("map"), data(), guide=Laplace(prior_scale=0.5, linearised=choice)
    )
    joint, x = posterior.model, data(5)[0]
    factors = draw_factors(joint, 6, seed=3)
    with torch.no_grad():
        sampled = joint.network({"inputs": x}, factors)
        linear = linearised(joint, {"inputs": x}, joint.program.mean(), factors, rows=100)
    assert (sampled - linear).abs().max() > 0.1
    expected = sampled if choice is False else linear
    found = posterior.predict(x, num_samples=6, seed=3).draws
    torch.testing.assert_close(found, expected.softmax(-1).to(found.dtype))


def test_a_language_model_has_sampled_predictions_only(steps):
    options = {"tokenizer": tokenizer(), "adapter": AdapterConfig(r=1), "epochs": 1}
    texts = reviews(6).remove_columns("label")
    with pytest.raises(
        ConfigError, match="linearised=True has no predictive for 'text-generation'"
    ):
        pyrolora.fit(llama(), texts, guide=Laplace(linearised=True), **options)
    assert steps == []
    posterior = pyrolora.fit(llama(), texts, guide=Laplace(prior_scale=0.1), **options)
    texts = texts.select(range(4))
    found = posterior.log_likelihood(texts, num_samples=3, seed=0)
    factors = draw_factors(posterior.model, 3, seed=0)
    batch = posterior.predictor.prepare(texts, need_labels=True)
    rows = batch.collate([batch.examples[i] for i in range(4)])
    with torch.no_grad():
        output = posterior.model.network(rows, factors)
        expected = posterior.task.log_prob(output, rows)
    torch.testing.assert_close(found, expected.to(found.dtype))


# What does not count -----------------------------------------------------------------------------


def padded(rows: Any, width: int) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        extra = [0] * (width - len(row["input_ids"]))
        mask = [1] * len(row["input_ids"]) + extra
        found.append(
            {"input_ids": row["input_ids"] + extra, "attention_mask": mask, "labels": row["labels"]}
        )
    return found


def test_neither_padding_nor_the_size_of_batches_changes_the_posterior():
    rows = [
        {"input_ids": row["input_ids"][: 3 + i % 5], "labels": row["labels"]}
        for i, row in enumerate(tokens(10))
    ]
    network = bert(initializer_range=0.3)
    start = pyrolora.fit(
        network, padded(rows, 8), guide="map", adapter=AdapterConfig(r=2), epochs=3,
        learning_rate=0.05,
    )  # fmt: skip
    guide = Laplace(prior_scale=0.5)
    first = pyrolora.fit(start, padded(rows, 8), guide=guide, batch_size=10)
    for width, size in ((8, 3), (15, 10)):
        other = pyrolora.fit(start, padded(rows, width), guide=guide, batch_size=size)
        for law, law_ in zip(laws(first), laws(other), strict=True):
            torch.testing.assert_close(law_.variance, law.variance, rtol=1e-3, atol=1e-7)
            torch.testing.assert_close(law_.scale, law.scale, rtol=1e-3, atol=1e-7)
            assert law.scale.min() < 0.9 * law.scale.max()  # the data say something


def laws(posterior: Posterior) -> list[Any]:
    return [posterior.model.program.law(factor) for factor in "AB"]


# laplace-torch -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_a_post_hoc_fit_predicts_with_the_covariance_of_laplace_torch():
    """An adapter on weights that are 0, with s = 1, is a network of plain linear layers A and B.
    What draws of the probabilities tell is the covariance of f_c − f_0 of each example."""
    import laplace

    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    config = AdapterConfig(r=2, lora_alpha=2.0, target_modules="all-linear")
    x = torch.randn(30, 4)
    y = torch.arange(30) % 3
    attachment = attach(network, config)
    law = task_for(network, "classification")
    joint = build(network, attachment, config, MAP(), law, len(y))
    bank = joint.program.bank
    bank.assign("B_loc", 0.7 * torch.randn_like(bank.get_parameter("B_loc")))
    posterior = pyrolora.fit(Posterior(joint, MAP()), (x, y), guide=Laplace(prior_scale=0.8))

    plain = []
    for name in ("0", "2"):
        for weight in posterior.factors()[name]:
            plain.append(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
            plain[-1].weight.data.copy_(weight)
    peer = laplace.Laplace(
        nn.Sequential(*plain[:2], nn.Tanh(), *plain[2:]),
        "classification",
        subset_of_weights="all",
        hessian_structure="kron",
        prior_precision=0.8**-2,
    )
    peer.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=30))
    test = torch.randn(4, 4)
    jacobian, output = peer.backend.jacobians(test)
    contrast = torch.tensor([[-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0]])
    covariance = contrast @ peer.functional_variance(jacobian).detach() @ contrast.T

    n = 20_000
    logs = posterior.predict(test, num_samples=n, seed=0).draws.double().log()
    found = (logs - output.detach().double().log_softmax(-1)) @ contrast.T.double()
    empirical = torch.einsum("sbi,sbj->bij", found, found) / n
    sd = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    tolerance = 5 * math.sqrt(2 / n) * sd[:, :, None] * sd[:, None, :]
    assert ((empirical - covariance).abs() <= tolerance).all()
