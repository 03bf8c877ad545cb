"""NUTS: its chains, what it refuses, what it leaves alone. Its law is tested on a linear layer."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import arviz as az
import pytest
import torch
from linear import layer
from problems import mlp
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor, nn
from transformers import TrainerCallback

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.errors import ConfigError
from pyrolora.guides import MAP, NUTS, Ensemble, Flat, Laplace, MeanField, MonteCLoRA
from pyrolora.inference import mcmc
from pyrolora.inference.widths import chosen_width, program_of
from pyrolora.posterior import Posterior
from pyrolora.seeding import seeded
from pyrolora.storage.description import digest_of

MEANFIELD = MeanField(kl_weight=1.0)
MONTEC = MonteCLoRA(component_prior="hierarchical", kl_weight=1.0, num_components=2)
SHORT: dict[str, Any] = {"num_samples": 8, "warmup_steps": 5, "max_tree_depth": 2}
DISAGREE = pytest.mark.filterwarnings("ignore:the chains of NUTS do not agree:RuntimeWarning")


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] > 0).long()


def fitted(guide: Any, network: nn.Module | None = None, **config: Any) -> Posterior:
    """A small classifier's posterior."""
    return pyrolora.fit(
        mlp(outputs=2) if network is None else network,
        data(),
        guide=guide,
        task="classification",
        adapter=AdapterConfig(r=1, **config),
        epochs=2,
        learning_rate=0.05,
    )


def stored(posterior: Posterior) -> dict[str, Tensor]:
    program = posterior.model.program
    return program.pick(torch.arange(program.stored()))


# Chains ------------------------------------------------------------------------------------------


@DISAGREE
@pytest.mark.parametrize(
    ("inner", "variables"),
    [
        (MEANFIELD, ["adapter_norm", "factor_norm"]),
        (MONTEC, ["adapter_norm", "covariance_eigenvalues", "mixture_weights"]),
    ],
    ids=["meanfield", "montec"],
)
def test_chains_are_chains_in_arviz(inner, variables):
    posterior = pyrolora.fit(fitted("map"), data(), guide=NUTS(inner=inner, **SHORT))
    idata = posterior.to_arviz()
    sizes = idata["posterior"].sizes
    assert (sizes["chain"], sizes["draw"]) == (2, 8)
    summary = az.summary(idata, var_names=variables, round_to="none")
    assert torch.isfinite(torch.tensor(summary[["r_hat", "ess_bulk"]].values.copy())).all()

    program = posterior.model.program
    norms = program.bank.update_norms(program.factors(stored(posterior))).detach()
    found = torch.tensor(idata["posterior"]["adapter_norm"].values)
    torch.testing.assert_close(found.flatten(0, 1), norms)
    assert len(norms.unique(dim=0)) > 8  # chains differ, and move
    fewer = torch.tensor(posterior.to_arviz(4)["posterior"]["adapter_norm"].values)
    torch.testing.assert_close(fewer, found[:, ::4])
    with pytest.raises(ConfigError, match="multiple of the 2 chains, got 7"):
        posterior.to_arviz(7)


def test_history_has_the_worst_layer_and_chains_that_disagree_are_warned_of():
    """R-hat of independent draws is near 1, and their effective sample size their number; not
    when one chain's draws are twice as large."""
    options = NUTS(inner=MEANFIELD, chains=2, num_samples=300)
    program = layer(options).joint.program
    mean = program.bank.get_parameter("A_loc").detach()
    draws = mean + 0.1 * torch.randn(2, 300, len(mean))
    smooth = torch.zeros(2, 300)
    program.store({"A": draws}, smooth)
    numbers = program.diagnostics()
    assert numbers["r_hat"] == pytest.approx(1, abs=0.02)
    assert numbers["effective_sample_size"] == pytest.approx(600, rel=0.4)
    program.store({"A": draws * torch.tensor([1.0, 2.0])[:, None, None]}, smooth)
    with pytest.warns(RuntimeWarning, match=r"do not agree: R-hat .* more warmup_steps"):
        assert program.diagnostics()["r_hat"] > 2


@DISAGREE
def test_the_history_has_the_diagnostics_and_the_log_of_the_point_estimate():
    history = fitted(NUTS(inner=MEANFIELD, **SHORT)).history
    assert history[-1].keys() == {"r_hat", "effective_sample_size", "divergences", "kl_weight"}
    assert any("loss" in entry for entry in history[:-1])


