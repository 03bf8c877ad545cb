"""k̂ against known tail indices and closed-form posteriors; its refusals; its verdict."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import absolute, bert, bert_choice, llama, mlp, questions, texts, tokenizer, tokens
from torch import nn
from torch.distributions import Normal

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.diagnostics import PSIS
from pyrolora.diagnostics.importance import (
    _centre,
    _latent,
    _masks,
    _prior_over_guide,
)
from pyrolora.diagnostics.psis import psis_khat, yardstick
from pyrolora.errors import ConfigError, DataError
from pyrolora.guides import MAP, NUTS, Ensemble, Flat, Laplace, MeanField, MonteCLoRA
from pyrolora.model import evaluating

DRAWS = 200
PRIOR_SCALE = 0.8


# Weights -----------------------------------------------------------------------------------------


def narrow(ratio: float, dimensions: int, count: int) -> np.ndarray:
    """log w of draws of N(0, ratio² I) for the target N(0, I)."""
    x = ratio * np.random.default_rng(1).normal(size=(count, dimensions))
    log_target = -0.5 * np.square(x).sum(-1)
    return log_target + 0.5 * np.square(x / ratio).sum(-1) + dimensions * math.log(ratio)


@pytest.mark.parametrize("variance", [0.3, 0.5, 0.8])
def test_the_tail_index_of_a_narrow_gaussian_is_known(variance):
    """w = s exp(½ (1 − s²) z²) for z ~ N(0, 1), so that P(w > t) falls as t^{−1/(1 − s²)}, up to a
    root of log t."""
    found = psis_khat(narrow(math.sqrt(variance), 1, 400_000))
    assert found == pytest.approx(1 - variance, abs=0.08)


def test_a_wide_gaussian_has_bounded_weights():
    assert psis_khat(narrow(1.2, 1, 10_000)) < 0


def test_equal_weights_have_no_tail():
    assert psis_khat(np.full(100, 3.0)) == -math.inf
    assert psis_khat(3 + 1e-5 * np.random.default_rng(0).normal(size=100)) == -math.inf


def test_a_gaussian_ten_percent_too_narrow_fails_in_many_dimensions():
    assert yardstick(10, DRAWS) == pytest.approx(0.35, abs=0.1)
    assert yardstick(10_000, DRAWS) == pytest.approx(4.9, abs=0.6)
    drawn = psis_khat(narrow(0.9, 10_000, DRAWS))  # entry by entry, not by its χ² law
    assert drawn == pytest.approx(yardstick(10_000, DRAWS), abs=1.2)


# A linear layer with one output, whose posterior of A is a Gaussian ------------------------------


def design(n: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs with XᵀX = n I, for which the entries of A are independent, and targets."""
    orthogonal = torch.linalg.qr(torch.randn(n, 3)).Q * n**0.5
    return orthogonal, orthogonal @ torch.tensor([1.0, -0.5, 0.2]) + 0.3 * torch.randn(n)


def linear(guide, data):
    """A posterior of `guide` on y = (W + s B A) x + σ e, B = 0.4 and σ as fitted."""
    torch.manual_seed(0)
    posterior = pyrolora.fit(
        nn.Sequential(nn.Linear(3, 1, bias=False)), data, guide=guide, task="regression",
        adapter=AdapterConfig(r=1, lora_alpha=2.0), epochs=1, seed=0,
    )  # fmt: skip
    posterior.bank.assign("B_loc", torch.tensor([0.4]))
    return posterior


