"""The joint model as a Pyro program, and what it leaves alone."""

from __future__ import annotations

import threading

import pyro
import pytest
import torch
from problems import batch_of, bert, gpt2, llama, mlp, tokens
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.adapters import attach, bind
from pyrolora.errors import BindingError, ConfigError
from pyrolora.guides import MAP, MonteCLoRA
from pyrolora.inference import NamedELBO
from pyrolora.model import JointGuide, build
from pyrolora.tasks import task_for

CONFIG = AdapterConfig(r=2)


def joint_of(network, guide=None, config=CONFIG, task=None, n=16):
    law = task_for(network, task)
    return build(network, attach(network, config), config, guide or MonteCLoRA(), law, n)


def gradients(joint, batch, autocast=False, thread=False, meanwhile=None):
    """Gradients of one −ELBO, with the backward pass in another thread if asked."""
    joint.zero_grad()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = NamedELBO().differentiable_loss(joint, JointGuide(joint.program), batch)

    def backward():
        loss.backward()

    if meanwhile is not None:
        with bind(meanwhile):
            backward()
    elif thread:
        worker = threading.Thread(target=backward)
        worker.start()
        worker.join()
    else:
        backward()
    return {n: p.grad.clone() for n, p in joint.named_parameters() if p.grad is not None}


# Pyro's own machinery ---------------------------------------------------------------------------


@pytest.mark.parametrize("guide", [MAP(), MonteCLoRA(scale_updates="gradient", hold_back=0)])
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_raw_svi_trains_means_scales_and_head(guide, elbo):
    posterior = pyrolora.fit(bert(initializer_range=0.3), tokens(), guide=guide, epochs=1)
    before = posterior.model.own_state()
    svi = SVI(posterior.model, posterior.guide, pyro.optim.Adam({"lr": 1e-2}), elbo())
    for _ in range(3):
        assert torch.isfinite(torch.tensor(svi.step(batch_of(tokens()))))
    after = posterior.model.own_state()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in posterior.base.parameters())