@DISAGREE
def test_means_and_head_are_those_of_plain_lora_and_a_seed_repeats_the_chains():
    plain = fitted("map", modules_to_save=["2"], target_modules=["0"])
    again, found = (
        fitted(NUTS(inner=MEANFIELD, **SHORT), modules_to_save=["2"], target_modules=["0"])
        for _ in range(2)
    )
    for name, tensor in plain.model.own_state().items():
        own = name.replace("program.", "program.inner.")
        assert torch.equal(found.model.own_state()[own], tensor), name
    assert torch.equal(stored(found)["A"], stored(again)["A"])


def test_the_mean_adapter_is_that_of_the_draws():
    """For A alone it is the mean of A; for both factors that of the update B A."""
    for latent in ("A", "AB"):
        options = NUTS(inner=MeanField(kl_weight=1.0, latent=latent), chains=1, num_samples=5)
        problem = layer(options)
        program = problem.joint.program
        draws = {name: torch.randn(1, 5, *t.shape[1:]) for name, t in buffers(program)}
        program.store(draws, torch.zeros(1, 5))
        drawn = program.bank.matrices(program.factors(program.pick(torch.arange(5))))["0"]
        A, B = program.bank.matrices(program.mean())["0"]
        torch.testing.assert_close(B @ A, (drawn[1] @ drawn[0]).mean(0))
        assert A.shape[0] == (2 if latent == "A" else min(A.shape[1], len(B), 10))  # ranks


def buffers(program) -> list[tuple[str, Tensor]]:
    return [(name, program.get_buffer(name)) for name in program.sites]


@DISAGREE
def test_draws_are_saved_and_loaded(tmp_path):
    posterior = pyrolora.fit(fitted("map"), data(), guide=NUTS(inner=MONTEC, **SHORT))
    posterior.save(tmp_path)
    loaded = pyrolora.load(tmp_path, mlp(outputs=2))
    assert loaded.options == posterior.options
    draws = stored(posterior)
    assert draws.keys() == {"mixture_weights", "covariance_tril", "noise"}
    for name, values in stored(loaded).items():
        assert torch.equal(values, draws[name])
    evenly = loaded.sample(4)
    assert all(torch.equal(evenly[name], draws[name][::4]) for name in draws)
    x, _ = data()
    torch.testing.assert_close(
        loaded.predict(x, num_samples=16).draws, posterior.predict(x, num_samples=16).draws
    )


# Options of the inner guide ----------------------------------------------------------------------


@DISAGREE
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (MeanField, {"init_scale": 0.1, "draws_per_batch": 2, "kl_warmup": 0.5}),
        (MeanField, {"scale_learning_rate": 0.5, "scale_updates": "gradient", "hold_back": 0}),
        (MonteCLoRA, {"covariance": "full", "init_covariance": 0.5}),
        (MonteCLoRA, {"learn_sample_scale": True}),
    ],
    ids=str,
)
def test_options_of_the_inner_guide_alone_make_no_difference(kind, options):
    plain, changed = (fitted(NUTS(inner=kind(**o), **SHORT)) for o in ({}, options))
    for name, values in stored(plain).items():
        assert torch.equal(stored(changed)[name], values), name


@DISAGREE
def test_a_folder_of_other_defaults_and_fewer_options_loads(tmp_path):
    inner = MeanField(prior_scale=0.2, prior_mean="zero", units="one", init_scale=0.02, hold_back=0)
    posterior = fitted(NUTS(inner=inner, **SHORT))
    posterior.save(tmp_path)
    file = tmp_path / "posterior.json"
    saved = json.loads(file.read_text())
    del saved["guide"]["options"]["inner"]["hold_back"]
    saved["digest"] = digest_of(saved)
    file.write_text(json.dumps(saved))
    loaded = pyrolora.load(tmp_path, mlp(outputs=2))
    assert loaded.options == posterior.options
    assert torch.equal(stored(loaded)["A"], stored(posterior)["A"])


# The prior of a fit ------------------------------------------------------------------------------


def prior_draws(posterior: Posterior) -> tuple[Tensor, Tensor]:
    program = posterior.model.program
    with seeded(0):
        trace = program.traced(64, program.model)
    factors = trace.nodes["_RETURN"]["value"]
    return factors.A, factors.B