def exact(posterior, data, beta) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of each entry of A under ∝ p(A) p(y|A)^{1/β}."""
    X, y = (t.double() for t in data)
    slope = 2.0 * 0.4  # s B
    noise = posterior.task.param("noise_scale").item() ** 2 * beta
    residual = y - X @ posterior.base[0].weight.detach().double().flatten()
    precision = 1 / PRIOR_SCALE**2 + slope**2 * X.square().sum(0) / noise
    return slope * (X.T @ residual) / noise / precision, 1 / precision


def at(posterior, mean, scale) -> None:
    posterior.bank.assign("A_loc", mean.float())
    posterior.model.program.assign("A_scale", scale.float())


def from_weights(posterior, target, guide) -> float:
    """k̂ of the weights of the draws of seed 3, between Gaussians of known means and variances."""
    A = posterior.sample(DRAWS, seed=3)["A"].double()
    logs = [Normal(mean, variance.sqrt()).log_prob(A).sum(-1) for mean, variance in (target, guide)]
    return psis_khat((logs[0] - logs[1]).numpy())


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("ratio", [1.0, 0.6, 1.3])
def test_khat_is_that_of_the_exact_weights(beta, ratio):
    data = design()
    posterior = linear(absolute(MeanField, prior_scale=PRIOR_SCALE, kl_weight=beta), data)
    mean, variance = exact(posterior, data, beta)
    at(posterior, mean, ratio * variance.sqrt())
    found = posterior.khat(data, DRAWS, seed=3)
    assert (found.num_samples, found.dimensions) == (DRAWS, 3)
    if ratio == 1:  # the guide is the posterior, and its weights are equal
        assert found.khat == -math.inf
        assert "good" in found.verdict
    else:
        expected = from_weights(posterior, (mean, variance), (mean, ratio**2 * variance))
        assert found.khat == pytest.approx(expected, abs=0.01)


def test_the_target_is_that_of_the_fits_own_weight_of_the_kl():
    """1/β scales the likelihood: what is the optimum for β = 0.3 is none for β = 1."""
    data = design()
    posterior = linear(absolute(MeanField, prior_scale=PRIOR_SCALE, kl_weight=0.3), data)
    guide, target = exact(posterior, data, 0.3), exact(posterior, data, 1.0)
    at(posterior, guide[0], guide[1].sqrt())
    cold = posterior.khat(data, DRAWS, seed=3).khat
    posterior.options = replace(posterior.options, kl_weight=1.0)
    found = posterior.khat(data, DRAWS, seed=3).khat
    assert found == pytest.approx(from_weights(posterior, target, guide), abs=0.01)
    assert found > 0.2
    assert cold == -math.inf


@pytest.mark.parametrize("linearised", [True, False])
def test_laplace_is_exact_on_a_linear_layer(linearised):
    """Its curvature is that of the posterior there; the mean is set to the posterior's."""
    data = design()
    guide = Laplace(prior_scale=PRIOR_SCALE, latent="A", linearised=linearised)
    posterior = pyrolora.fit(linear(MAP(), data), data, guide=guide)
    mean, variance = exact(posterior, data, 1.0)
    posterior.bank.assign("A_loc", mean.float())
    assert posterior.khat(data, DRAWS, seed=3).khat == -math.inf
    curvature = 1 / variance - PRIOR_SCALE**-2
    posterior.model.program.get_buffer("values_A_0").mul_(3)
    narrower = (mean, 1 / (3 * curvature + PRIOR_SCALE**-2))
    expected = from_weights(posterior, (mean, variance), narrower)
    assert posterior.khat(data, DRAWS, seed=3).khat == pytest.approx(expected, abs=0.02)


def test_the_seed_of_flat_cancels():
    data = design()
    inner = absolute(MeanField, prior_scale=PRIOR_SCALE, kl_weight=1.0)
    plain, flat = linear(inner, data), linear(Flat(inner=inner), data)
    mean, variance = exact(plain, data, 1.0)
    at(plain, mean, 0.7 * variance.sqrt())
    flat.bank.assign("A_loc", mean.float())
    flat.model.program.inner.assign("A_scale", (0.7 * variance.sqrt()).float())
    flat.task.load_state_dict(plain.task.state_dict())
    flat.base.load_state_dict(plain.base.state_dict())
    expected = plain.khat(data, DRAWS, seed=5)
    found = flat.khat(data, DRAWS, seed=5)
    assert found.khat == pytest.approx(expected.khat, abs=0.01)
    assert found.dimensions == expected.dimensions + 1