def test_raw_svi_lowers_the_loss_as_the_trainer_does():
    posterior = pyrolora.fit(bert(initializer_range=0.3), tokens(), guide="map", epochs=1)
    svi = SVI(
        posterior.model, posterior.guide, pyro.optim.Adam({"lr": 1e-2}), TraceMeanField_ELBO()
    )
    losses = [svi.step(batch_of(tokens())) for _ in range(40)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_samples_labels_and_latents(parallel):
    posterior = pyrolora.fit(bert(), tokens(), epochs=1)
    batch = batch_of(tokens())
    del batch["labels"]
    predictive = Predictive(
        posterior.model, guide=posterior.guide, num_samples=7, parallel=parallel
    )
    found = predictive(batch)
    assert found["y"].shape == (7, 16)
    assert set(found["y"].unique().tolist()) <= {0, 1}
    assert found["mixture_weights"].shape == (7, 6, 4)
    assert found["covariance_tril"].shape == (7, 6, 8, 8)


def test_parallel_predictive_agrees_with_our_prediction():
    """The frequencies of sampled labels are the predicted probabilities."""
    posterior = pyrolora.fit(bert(initializer_range=0.3), tokens(), epochs=2)
    batch = batch_of(tokens())
    labels = batch.pop("labels")
    n = 600
    sampled = Predictive(posterior.model, guide=posterior.guide, num_samples=n, parallel=True)
    frequency = sampled(batch)["y"].float().mean(0)
    assert len(labels) == len(frequency)
    ours = posterior.predict(tokens(), num_samples=n).probs[:, 1]
    assert (frequency - ours).abs().max() < 5 * (0.25 / n) ** 0.5 + 0.02


class Linear(nn.Module):
    """x W^T, one output."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, 1, bias=False)

    def forward(self, inputs):
        return self.layer(inputs).squeeze(-1)


def linear_gaussian(guide, inputs=3, n=20, noise=0.5):
    """A linear-Gaussian layer of rank 1: given B, y is linear in A."""
    torch.manual_seed(1)
    network = Linear(inputs)
    config = AdapterConfig(r=1, lora_alpha=2.0)
    joint = joint_of(network, guide, config, "regression", n)
    joint.task.assign("noise_scale", torch.tensor(noise))
    joint.program.bank.assign("A_loc", torch.randn(inputs))
    joint.program.bank.assign("B_loc", torch.tensor([0.8]))
    batch = {"inputs": torch.randn(n, inputs), "labels": torch.randn(n)}
    return joint, batch


def exact_posterior(joint, batch, prior_mean, prior_scale, noise=0.5):
    """y = x Wᵀ + s B x A + e, A ~ N(m, p² I): mean and covariance of A given B."""
    design = 2.0 * 0.8 * batch["inputs"]
    rest = batch["labels"] - batch["inputs"] @ joint.attachment.layers["layer"].weight[0]
    precision = design.T @ design / noise**2 + torch.eye(design.shape[1]) / prior_scale**2
    covariance = torch.linalg.inv(precision)
    mean = covariance @ (design.T @ rest / noise**2 + prior_mean / prior_scale**2)
    return mean.detach(), covariance.detach()


def nuts(model, batch, samples=350):
    kernel = NUTS(model)
    mcmc = MCMC(kernel, num_samples=samples, warmup_steps=100, disable_progbar=True)
    mcmc.run(batch)
    return mcmc.get_samples()


def check_moments(draws, mean, covariance):
    """Within Monte Carlo error; effective size taken as a third of the draws."""
    n = len(draws) / 3
    spread = covariance.diagonal().sqrt()
    assert ((draws.mean(0) - mean).abs() < 4.5 * spread / n**0.5).all()
    scale = torch.outer(spread, spread)
    assert ((draws.T.cov() - covariance).abs() < 4.5 * scale * (2 / n) ** 0.5).all()


def test_nuts_recovers_the_exact_posterior_of_a_linear_gaussian_layer():
    """The prior N(0, σ₀²) on A, given B."""
    joint, batch = linear_gaussian(MAP(prior_scale=0.7))
    model = poutine.condition(joint, {"B": joint.program.bank.get_parameter("B_loc").detach()})
    draws = nuts(model, batch)["A"]
    check_moments(draws, *exact_posterior(joint, batch, torch.zeros(3), 0.7))


@pytest.mark.parametrize(
    ("prior", "prior_mean"),
    [
        ("isotropic", "learned"),
        ("hierarchical", "zero"),
        pytest.param("hierarchical", "learned", marks=pytest.mark.slow),
    ],
)
def test_nuts_on_montec_given_its_scales_recovers_the_exact_posterior(prior, prior_mean):
    """Given π and Σ = σ² the adapter's prior is N(M, (ε‖π‖σ)²), with σ = 1 when isotropic and
    M = 0 when the prior's mean is zero."""
    joint, batch = linear_gaussian(
        MonteCLoRA(component_prior=prior, prior_mean=prior_mean, sample_scale=0.9, units="one")
    )
    weights, tril = torch.tensor([[0.4, 0.3, 0.2, 0.1]]), torch.tensor([[[1.3]]])
    fixed = {"mixture_weights": weights, "covariance_tril": tril}
    noise = nuts(poutine.condition(joint, fixed), batch)["noise"]
    sites = {
        "mixture_weights": weights.expand(len(noise), 1, 4),
        "covariance_tril": tril.expand(len(noise), 1, 1, 1),
        "noise": noise,
    }
    draws = joint.program.factors(sites).A.detach()
    scale = 0.9 * weights.norm() * (1.3 if prior == "hierarchical" else 1.0)
    mean = joint.program.bank.get_parameter("A_loc").detach()
    mean = mean if prior_mean == "learned" else torch.zeros_like(mean)
    check_moments(draws, *exact_posterior(joint, batch, mean, scale))


def test_nuts_runs_on_all_sites_of_a_fitted_posterior():
    posterior = pyrolora.fit(
        mlp(), (torch.randn(20, 4), torch.arange(20) % 3),
        guide=MonteCLoRA(component_prior="hierarchical", num_components=2),
        task="classification", adapter=CONFIG, epochs=2,
    )  # fmt: skip
    batch = {"inputs": torch.randn(20, 4), "labels": torch.arange(20) % 3}
    kernel = NUTS(posterior.model, max_tree_depth=4)
    mcmc = MCMC(kernel, num_samples=20, warmup_steps=10, disable_progbar=True)
    mcmc.run(batch)
    draws = mcmc.get_samples()
    assert set(draws) == {"mixture_weights", "covariance_tril", "noise"}
    assert draws["covariance_tril"].shape == (20, 2, 2, 2)
    assert (draws["covariance_tril"].diagonal(dim1=-2, dim2=-1) > 0).all()
    assert draws["noise"].std() > 0.1


def test_model_is_the_untempered_joint_density():
    """log p(y, θ) = (n / b) Σ log p(y|θ) + log p(θ), whatever the guide's KL weight."""
    joint, batch = linear_gaussian(MonteCLoRA(kl_weight=1e-3), n=20)
    half = {name: tensor[:10] for name, tensor in batch.items()}
    trace = poutine.trace(
        poutine.replay(joint, trace=poutine.trace(joint.program.guide).get_trace())
    )
    trace = trace.get_trace(half)
    trace.compute_log_prob()
    nodes = trace.nodes
    law = nodes["y"]["fn"]
    data = 2.0 * law.log_prob(half["labels"]).sum()
    prior = sum(
        nodes[name]["fn"].log_prob(nodes[name]["value"]).sum()
        for name in ("mixture_weights", "covariance_tril", "noise")
    )
    assert trace.log_prob_sum().item() == pytest.approx((data + prior).item(), rel=1e-5)


# The base ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "guide"), [(bert, "map"), (bert, "montec"), (llama, "montec"), (gpt2, "montec")]
)
def test_base_is_bit_identical_after_everything(make, guide, tmp_path):
    network = make()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    kinds = [type(module) for module in network.modules()]
    flags = [p.requires_grad for p in network.parameters()]
    data = tokens() if make is bert else tokens().remove_columns("labels")
    posterior = pyrolora.fit(network, data, guide=guide, epochs=2)
    posterior.predict(data, num_samples=3)
    posterior.evaluate(data, num_samples=0)
    posterior.to_arviz(4)
    posterior.save(tmp_path)
    posterior.merge()
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert posterior.detach() is network
    assert [type(module) for module in network.modules()] == kinds
    assert [p.requires_grad for p in network.parameters()] == flags
    assert all(torch.equal(before[n], t) for n, t in network.state_dict().items())


