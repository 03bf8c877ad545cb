"""The objective of every guide with a KL: tempered once, and sampled outside of autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear import Layer, layer
from problems import absolute
from pyro import poutine

from pyrolora.guides import Flat, Guide, LowRank, MeanField, MonteCLoRA
from pyrolora.inference import NamedELBO
from pyrolora.model import JointGuide

GUIDES = {
    "montec": MonteCLoRA(df_per_rank=8, covariance="full", prior_mean="zero"),
    "montec hierarchical": MonteCLoRA(
        component_prior="hierarchical", df_per_rank=8, prior_mean="zero", learn_sample_scale=True
    ),
    "meanfield": MeanField(latent="AB", prior_mean="zero"),
    "lowrank": LowRank(latent="AB", rank=2, prior_mean="zero"),
    "flat+meanfield": Flat(inner=MeanField(prior_mean="zero")),
}
SITES = {"mixture_weights", "covariance_tril", "noise", "A", "B", "AB"}
every_guide = pytest.mark.parametrize("guide", GUIDES.values(), ids=GUIDES)


def problem_of(guide: Guide, *, after: bool = False) -> Layer:
    """A layer with a posterior that is off its prior; or off an earlier posterior of the guide."""
    problem = layer(guide)
    program = problem.joint.program
    if after:
        program.succeed(layer(guide).joint.program)
    with torch.no_grad():
        for parameter in program.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return problem


@every_guide
@pytest.mark.parametrize("after", [False, True], ids=["prior", "earlier posterior"])
def test_beta_scales_each_kl_once(guide, after):
    """At the same draw the KLs are those of β = 1, whatever β, and the loss has β times them."""
    problem, elbo = problem_of(guide, after=after), NamedELBO()

    def bound(beta: float) -> tuple[float, dict[str, float]]:
        torch.manual_seed(1)
        program = JointGuide(problem.joint.program)
        loss = elbo.differentiable_loss(problem.joint, program, problem.batch, kl_weight=beta)
        return loss.item(), {name: term.item() for name, term in elbo.terms.items()}

    _, plain = bound(1.0)
    kl = sum(value for name, value in plain.items() if name.startswith("kl/"))
    assert kl > 1
    for beta in (0.1, 3.0):
        loss, terms = bound(beta)
        assert terms == pytest.approx(plain, rel=1e-4, abs=1e-4)
        assert loss == pytest.approx(beta * kl - plain["log_likelihood"], rel=1e-4)


@every_guide
def test_sites_and_factors_are_the_same_under_autocast(guide, monkeypatch):
    """In bfloat16 a product of two factors of Σ would be wrong in its third digit."""
    problem = problem_of(guide)
    joint, batch = problem.joint.train(), problem.batch

    def sampled(program: Any) -> dict[str, Any]:
        nodes = poutine.trace(program).get_trace(batch).nodes
        return {n: s["value"] for n, s in nodes.items() if s["type"] == "sample" and n in SITES}

    def run(*, autocast: bool) -> list[dict[str, Any]]:
        torch.manual_seed(1)
        bound: dict[str, Any] = {}
        network = type(joint).network

        def watched(self: Any, batch: Any, factors: Any) -> Any:
            bound.update(A=factors.A, B=factors.B)
            return network(self, batch, factors)

        with monkeypatch.context() as patch:
            patch.setattr(type(joint), "network", watched)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return [sampled(JointGuide(joint.program)), sampled(joint), bound]

    for plain, cast in zip(run(autocast=False), run(autocast=True), strict=True):
        assert plain
        assert plain.keys() == cast.keys()
        for name, value in plain.items():
            assert cast[name].dtype == torch.float32, name
            assert torch.equal(cast[name], value), name


def test_draws_of_a_batch_are_averaged():
    """Three draws per batch have the KL of one, which is a closed form of the guide alone."""

    def divergence(draws: int) -> float:
        problem = problem_of(MeanField(latent="AB", prior_mean="zero", draws_per_batch=draws))
        joint, elbo = problem.joint.train(), NamedELBO()
        assert joint.program.groups(len(problem.labels)) == draws
        elbo.differentiable_loss(joint, JointGuide(joint.program), problem.batch)
        return sum(term.item() for name, term in elbo.terms.items() if name.startswith("kl/"))

    values = []
    for draws in (1, 3):
        torch.manual_seed(0)
        values.append(divergence(draws))
    assert values[0] > 1
    assert values[1] == pytest.approx(values[0], rel=1e-5)


@pytest.mark.parametrize("prior_mean", ["learned", "zero"])
def test_means_cost_nothing_where_the_prior_is_around_them(prior_mean):
    """KL = Σ ½ (σ² / σ₀² − 1) − log(σ / σ₀), and ½ ‖m / σ₀‖² more around zero."""
    problem = layer(absolute(MeanField, prior_mean=prior_mean, prior_scale=0.8, init_scale=0.2))
    elbo, program = NamedELBO(), problem.joint.program
    elbo.differentiable_loss(problem.joint, JointGuide(program), problem.batch)
    means = problem.mean("A")
    ratio = torch.tensor(0.2 / 0.8)
    expected = len(means) * (0.5 * (ratio.square() - 1) - ratio.log())
    if prior_mean == "zero":
        expected = expected + 0.5 * (means / 0.8).square().sum()
    assert elbo.terms["kl/A"].item() == pytest.approx(expected.item(), rel=1e-5)