@DISAGREE
@pytest.mark.parametrize(
    ("guide", "flat"),
    [(MonteCLoRA(), False), (MonteCLoRA(latent="AB"), True), (MeanField(), False)],
    ids=["montec", "flat+montec", "meanfield"],
)
def test_the_prior_is_that_of_the_fit_whose_width_data_chose(guide, flat, tmp_path):
    fit = replace(guide, hold_back=0.25)
    given = fitted(Flat(inner=fit) if flat else fit)
    program_of(given.model).width[0] = math.log(7.0)
    given.temperature = 1.0
    posterior = pyrolora.fit(given, data(), NUTS(inner=guide, **SHORT))
    for found, expected in zip(prior_draws(posterior), prior_draws(given), strict=True):
        torch.testing.assert_close(found, expected)
    assert chosen_width(posterior.model) == pytest.approx(7.0)
    posterior.save(tmp_path)
    loaded = pyrolora.load(tmp_path, mlp(outputs=2))
    torch.testing.assert_close(prior_draws(loaded), prior_draws(posterior))

    unit = pyrolora.fit(given, data(), NUTS(inner=replace(guide, hold_back=0), **SHORT))
    narrow, wide = prior_draws(unit)[0], prior_draws(given)[0]
    mean = given.bank.means().A
    torch.testing.assert_close(7 * (narrow - mean), wide - mean, rtol=1e-4, atol=1e-5)
    again = pyrolora.fit(given, data(), guide)  # which adds a spread of its own
    assert chosen_width(again.model) == 1


@DISAGREE
def test_a_prior_that_is_not_the_earlier_posterior_is_warned_of():
    first = fitted(MeanField())
    second = pyrolora.fit(first.base, data(), prior=first, epochs=2)
    with pytest.warns(UserWarning, match="not under that earlier posterior") as caught:
        pyrolora.fit(second, data(), NUTS(inner=MeanField(), **SHORT))
    assert __file__ in {one.filename for one in caught}


# What it refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inner",
    [MAP(), Flat(), Laplace(prior_scale=0.1), Ensemble(), NUTS(), "meanfield", None],
    ids=lambda inner: getattr(inner, "name", str(inner)),
)
def test_the_inner_guide_needs_a_prior_with_width(inner):
    with pytest.raises(ConfigError, match=r"inner must be a guide whose model has a prior"):
        NUTS(inner=inner)


def test_a_factor_that_is_a_point_mass_in_the_model_is_refused():
    """Its chains would stand still: any other value has density zero."""
    with pytest.raises(ConfigError, match=r"point mass.*MeanField\(latent='A'\)"):
        NUTS(inner=MAP(prior_scale=0.5, latent="A"))
    NUTS(inner=MAP(prior_scale=0.5))


def test_examples_are_not_held_back_inside():
    with pytest.raises(ConfigError, match=r"^hold_back=0\.2 of the inner 'montec' .* leave it out"):
        NUTS(inner=MonteCLoRA(hold_back=0.2))
    NUTS(inner=MonteCLoRA(hold_back=0))


@pytest.mark.parametrize(
    "option",
    [
        {"chains": 0},
        {"num_samples": 3},
        {"warmup_steps": 0.5},
        {"max_tree_depth": 0},
        {"target_accept_prob": 1.0},
    ],
    ids=str,
)
def test_numbers_outside_their_range_are_refused(option):
    (name,) = option
    with pytest.raises(ConfigError, match=name):
        NUTS(**option)


@pytest.mark.parametrize(
    "option",
    [
        {"epochs": 3},
        {"learning_rate": 0.1},
        {"callbacks": [TrainerCallback()]},
    ],
    ids=lambda option: next(iter(option)),
)
def test_training_options_are_refused_where_nothing_is_trained(option, steps):
    given = fitted("map")
    begun = len(steps)
    with pytest.raises(ConfigError, match=rf"trains nothing .* leave {next(iter(option))} out"):
        pyrolora.fit(given, data(), guide=NUTS(inner=MEANFIELD, **SHORT), **option)
    assert len(steps) == begun


# What it aims at ---------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.25, 4.0])
def test_the_target_of_the_chains_is_the_prior_times_the_likelihood_to_one_over_beta(
    beta, monkeypatch
):
    """p(A) p(y|A)^(1/β) at a draw of the prior, by the formulas of both normals."""
    targets = []

    class Seen(Exception):
        pass

    def seen(self: Any) -> None:
        targets.append(poutine.trace(self.kernel.model).get_trace())
        raise Seen

    monkeypatch.setattr(mcmc.MCMC, "run", seen)
    problem = layer(MAP())
    inner = MeanField(kl_weight=beta, prior_scale=0.8, units="one", prior_mean="zero")
    with pytest.raises(Seen):
        problem.fit(NUTS(inner=inner))
    (trace,) = targets
    A = trace.nodes["A"]["value"].double()
    H, h = problem.quadratic("A")
    at_zero = problem.log_likelihood("A", torch.zeros_like(A), torch.zeros_like(H))
    likelihood = at_zero + h @ A - 0.5 * A @ H @ A
    prior = torch.distributions.Normal(0.0, 0.8).log_prob(A).sum()
    assert trace.log_prob_sum().item() == pytest.approx(
        (prior + likelihood / beta).item(), rel=1e-4
    )