# Layers ------------------------------------------------------------------------------------------


def test_a_layers_khat_is_that_of_its_conditional():
    """y = (W₁ + s B₁ A₁)(W₀ + s B₀ A₀) x + b + σ e, with one A drawn and the other at its mean."""
    generator = torch.Generator().manual_seed(0)
    data = (torch.randn(12, 3, generator=generator), torch.randn(12, generator=generator))
    network = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 1, bias=False))
    posterior = pyrolora.fit(
        network, data, guide=absolute(MeanField, kl_weight=0.5), task="regression",
        adapter=AdapterConfig(r=1, lora_alpha=1.0), epochs=2, learning_rate=0.05, seed=0,
    )  # fmt: skip
    posterior.bank.assign("B_loc", torch.randn(5, generator=generator))
    posterior.model.program.assign("A_scale", torch.full((7,), 0.3))
    found = posterior.khat(data, DRAWS, seed=2, per_layer=True)
    assert list(found) == ["0", "1"]
    assert [each.dimensions for each in found.values()] == [3, 4]
    means, draws = posterior.factors(), posterior.factors(posterior.sample(DRAWS, seed=2))
    noise = Normal(0.0, posterior.task.param("noise_scale").detach())
    for layer, psis in found.items():
        A = {name: draws[name][0] if name == layer else means[name][0] for name in means}
        W = [network[int(n)].weight + means[n][1] @ A[n] for n in ("0", "1")]
        errors = data[1] - (W[1] @ W[0] @ data[0].T).squeeze(-2)
        drawn, mean = A[layer].flatten(1), means[layer][0].flatten()
        prior = Normal(0.0, posterior.options.prior_scale).log_prob(drawn).sum(-1)
        guide = Normal(mean, 0.3).log_prob(drawn).sum(-1)
        weights = prior + noise.log_prob(errors).sum(-1) / 0.5 - guide
        assert psis.khat == pytest.approx(psis_khat(weights.detach().numpy()), abs=0.02)


WIDE = {
    "isotropic": MonteCLoRA(),
    "hierarchical, both factors": MonteCLoRA(
        component_prior="hierarchical", covariance="full", latent="AB", learn_sample_scale=True,
        cooperation=0.5,
    ),
    "mean field, both factors": absolute(MeanField, latent="AB"),
    "mean field in rows": MeanField(latent="AB", init_scale=0.5, scale_updates="gradient"),
    "laplace": Laplace(),
    "flat": Flat(inner=MonteCLoRA(latent="B", sparse=True), at_prediction=True),
}  # fmt: skip


@pytest.mark.parametrize("name", WIDE)
def test_layers_have_the_parts_of_the_whole_density(name):
    """Layers are independent in model and guide: what the layers' densities change by from one
    draw to another adds up to what that of all changes by; and only the layer's factors move."""
    posterior = pyrolora.fit(
        bert(initializer_range=0.3), tokens(), guide=WIDE[name], epochs=2, learning_rate=0.02,
        adapter=AdapterConfig(r=2, rank_pattern={"key": 1}), seed=0,
    )  # fmt: skip
    program = posterior.model.program
    with torch.no_grad(), evaluating(posterior.model):
        sites = _latent(program.traced(5))
        drawn = {name: site["value"] for name, site in sites.items()}
        whole, factors = _prior_over_guide(program, drawn)
        total = torch.zeros_like(whole)
        everything = posterior.bank.matrices(factors)
        means = posterior.factors()
        for layer, own in _masks(program, sites).items():
            values = {n: torch.where(own[n], drawn[n], _centre(sites[n])) for n in sites}
            part, moved = _prior_over_guide(program, values)
            total += part - part[0]
            for other, matrices in posterior.bank.matrices(moved).items():
                expected = everything[other] if other == layer else means[other]
                for matrix, known in zip(matrices, expected, strict=True):
                    torch.testing.assert_close(matrix, known.expand_as(matrix), atol=1e-5, rtol=0)
    torch.testing.assert_close(total, whole - whole[0], atol=0.05, rtol=1e-3)
    assert total.abs().max() > 1