def test_two_posteriors_on_one_base_do_not_disturb_each_other():
    """Fitting, predicting and detaching the second leaves the first one's predictions as they
    were, also with overlapping targets and other ranks."""
    network, data = bert(initializer_range=0.3), tokens()
    first = pyrolora.fit(network, data, epochs=2, learning_rate=0.02)
    expected = first.predict(data, num_samples=4, seed=5).draws
    second = pyrolora.fit(
        network, data, guide="map", epochs=2, learning_rate=0.02,
        adapter=AdapterConfig(r=3, target_modules=["query", "dense"]),
    )  # fmt: skip
    own = second.predict(data, num_samples=0).draws
    assert torch.equal(first.predict(data, num_samples=4, seed=5).draws, expected)
    assert not torch.allclose(own[0], expected.mean(0), atol=1e-4)
    first.detach()
    assert torch.equal(second.predict(data, num_samples=0).draws, own)
    with pytest.raises(BindingError, match="detached"):
        first.predict(data)
    second.detach()


def test_two_posteriors_predict_from_two_threads_at_once():
    network, data = bert(initializer_range=0.3), tokens()
    posteriors = [pyrolora.fit(network, data, epochs=1, seed=seed) for seed in (1, 2)]
    expected = [p.predict(data, num_samples=0).draws for p in posteriors]
    found: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def work(index):
        for _ in range(5):
            found[index].append(posteriors[index].predict(data, num_samples=0).draws)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in (0, 1):
        assert len(found[index]) == 5
        assert all(torch.equal(draws, expected[index]) for draws in found[index])