# What it leaves alone ----------------------------------------------------------------------------


class Watched(nn.Dropout):
    """Dropout that notes whether it was on."""

    def __init__(self) -> None:
        super().__init__(0.5)
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.training)
        return super().forward(x)


def network_with_dropout() -> tuple[nn.Sequential, Watched]:
    torch.manual_seed(0)
    dropout = Watched()
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), dropout, nn.Linear(4, 2))
    network[0].bias.requires_grad_(False)
    return network, dropout


@DISAGREE
def test_dropout_is_off_and_the_given_posterior_and_its_network_stay_as_they_are():
    torch.manual_seed(0)
    dropout = Watched()
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), dropout, nn.Linear(4, 2))
    network[0].bias.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    weights = {name: t.clone() for name, t in network.state_dict().items()}
    given = fitted("map", network, lora_dropout=0.5)
    assert any(dropout.seen)
    before = {name: (p.requires_grad, p.clone()) for name, p in given.model.named_parameters()}
    network.train()
    dropout.seen.clear()
    posterior = pyrolora.fit(given, data(), guide=NUTS(inner=MEANFIELD, **SHORT))
    assert len(dropout.seen) > 16
    assert not any(dropout.seen)
    assert not network.training
    for name, parameter in given.model.named_parameters():
        flag, value = before[name]
        assert parameter.requires_grad == flag, name
        assert torch.equal(parameter, value), name
        assert parameter.grad is None
    found, means = posterior.bank.means(), given.bank.means()
    assert torch.equal(found.A, means.A)
    assert torch.equal(found.B, means.B)
    posterior.detach()
    given.detach()
    assert {name: p.requires_grad for name, p in network.named_parameters()} == flags
    assert all(torch.equal(weights[name], t) for name, t in network.state_dict().items())


@pytest.mark.parametrize("fails", [False, True])
def test_parameters_are_constants_while_sampling_alone(fails, monkeypatch):
    problem = layer(MEANFIELD)
    problem.joint.program.bank.get_parameter("B_loc").requires_grad_(False)
    problem.joint.train()
    flags = [parameter.requires_grad for parameter in problem.joint.parameters()]
    assert len(set(flags)) == 2
    run = mcmc.MCMC.run

    def watched(self: Any) -> None:
        assert not any(parameter.requires_grad for parameter in problem.joint.parameters())
        assert not problem.joint.training
        if fails:
            raise ZeroDivisionError
        run(self)

    monkeypatch.setattr(mcmc.MCMC, "run", watched)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        draws, _ = mcmc.nuts(problem.joint, problem.batch, chains=1, num_samples=4, warmup_steps=1)
        assert draws["A"].shape == (1, 4, 6)
        assert not draws["A"].requires_grad
    assert [parameter.requires_grad for parameter in problem.joint.parameters()] == flags
    assert problem.joint.training


@DISAGREE
def test_stored_draws_come_one_at_a_time_and_not_in_a_plate():
    posterior = fitted(NUTS(inner=MEANFIELD, **SHORT))
    batch = {"inputs": data()[0][:3]}
    draws = Predictive(posterior.model, guide=posterior.guide, num_samples=12)(batch)
    kept = stored(posterior)["A"]
    for drawn in draws["A"].flatten(1):
        assert (kept == drawn).all(-1).any()
    assert len(draws["A"].flatten(1).unique(dim=0)) > 1
    together = Predictive(posterior.model, guide=posterior.guide, num_samples=4, parallel=True)
    with pytest.raises(ConfigError, match=r"one at a time.*posterior\.sample"):
        together(batch)


@DISAGREE
def test_arviz_gets_the_steps_that_diverged():
    posterior = fitted(NUTS(inner=MEANFIELD, chains=2, **SHORT))
    program = posterior.model.program
    program.diverging[9] = 1
    diverging = posterior.to_arviz()["sample_stats"]["diverging"].values
    assert diverging.dtype == bool
    assert diverging.shape == (2, 8)
    expected = program.diverging.bool().view(2, 8).numpy()
    assert (diverging == expected).all()
    assert diverging[1, 1]
