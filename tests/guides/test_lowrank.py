"""The low-rank Gaussian: its site, its start, its draws."""

from __future__ import annotations

import pytest
import torch
from linear import layer
from problems import absolute, bert, reviews, tokenizer

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.errors import ConfigError
from pyrolora.guides import Flat, LowRank
from pyrolora.guides.wrapping import innermost
from pyrolora.inference import NamedELBO
from pyrolora.model import JointGuide


@pytest.mark.parametrize("latent", ["A", "B", "AB"])
def test_draws_have_the_covariance_of_the_docstring(latent):
    """S (I + F Fᵀ) S around the means, over both factors at once; the other factor is its mean."""
    problem = layer(absolute(LowRank, latent=latent, rank=2, init_scale=0.4))
    program = problem.joint.program
    program.assign("directions", torch.randn_like(program.get_parameter("directions")))
    draws = program.draw(40_000)
    assert set(draws) == {latent}
    means = program.bank.means()
    S, F = (program.param(name).detach().double() for name in ("scale", "directions"))
    covariance = S.diag() @ (torch.eye(len(S)).double() + F @ F.T) @ S.diag()
    sd = covariance.diagonal().sqrt()
    value = draws[latent].double()
    assert ((value.mean(0) - program.loc(latent).detach()).abs() / sd).max() < 5 / 40_000**0.5
    errors = (value.T.cov() - covariance) / torch.outer(sd, sd)
    assert errors.abs().max() < 6 * (2 / 40_000) ** 0.5
    factors = program.factors(draws)
    for factor in {"A", "B"} - set(latent):
        assert torch.equal(getattr(factors, factor), getattr(means, factor))


def test_the_bound_has_the_closed_form_of_the_docstring():
    problem = layer(absolute(LowRank, latent="AB", rank=3, prior_scale=0.8, init_scale=0.3))
    program, elbo = problem.joint.program, NamedELBO()
    program.assign("directions", torch.randn_like(program.get_parameter("directions")))
    elbo.differentiable_loss(problem.joint, JointGuide(program), problem.batch)
    S, F = (program.param(name).detach().double() for name in ("scale", "directions"))
    m = torch.cat([problem.mean("A"), problem.mean("B")])
    variances = S**2 * (1 + F.square().sum(-1))
    terms = (variances + m**2) / 0.8**2 - 1 + (0.8**2 / S**2).log()
    expected = 0.5 * terms.sum() - 0.5 * (torch.eye(3).double() + F.T @ F).logdet()
    assert elbo.terms["kl/AB"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_directions_start_small_and_are_learnt():
    network = bert(initializer_range=0.3)
    options = LowRank(rank=4)
    posterior = pyrolora.fit(
        network,
        reviews(24),
        guide=options,
        tokenizer=tokenizer(),
        adapter=AdapterConfig(r=2),
        epochs=4,
        batch_size=8,
        seed=0,
    )
    program = posterior.model.program
    directions = program.param("directions").detach()
    torch.manual_seed(0)
    start = options.build(program.bank).param("directions").detach()
    assert start.square().sum(-1).mean() == pytest.approx(0.01, rel=0.2)
    assert (directions.square().sum(-1).mean() - 0.01).abs() > 1e-4
    assert set(program.scale_parameters()) == {"scale", "directions"}


def test_a_layer_is_not_judged_alone():
    problem = layer(LowRank())
    posterior = problem.fit(LowRank())
    data = (problem.inputs, problem.labels)
    with pytest.raises(ConfigError, match="not independent"):
        posterior.khat(data, 25, per_layer=True)


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"rank": 2.5}, {"prior_scale": 0.0}, {"latent": "C"}], ids=str
)
def test_options_that_make_no_sense_are_refused(options):
    (name,) = options
    with pytest.raises(ConfigError, match=name):
        LowRank(**options)


@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("given", [False, True], ids=["anew", "around given means"])
def test_a_short_fit_has_the_widths_of_its_optimum(beta: float, given: bool) -> None:
    """They are σ_i² = 1 / (H_ii / β + 1 / σ₀²), to which small correlations add a few per cent."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 16, generator=generator)
    weight = torch.randn(16, generator=generator) / 4
    y = (x @ weight + 0.3 * torch.randn(200, generator=generator))[:, None]
    network = torch.nn.Sequential(torch.nn.Linear(16, 1))
    guide = Flat(inner=LowRank(kl_weight=beta, hold_back=0), rho=1e-6)
    options = {"task": "regression", "adapter": AdapterConfig(r=1, target_modules=["0"]), "seed": 0}
    if given:
        means = pyrolora.fit(network, (x, y), "map", epochs=20, learning_rate=0.02, **options)
        posterior = pyrolora.fit(means, (x, y), guide.inner, seed=0)
    else:
        posterior = pyrolora.fit(network, (x, y), guide, learning_rate=0.02, **options)
    program = innermost(posterior.model.program)
    slope = program.bank.specs["0"].scaling * program.bank.means().B.detach()
    noise = posterior.model.task.param("noise_scale").detach()
    H = (slope / noise).square() * x.square().sum(0)
    optimum = (H / beta + program.prior_scale("A").detach() ** -2).rsqrt()
    ratio = program.law("A").variance.detach().sqrt() / optimum
    assert 0.85 < ratio.median() < 1.2
    assert ((ratio / ratio.median() - 1).abs() < 0.3).float().mean() > 0.9


def test_adapted_embeddings_have_scales_that_are_trained_alone() -> None:
    """No curvature is made of their inputs."""
    network = torch.nn.Sequential(
        torch.nn.Embedding(5, 4), torch.nn.Flatten(), torch.nn.Linear(8, 2)
    )
    posterior = pyrolora.fit(
        network,
        (torch.randint(0, 5, (12, 2)), torch.randint(0, 2, (12,))),
        LowRank(),
        task="classification",
        adapter=AdapterConfig(r=2, target_modules=["0"]),
        epochs=1,
    )
    assert torch.isfinite(posterior.model.program.param("scale")).all()


@pytest.mark.parametrize(("n", "epochs"), [(250, 80), (1000, 40)])
def test_by_default_the_data_decide_the_widths(n: int, epochs: int) -> None:
    """They are those of a linear regression's posterior, from the prior's, which is far wider."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 16, generator=generator)
    weight = torch.randn(16, generator=generator) / 4
    y = (x @ weight + 0.3 * torch.randn(n, generator=generator))[:, None]
    network = torch.nn.Sequential(torch.nn.Linear(16, 1))
    posterior = pyrolora.fit(
        network, (x, y), LowRank(hold_back=0), task="regression", epochs=epochs, batch_size=32,
        adapter=AdapterConfig(r=1, target_modules=["0"]), learning_rate=0.02, seed=0,
    )  # fmt: skip
    spread = posterior.predict(torch.eye(16), 200, seed=0).epistemic
    exact = 0.3 / n**0.5
    assert 0.8 * exact < spread.median() < 1.35 * exact
