"""Mean field: its KL, its latent factors, and several draws a batch."""

from __future__ import annotations

import pytest
import torch
from linear import Layer, layer
from problems import absolute, batch_of, bert, tokens
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import Normal

from pyrolora import AdapterConfig
from pyrolora.adapters import attach
from pyrolora.errors import ConfigError
from pyrolora.guides import Guide, MeanField, MonteCLoRA
from pyrolora.inference import NamedELBO
from pyrolora.model import JointGuide, JointModel, build
from pyrolora.tasks import task_for

PRIOR_SCALE = 0.8


def random_scales(problem: Layer) -> None:
    program = problem.joint.program
    for name in program.scale_parameters():
        program.assign(name, 0.1 + 0.4 * torch.rand_like(program.get_parameter(name)))


# The KL ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent", ["A", "B", "AB"])
def test_kl_is_the_closed_form_of_the_docstring(latent):
    """Σ log(σ₀/σ) + (σ² + m²) / (2 σ₀²) − ½, in our bound, in Pyro's, and by Monte Carlo."""
    problem = layer(absolute(MeanField, latent=latent, prior_scale=PRIOR_SCALE))
    random_scales(problem)
    joint, program = problem.joint, problem.joint.program
    elbo, guide = NamedELBO(), JointGuide(program)
    losses = []
    for estimator in (elbo, TraceMeanField_ELBO()):
        torch.manual_seed(1)
        losses.append(estimator.differentiable_loss(joint, guide, problem.batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    draws = program.draw(20_000)
    assert set(draws) == set(latent)
    for factor in latent:
        m = program.bank.get_parameter(f"{factor}_loc").detach()
        sd = program.param(f"{factor}_scale").detach()
        kl = (PRIOR_SCALE / sd).log() + (sd**2 + m**2) / (2 * PRIOR_SCALE**2) - 0.5
        assert elbo.terms[f"kl/{factor}"].item() == pytest.approx(kl.sum().item(), rel=1e-5)
        ratio = Normal(m, sd).log_prob(draws[factor]) - Normal(0, PRIOR_SCALE).log_prob(
            draws[factor]
        )
        ratio = ratio.sum(-1)
        assert abs(ratio.mean() - kl.sum()) < 4 * ratio.std() / len(ratio) ** 0.5


# Latent factors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("latent", ["A", "B", "AB"])
def test_latent_factors_vary_and_the_others_are_their_means(latent):
    problem = layer(absolute(MeanField, latent=latent))
    random_scales(problem)
    program = problem.joint.program
    factors = program.factors(program.draw(20_000))
    for factor in "AB":
        drawn, mean = getattr(factors, factor), program.bank.get_parameter(f"{factor}_loc")
        if factor not in latent:
            assert torch.equal(drawn, mean)
            continue
        sd = program.param(f"{factor}_scale").detach()
        assert ((drawn.mean(0) - mean).abs() / sd).max() < 5 / 20_000**0.5
        covariance = (drawn / sd).T.cov()
        assert (covariance - torch.eye(len(sd))).abs().max() < 5 * (2 / 20_000) ** 0.5
    assert set(program.scale_parameters()) == {f"{factor}_scale" for factor in latent}


@pytest.mark.parametrize(
    "options",
    [{"prior_scale": 0.0}, {"init_scale": -1.0}, {"latent": "C"}, {"draws_per_batch": 0}],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options):
    (name,) = options
    with pytest.raises(ConfigError, match=name):
        MeanField(**options)


# One draw a sequence, several a batch ------------------------------------------------------------


def encoder(guide: Guide) -> tuple[JointModel, dict[str, Tensor]]:
    """A tiny encoder whose adapters and noise are large, and six sequences of several lengths."""
    network = bert(initializer_range=0.3)
    config = AdapterConfig(r=2)
    attachment = attach(network, config)
    joint = build(network, attachment, config, guide, task_for(network), 6)
    bank = joint.program.bank
    bank.assign("B_loc", torch.randn_like(bank.get_parameter("B_loc")))
    batch = batch_of(tokens(6, length=8))
    for row, length in enumerate([8, 3, 5, 8, 4, 7]):
        batch["attention_mask"][row, length:] = 0
        batch["input_ids"][row, length:] = 0
    return joint.train(), batch


GROUPED = {
    "meanfield": absolute(MeanField, init_scale=0.5, latent="AB", draws_per_batch=3),
    "montec": MonteCLoRA(draws_per_batch=3),
}


@pytest.mark.parametrize("guide", GROUPED.values(), ids=GROUPED)
def test_a_sequence_has_one_setting_of_the_weights_and_a_group_shares_it(guide):
    """Rows 2g and 2g + 1 of a batch of six have draw g: for each of their tokens, wherever the
    sequence stands in a batch and however it is padded."""
    joint, batch = encoder(guide)
    sites = poutine.trace(JointGuide(joint.program)).get_trace(batch)
    trace = poutine.trace(poutine.replay(joint, trace=sites)).get_trace(batch)
    found = trace.nodes["y"]["fn"].logits.detach()
    values = {n: s["value"] for n, s in sites.nodes.items() if s["type"] == "sample"}
    factors = joint.program.factors({n: v for n, v in values.items() if n in joint_sites(joint)})
    assert factors.draws == 3
    joint.eval()
    with torch.no_grad():
        alone = []
        for row in range(6):
            length = int(batch["attention_mask"][row].sum())
            one = {n: t[row : row + 1, :length] for n, t in batch.items() if n != "labels"}
            alone.append(joint.network(one, factors[row // 2]).log_softmax(-1))
        order = torch.tensor([5, 0, 3, 1, 4, 2])
        reordered = joint.network({n: t[order] for n, t in batch.items()}, factors[1])
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        reordered.log_softmax(-1)[[2, 5]], found[[3, 2]], rtol=1e-4, atol=1e-5
    )
    draws = joint.network({n: t[:1] for n, t in batch.items()}, factors).log_softmax(-1)
    assert (draws[0] - draws[1]).abs().max() > 1e-2  # the groups' weights do differ


def joint_sites(joint: JointModel) -> set[str]:
    return set(joint.program.draw(1))


@pytest.mark.parametrize("guide", GROUPED.values(), ids=GROUPED)
@pytest.mark.parametrize(("rows", "count"), [(6, 3), (5, 1), (4, 2), (9, 3), (2, 2), (1, 1)])
def test_a_batch_falls_into_the_largest_number_of_equal_groups(guide, rows, count):
    """Up to draws_per_batch = 3; outside of training there is one."""
    problem = layer(guide)
    batch = {name: t[:rows] for name, t in problem.batch.items()}
    elbo, joint_guide = NamedELBO(), JointGuide(problem.joint.program)
    for training, expected in ((True, count), (False, 1)):
        problem.joint.train(training)
        trace = poutine.trace(joint_guide).get_trace(batch)
        for site in joint_sites(problem.joint):
            fn = trace.nodes[site]["fn"]
            assert fn.batch_shape[:-1] == ((expected,) if expected > 1 else ())
        assert torch.isfinite(elbo.differentiable_loss(problem.joint, joint_guide, batch))


def gradients(joint: JointModel, batch: dict[str, Tensor], draws: int) -> tuple[dict, Tensor]:
    """Parameter -> (draws, k), and the terms of the bound (draws, terms), by name in order."""
    elbo, guide = NamedELBO(), JointGuide(joint.program)
    found: dict[str, list[Tensor]] = {}
    terms = []
    for _ in range(draws):
        joint.zero_grad()
        elbo.differentiable_loss(joint, guide, batch).backward()
        terms.append(torch.stack([elbo.terms[name] for name in sorted(elbo.terms)]))
        for name, parameter in joint.program.named_parameters():
            found.setdefault(name, []).append(parameter.grad.flatten().clone())
    return {name: torch.stack(rows) for name, rows in found.items()}, torch.stack(terms)


@pytest.mark.parametrize("name", GROUPED)
def test_several_draws_a_batch_change_no_expectation(name):
    """Gradient and terms of the bound at G = 3 have the means that they have at G = 1."""
    options = {"meanfield": {"init_scale": 0.3}, "montec": {}}
    problem = layer(absolute(type(GROUPED[name]), **options[name]), n=6)
    results = []
    for count in (1, 3):
        problem.joint.program.draws_per_batch = count
        results.append(gradients(problem.joint.train(), problem.batch, 250))
    (one, terms), (several, terms_) = results
    pairs = [(terms, terms_), *((one[name], several[name]) for name in one)]
    for a, b in pairs:
        error = ((a.var(0) + b.var(0)) / 250).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() <= 4.5 * error + 1e-5 * a.mean(0).abs()).all()
    if name == "meanfield":  # its KL is no estimate
        kls = torch.cat([terms[:, 0], terms_[:, 0]])
        assert kls.max() - kls.min() < 1e-5 * kls.mean()


@pytest.mark.parametrize("equal", [True, False], ids=["equal groups", "any rows"])
def test_the_noise_of_the_gradient_is_that_of_the_groups_own_draws(equal):
    """The gradient in the means of a linear layer has a known covariance.

    It is Σ_g H_g θ_g + constant, with H_g from the rows of group g and θ_g of covariance S, so that
    its covariance is Σ_g H_g S H_g, and H S H / G where all groups have the same rows.
    """
    problem = layer(absolute(MeanField, init_scale=0.3), n=8)
    if equal:
        problem = Layer(problem.joint, problem.inputs[:2].repeat(4, 1), problem.labels)
    random_scales(problem)
    program = problem.joint.train().program
    S = program.param("A_scale").detach().double().square().diag()
    n, traces = 300, {}
    for count in (1, 2, 4):
        program.draws_per_batch = count
        found, _ = gradients(problem.joint, problem.batch, n)
        parts = [
            Layer(problem.joint, x, problem.labels[: len(x)]).quadratic("A")[0]
            for x in problem.inputs.chunk(count)
        ]
        expected = sum(H @ S @ H for H in parts)
        sample = found["bank.A_loc"].double().T.cov()
        sd = expected.diagonal().sqrt()
        assert ((sample - expected) / torch.outer(sd, sd)).abs().max() < 5 * (2 / n) ** 0.5
        traces[count] = expected.trace()
    if equal:
        for count in (2, 4):
            assert traces[1] / traces[count] == pytest.approx(count)