def test_one_layer_is_the_whole():
    data = (torch.randn(9, 4), torch.arange(9) % 3)
    posterior = pyrolora.fit(
        mlp(), data, guide=MonteCLoRA(latent="AB"), task="classification", epochs=1,
        adapter=AdapterConfig(r=2, target_modules=["0"]),
    )  # fmt: skip
    whole = posterior.khat(data, 50, seed=0)
    assert posterior.khat(data, 50, seed=0, per_layer=True) == {"0": whole}
    # A and B, 2 x 4 and 2 x 16; and of each block 3 weights and a lower factor of 2 x 2.
    assert whole.dimensions == 8 + 32 + 2 * (3 + 3)


# Every likelihood --------------------------------------------------------------------------------


def test_texts_and_choices_have_one_too():
    for network, data in ((llama(), texts(6)), (bert_choice(), questions(6))):
        posterior = pyrolora.fit(
            network, data, tokenizer=tokenizer(), adapter=AdapterConfig(r=1), epochs=1, seed=0
        )
        found = posterior.khat(data, 25, seed=0)
        assert math.isfinite(found.khat)
        assert found == posterior.khat(data, 25, seed=0)
        assert found != posterior.khat(data, 25, seed=1)


# Refusals ----------------------------------------------------------------------------------------


def quick(guide):
    data = (torch.randn(8, 4), torch.arange(8) % 3)
    posterior = pyrolora.fit(
        mlp(), data, guide=guide, task="classification", adapter=AdapterConfig(r=1), epochs=1
    )
    return posterior, data


@pytest.mark.filterwarnings("ignore:the chains of NUTS do not agree")
@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (MAP(), "'map' is a point"),
        (MAP(prior_scale=0.5), "'map' is a point"),
        (Flat(), r"'flat\+map' is a point"),
        (Ensemble(members=2), "members of 'ensemble' are point masses"),
        (
            NUTS(chains=1, num_samples=4, warmup_steps=1, max_tree_depth=1),
            r"'nuts\+meanfield' keeps draws, which have none.*R-hat",
        ),
        (Laplace(curvature="full", num_draws=4), "'laplace' keeps draws, which have none"),
    ],
)
def test_a_guide_without_a_density_is_refused(guide, message):
    posterior, data = quick(guide)
    with pytest.raises(ConfigError, match=message):
        posterior.khat(data)


def test_other_data_than_the_training_data_are_refused():
    posterior, data = quick("meanfield")
    with pytest.raises(DataError, match=r"training data, 8 examples, got 5; pass the data"):
        posterior.khat(tuple(t[:5] for t in data))
    with pytest.raises(DataError, match="no labels"):
        posterior.khat(data[:1])


@pytest.mark.parametrize("count", [0, 24, 2.5])
def test_too_few_draws_for_a_tail_are_refused(count):
    posterior, data = quick("meanfield")
    with pytest.raises(ConfigError, match=f"num_samples must be a whole number >= 25, got {count}"):
        posterior.khat(data, count)


# The verdict -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("khat", "dimensions", "word"),
    [
        (-math.inf, 3, "good"),
        (0.5, 3, "good"),
        (0.6, 3, "poor"),
        (1.5, 2000, "undecided"),
        (4.0, 2000, "poor"),
        (math.inf, 2000, "poor"),
    ],
)
def test_the_verdict_knows_the_limit_and_the_dimension(khat, dimensions, word):
    psis = PSIS(khat, DRAWS, dimensions, yardstick(dimensions, DRAWS))
    assert psis.threshold == pytest.approx(1 - 1 / math.log10(DRAWS))
    assert psis.verdict.startswith(word)
    assert word in repr(psis)
    assert f"khat={khat:.2f}" in repr(psis)


def test_the_limit_stops_at_seven_tenths():
    assert PSIS(0.0, 10_000, 3, 0.2).threshold == 0.7