def test_a_layer_that_the_network_never_calls_is_refused():
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, inputs):
            return nn.functional.linear(self.used(inputs), self.unused.weight)

    data = (torch.randn(6, 4), torch.arange(6) % 3)
    options = {"task": "classification", "epochs": 1}
    for targets in (["used", "unused"], ["unused"], "unused"):
        adapter = AdapterConfig(r=2, target_modules=targets)
        with pytest.raises(BindingError, match=r"calls no layer .*'unused'"):
            pyrolora.fit(Direct(), data, adapter=adapter, **options)
    with pytest.warns(UserWarning, match=r"1 of 2 selected layers .* not call them: 'unused'"):
        posterior = pyrolora.fit(Direct(), data, adapter=CONFIG, **options)
    assert [*posterior.bank.specs] == ["used"]


# Checkpointing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointed_gradients_are_the_same(make, autocast):
    """Also with the backward pass in another thread, and with other factors bound meanwhile."""
    network = make(initializer_range=0.3)
    batch = batch_of(tokens())
    if make is llama:
        batch["labels"] = batch["input_ids"].clone()
    joint = joint_of(network, guide=MonteCLoRA(scale_updates="gradient"))
    joint.program.bank.assign("B_loc", 0.3 * torch.randn(joint.program.bank.layouts["B"].total))
    joint.train()
    other = joint.binding(joint.program.factors(joint.program.draw(1))[0])
    plain = gradients(joint, batch, autocast)
    joint.activation_checkpointing_enable()
    variants = [
        gradients(joint, batch, autocast),
        gradients(joint, batch, autocast, thread=True),
        gradients(joint, batch, autocast, meanwhile=other),
    ]
    assert len(plain) >= 4
    for found in variants:
        assert set(found) == set(plain)
        for name, gradient in plain.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


def test_checkpointing_on_the_base_alone_raises_instead_of_wrong_gradients():
    joint = joint_of(bert())
    joint.base.activation_checkpointing_enable({"use_reentrant": False})
    joint.train()
    with pytest.raises(BindingError, match="recomputed"):
        gradients(joint, batch_of(tokens()))


def test_fit_carries_the_binding_into_the_users_own_checkpointing():
    states = []
    for checkpointing in (False, True):
        network = bert(initializer_range=0.3)
        if checkpointing:
            network.activation_checkpointing_enable()
        states.append(pyrolora.fit(network, tokens(), epochs=2).model.own_state())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=1e-5, rtol=1e-4)


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(ConfigError, match="use_reentrant"):
        joint_of(bert()).activation_checkpointing_enable({"use_reentrant": True})


def test_copies_of_a_posterior_are_whole_and_independent():
    """``copy.deepcopy`` and pickle: the copy predicts the same, also after another posterior of
    its network has come and gone."""
    import copy
    import pickle

    posterior = pyrolora.fit(bert(initializer_range=0.3), tokens(), epochs=2, learning_rate=0.02)
    expected = posterior.predict(tokens(), num_samples=3, seed=0).draws
    for twin in (copy.deepcopy(posterior), pickle.loads(pickle.dumps(posterior))):
        passing = pyrolora.fit(twin.base, tokens(), guide="map", epochs=1)
        passing.detach()
        assert torch.equal(twin.predict(tokens(), num_samples=3, seed=0).draws, expected)
        network = twin.detach()
        assert all(p.requires_grad for p in network.parameters())
        with pytest.raises(BindingError):
            twin.predict(tokens())
    assert torch.equal(posterior.predict(tokens(), num_samples=3, seed=0).draws, expected)


def test_loading_under_inference_mode_leaves_a_posterior_that_trains(tmp_path):
    pyrolora.fit(bert(), tokens(), epochs=1).save(tmp_path)
    network = bert()
    with torch.inference_mode():
        posterior = pyrolora.load(tmp_path, network)
        posterior.predict(tokens(), num_samples=2)
    svi = SVI(
        posterior.model, posterior.guide, pyro.optim.Adam({"lr": 1e-2}), TraceMeanField_ELBO()
    )
    assert torch.isfinite(torch.tensor(svi.step(batch_of(tokens()))))
