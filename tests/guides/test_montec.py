"""MonteCLoRA's pair: its law, its bound, its options."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pyro
import pytest
import torch
from problems import absolute, mlp
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine.util import site_is_subsample
from reference import Uncollapsed
from scipy import stats
from torch import nn
from torch.distributions import Dirichlet, kl_divergence

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.adapters import attach
from pyrolora.distributions import WishartCholesky
from pyrolora.errors import ConfigError
from pyrolora.guides import MAP, MonteCLoRA
from pyrolora.guides.plates import averaged
from pyrolora.inference import NamedELBO
from pyrolora.model import JointModel, build
from pyrolora.tasks import Regression

R, IN, OUT, N_DATA, NOISE = 2, 3, 4, 6, 0.7


class TwoOutputs(Regression):
    """Gaussian noise of a fixed scale on every output: the reference's likelihood."""

    def law(self, output, batch):
        return pyro.distributions.Normal(output, NOISE).to_event(1)

    def targets(self, batch):
        return batch["labels"]

    def output(self, raw):
        return raw


def linear_problem(options: MonteCLoRA, seed: int = 0) -> tuple[JointModel, dict]:
    """One adapted linear layer with random means, and data."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(IN, OUT, bias=False))
    config = AdapterConfig(r=R, lora_alpha=3.0)
    joint = build(network, attach(network, config), config, options, TwoOutputs(), N_DATA)
    bank = joint.program.bank
    bank.assign("A_loc", torch.randn(R * IN))
    bank.assign("B_loc", torch.randn(R * OUT))
    batch = {"inputs": torch.randn(N_DATA, IN), "labels": torch.randn(N_DATA, OUT)}
    return joint, batch


def two_layers(options: MonteCLoRA) -> JointModel:
    """Layers of rank 3 and 1 with random means and scales."""
    torch.manual_seed(0)
    network = mlp(4, 4)
    config = AdapterConfig(r=3, rank_pattern={"0": 1})
    joint = build(network, attach(network, config), config, options, TwoOutputs(), N_DATA)
    with torch.no_grad():
        for parameter in joint.program.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return joint


def montec(**options: Any) -> MonteCLoRA:
    """Absolute noise around M, and V started at I, where the tests do not say otherwise."""
    return absolute(MonteCLoRA, **{"prior_mean": "learned", "init_covariance": 1.0, **options})


def draws(joint: JointModel, n: int) -> dict[str, torch.Tensor]:
    return joint.program.draw(n)


@pytest.mark.parametrize("prior", ["isotropic", "hierarchical"])
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("latent", ["A", "B", "AB"])
def test_adapter_is_unbiased_with_the_mixtures_covariance(prior, covariance, latent):
    """E[a_j] = m_j and Cov[a_j] = ε² E‖π‖² V, with V the guide's, column by column."""
    options = montec(sample_scale=0.3, component_prior=prior, covariance=covariance, latent=latent)
    joint, _ = linear_problem(options)
    program = joint.program
    with torch.no_grad():
        name = "scale_diag" if covariance == "diagonal" else "scale_tril"
        program.get_parameter(name).add_(0.4 * torch.randn_like(program.get_parameter(name)))
    n = 40_000
    sites = draws(joint, n)
    factors = program.factors(sites)
    V = program.df * program._covariance().scale_tril @ program._covariance().scale_tril.mT
    alpha = program.param("concentration").detach()
    total = alpha.sum(-1)
    squared = (alpha * (alpha + 1)).sum(-1) / (total * (total + 1))  # E‖π‖² of a Dirichlet
    for index, block in enumerate(program.layout.blocks):
        flat = {"A": factors.A, "B": factors.B}[block.factor]
        mean = program.bank.get_parameter(f"{block.factor}_loc").detach()
        noise = (flat - mean).unflatten(-1, (block.rank, block.columns))
        expected = 0.3**2 * squared[index] * V[index].detach()
        for column in range(block.columns):
            found = noise[..., column].T.cov()
            error = 6 * expected.diagonal().max() * math.sqrt(4 / n)
            assert (found - expected).abs().max() < error
        spread = expected.diagonal().max().sqrt()
        assert noise.mean(0).abs().max() < 5 * spread / math.sqrt(n)
    for factor in set("AB") - set(latent):
        flat = {"A": factors.A, "B": factors.B}[factor]
        assert torch.equal(flat, program.bank.get_parameter(f"{factor}_loc"))


@pytest.mark.parametrize("sparse", [False, True])
def test_collapsed_noise_has_the_law_of_the_mixture(sparse):
    """ε‖π‖ L z and ε Σ_k π_k δ_k agree in law (Kolmogorov-Smirnov, kurtosis included); sparse
    mode is the largest component alone."""
    options = montec(sample_scale=1.0, component_prior="hierarchical", sparse=sparse)
    joint, _ = linear_problem(options)
    program = joint.program
    n = 20_000
    collapsed = (program.factors(draws(joint, n)).A - program.bank.get_parameter("A_loc"))[:, 0]
    weights = Dirichlet(program.param("concentration")[0]).sample((n,))
    tril = WishartCholesky(program.df, program._covariance().scale_tril[0]).sample((n,))
    components = torch.einsum("nij,nkj->nki", tril, torch.randn(n, weights.shape[-1], R))
    if sparse:
        best = weights.argmax(-1)
        mixed = (weights.unsqueeze(-1) * components)[torch.arange(n), best]
    else:
        mixed = torch.einsum("nk,nki->ni", weights, components)
    assert stats.ks_2samp(collapsed.detach(), mixed[:, 0].detach()).pvalue > 1e-3
    assert stats.kurtosis(collapsed.detach()) > 0.05  # a scale mixture is no Gaussian


def _mean_loss(elbo, model, guide, *args, repeats: int) -> tuple[float, float]:
    losses = torch.tensor([elbo.loss(model, guide, *args) for _ in range(repeats)])
    return float(losses.mean()), float(losses.std() / math.sqrt(repeats))


@pytest.mark.parametrize("hierarchical", [True, False])
def test_bound_against_the_uncollapsed_pair(hierarchical):
    """The same data term and the same KLs of π and Σ. The components cost nothing in the
    hierarchical form of either pair; in the isotropic form N times KL(N(0,Σ) ‖ N(0,I)) a column
    uncollapsed, and once collapsed, so that the collapsed bound is the tighter one by (N-1) KLs."""
    options = montec(
        component_prior="hierarchical" if hierarchical else "isotropic",
        sample_scale=0.5,
        num_components=3,
        kl_weight=1.0,
    )
    joint, batch = linear_problem(options)
    program = joint.program
    program.assign("scale_diag", torch.tensor([[0.8, 1.3]]))
    bank, layer = program.bank, joint.attachment.layers["0"]
    A, B = bank.matrices(bank.means())["0"]
    alpha = program.param("concentration")[0].detach()
    scale = program.param("scale_diag")[0].detach()
    reference = Uncollapsed(
        layer.weight, B.detach(), A.detach(), 3.0 / R, 0.5, program.df, NOISE, hierarchical,
        torch.ones(3), draws=1200,
    )  # fmt: skip
    x, y = batch["inputs"], batch["labels"]
    repeats = 25

    def model(batch):
        with averaged("draws", reference.draws):
            joint(batch)

    def guide(_):
        with averaged("draws", reference.draws):
            program.guide()

    with torch.no_grad():
        ours, error = _mean_loss(TraceMeanField_ELBO(), model, guide, batch, repeats=repeats)
        theirs, error_ = _mean_loss(
            TraceMeanField_ELBO(),
            lambda *_: reference.model(x, y),
            lambda *_: reference.guide(x, y, alpha, scale),
            x,
            repeats=repeats,
        )
        gap = 0.0
        if not hierarchical:
            tril = WishartCholesky(program.df, torch.diag(scale) / program.df**0.5).sample((4000,))
            covariance = tril @ tril.mT
            kl = 0.5 * (covariance.diagonal(dim1=-2, dim2=-1).sum(-1) - R - covariance.logdet())
            gap = 2 * IN * float(kl.mean())
    assert abs(ours + gap - theirs) < 4 * math.hypot(error, error_) + 0.02 * gap


@pytest.mark.parametrize("prior", ["isotropic", "hierarchical"])
@pytest.mark.parametrize("learn", [pytest.param(False, marks=pytest.mark.slow), True])
def test_closed_form_and_sampled_elbo_agree(prior, learn):
    """`TraceMeanField_ELBO`, `Trace_ELBO` and ours estimate one bound, and its gradient."""
    options = montec(
        component_prior=prior,
        learn_sample_scale=learn,
        sample_scale=0.4,
        cooperation=1.5,
        covariance="full",
    )
    joint, batch = linear_problem(options)
    program = joint.program
    program.get_parameter("scale_tril").data.add_(0.2 * torch.randn(1, R * (R + 1) // 2))
    if learn:
        program.assign("sample_scale", torch.tensor([0.25]))
    guide = lambda b: program.guide()  # noqa: E731
    results = {}
    for elbo in (TraceMeanField_ELBO(), Trace_ELBO(), NamedELBO()):
        losses, gradients = [], []
        for _ in range(400):
            joint.zero_grad()
            loss = elbo.differentiable_loss(joint, guide, batch)
            loss.backward()
            losses.append(loss.item())
            gradients.append(torch.cat([p.grad.flatten() for p in program.parameters()]))
        losses_, gradients_ = torch.tensor(losses), torch.stack(gradients)
        results[type(elbo).__name__] = (losses_, gradients_)
    for name in ("Trace_ELBO", "NamedELBO"):
        for mine, stock in zip(results[name], results["TraceMeanField_ELBO"], strict=True):
            error = (mine.var(0) / 400 + stock.var(0) / 400).sqrt()
            assert ((mine.mean(0) - stock.mean(0)).abs() <= 5 * error + 1e-4).all(), name


def test_learned_scale_is_priced_by_the_kl_of_the_noise():
    """KL a column = r [log(ε₀/ε) + ε² / (2 ε₀²) - ½] in the hierarchical form."""
    joint, batch = linear_problem(
        montec(component_prior="hierarchical", learn_sample_scale=True, sample_scale=0.4)
    )
    joint.program.assign("sample_scale", torch.tensor([0.1]))
    elbo = NamedELBO()
    elbo.differentiable_loss(joint, lambda b: joint.program.guide(), batch)
    expected = IN * R * (math.log(4) + 0.25**2 / 2 - 0.5)
    assert elbo.terms["kl/noise"].item() == pytest.approx(expected, rel=1e-5)


def test_hierarchical_noise_costs_exactly_nothing():
    joint, batch = linear_problem(montec(component_prior="hierarchical"))
    elbo = NamedELBO()
    elbo.differentiable_loss(joint, lambda b: joint.program.guide(), batch)
    assert elbo.terms["kl/noise"] == 0


def test_named_terms_are_the_kls_of_the_sites():
    joint, batch = linear_problem(montec(component_prior="isotropic"))
    program = joint.program
    program.assign("scale_diag", torch.tensor([[0.5, 1.7]]))
    elbo = NamedELBO()
    torch.manual_seed(3)
    loss = elbo.differentiable_loss(joint, lambda b: program.guide(), batch)
    torch.manual_seed(3)
    trace = poutine.trace(program.guide).get_trace()
    alpha = program.param("concentration")
    dirichlet = kl_divergence(Dirichlet(alpha), Dirichlet(torch.ones_like(alpha))).sum()
    tril = trace.nodes["covariance_tril"]["value"][0]
    normal = torch.distributions.MultivariateNormal
    column = kl_divergence(
        normal(torch.zeros(R), scale_tril=tril), normal(torch.zeros(R), torch.eye(R))
    )
    assert elbo.terms["kl/mixture_weights"].item() == pytest.approx(dirichlet.item(), rel=1e-4)
    assert elbo.terms["kl/noise"].item() == pytest.approx(IN * column.item(), rel=1e-4)
    total = sum(v if k.startswith("kl/") else -v for k, v in elbo.terms.items())
    assert loss.item() == pytest.approx(float(total), rel=1e-5)


def test_cooperation_lowers_the_log_joint_by_the_squared_weights():
    plain, batch = linear_problem(montec())
    costly, _ = linear_problem(montec(cooperation=2.5))
    sites = poutine.trace(plain.program.guide).get_trace()
    values = []
    for joint in (plain, costly):
        conditioned = poutine.replay(joint, trace=sites)
        values.append(poutine.trace(conditioned).get_trace(batch).log_prob_sum())
    weights = sites.nodes["mixture_weights"]["value"]
    assert (values[1] - values[0]).item() == pytest.approx(-2.5 * weights.square().sum().item())


@pytest.mark.parametrize("prior_mean", ["learned", "zero"])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_kl_weight_scales_the_kls_and_nothing_else(beta, prior_mean):
    joint, batch = linear_problem(montec(prior_mean=prior_mean))
    elbo = NamedELBO()
    guide = lambda b, kl_weight: joint.program.guide(kl_weight)  # noqa: E731
    loss = elbo.differentiable_loss(joint, guide, batch, kl_weight=beta)
    kl = sum(v for k, v in elbo.terms.items() if k.startswith("kl/"))
    assert loss.item() == pytest.approx(float(beta * kl - elbo.terms["log_likelihood"]), rel=1e-5)
    stock = TraceMeanField_ELBO()
    torch.manual_seed(1)
    ours = elbo.differentiable_loss(joint, guide, batch, kl_weight=beta)
    torch.manual_seed(1)
    theirs = stock.differentiable_loss(joint, guide, batch, kl_weight=beta)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_weight_rises_during_warmup_and_can_be_against_the_mean():
    guide = montec(kl_weight=0.2, kl_warmup=0.5)
    assert guide.beta(100, 0.25) == pytest.approx(0.1)
    assert guide.beta(100, 0.5) == guide.beta(100, 1.0) == 0.2
    assert MonteCLoRA(kl_weight=0.2, kl_weight_against="mean").beta(100) == pytest.approx(20)


def test_paper_setting():
    options = MonteCLoRA.paper()
    joint, _ = linear_problem(options)
    assert joint.program.df == R
    assert (options.component_prior, options.covariance) == ("isotropic", "diagonal")
    assert (options.prior_mean, options.init_covariance) == ("learned", 1.0)
    assert (options.num_components, options.sample_scale) == (4, 5e-3)
    assert options.beta(2_000) == pytest.approx(1e-5 * 2_000)
    assert MonteCLoRA.paper(sample_scale=0.1).sample_scale == 0.1


def prior_precisions(joint: JointModel, sites: dict) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each block its mean (r, columns) and the precision (r, r) of a column of the adapter
    under the model, given π and Σ: (ε₀² ‖π‖² Σ)⁻¹, with Σ = I in the isotropic form."""
    program, found = joint.program, []
    means = program.bank.matrices(program.bank.means())
    for index, block in enumerate(program.layout.blocks):
        A, B = means[block.layer]
        weights = sites["mixture_weights"][index]
        spread = weights.max() if program.options.sparse else weights.square().sum().sqrt()
        tril = sites["covariance_tril"][index, : block.rank, : block.rank]
        if program.options.component_prior == "isotropic":
            tril = torch.eye(block.rank)
        covariance = (program.options.sample_scale * spread) ** 2 * tril @ tril.T
        found.append((A if block.factor == "A" else B.T, torch.linalg.inv(covariance)))
    return found


@pytest.mark.parametrize("prior", ["isotropic", "hierarchical"])
@pytest.mark.parametrize(("latent", "sparse"), [("A", False), ("B", True), ("AB", False)])
def test_a_zero_prior_mean_costs_half_of_the_whitened_means(prior, latent, sparse):
    """½ Σ_j m_jᵀ (ε₀² ‖π‖² Σ)⁻¹ m_j more than the learned one at any draw of π and Σ, and nothing
    else; so its gradients, those of the means included. ε₀ is the model's, not the guide's ε."""
    options = montec(
        component_prior=prior, latent=latent, sparse=sparse, covariance="full",
        sample_scale=0.4, learn_sample_scale=True,
    )  # fmt: skip
    terms, gradients = [], []
    for prior_mean in ("learned", "zero"):
        joint = two_layers(dataclasses.replace(options, prior_mean=prior_mean))
        elbo, own = NamedELBO(), dict(joint.program.named_parameters())
        torch.manual_seed(3)
        loss = elbo.differentiable_loss(joint.program.model, joint.program.guide)
        terms.append(elbo.terms)
        gradients.append(torch.autograd.grad(loss, list(own.values()), materialize_grads=True))
    torch.manual_seed(3)
    nodes = poutine.trace(joint.program.guide).get_trace().nodes
    sites = {name: nodes[name]["value"] for name in ("mixture_weights", "covariance_tril")}
    price = sum(0.5 * (M * (P @ M)).sum() for M, P in prior_precisions(joint, sites))
    expected = torch.autograd.grad(price, list(own.values()), materialize_grads=True)

    costs = [term.pop("kl/noise") for term in terms]
    assert (costs[1] - costs[0]).item() == pytest.approx(price.item(), rel=1e-4)
    assert terms[0] == terms[1]
    for name, learned, zero, change in zip(own, *gradients, expected, strict=True):
        torch.testing.assert_close(zero - learned, change, rtol=1e-3, atol=1e-3, msg=name)
        if name.endswith("_loc"):
            assert (learned == 0).all()
            assert (zero != 0).any() == (name[-5] in latent)


@pytest.mark.parametrize("prior_mean", ["learned", "zero"])
@pytest.mark.parametrize("prior", ["isotropic", "hierarchical"])
@pytest.mark.parametrize("latent", ["A", "B", "AB"])
def test_adapter_of_the_model_has_the_prior_mean_and_covariance(prior_mean, prior, latent):
    """Given π and Σ: N(m_j, ε₀² ‖π‖² Σ) or N(0, ε₀² ‖π‖² Σ), column by column, in any rank."""
    options = montec(component_prior=prior, latent=latent, prior_mean=prior_mean, sample_scale=0.4)
    joint = two_layers(options)
    program, n = joint.program, 10_000
    sites = {k: v[0] for k, v in draws(joint, 1).items() if k != "noise"}
    given = {name: value.expand(n, *value.shape) for name, value in sites.items()}
    with torch.no_grad(), poutine.block(), pyro.plate("draws", n, dim=-2):
        factors = poutine.condition(program.model, given)()
    found = program.bank.matrices(factors)
    for block, (M, precision) in zip(
        program.layout.blocks, prior_precisions(joint, sites), strict=True
    ):
        A, B = found[block.layer]
        values = A if block.factor == "A" else B.mT
        covariance = torch.linalg.inv(precision)
        spread = covariance.diagonal().sqrt()
        mean = M.detach() if prior_mean == "learned" else torch.zeros_like(M)
        away = (values.mean(0) - mean).abs() / spread.unsqueeze(-1)
        assert away.max() < 5 / math.sqrt(n)
        for column in range(block.columns):
            error = (values[..., column].T.cov() - covariance).abs()
            assert (error <= 5 * math.sqrt(2 / n) * spread.outer(spread)).all()
    for factor in set("AB") - set(latent):
        assert torch.equal(getattr(factors, factor), getattr(program.bank.means(), factor))


@pytest.mark.parametrize("prior_mean", ["learned", "zero"])
@pytest.mark.parametrize("prior", ["isotropic", "hierarchical"])
def test_draws_in_a_plate_have_the_densities_and_kls_of_draws_one_at_a_time(prior, prior_mean):
    joint = two_layers(
        montec(component_prior=prior, prior_mean=prior_mean, latent="AB", sample_scale=0.4)
    )
    program = joint.program

    def pair(sites):
        """Return the density of the noise, its KL and the factors of the model under ``sites``."""
        guide = poutine.trace(poutine.condition(program.guide, sites)).get_trace()
        model = poutine.trace(poutine.condition(program.model, sites)).get_trace()
        q, p = (trace.nodes["noise"]["fn"] for trace in (guide, model))
        factors = model.nodes["_RETURN"]["value"]
        return p.log_prob(sites["noise"]), kl_divergence(q, p), factors.A, factors.B

    sites = draws(joint, 5)
    alone = [pair({name: value[i] for name, value in sites.items()}) for i in range(5)]
    with pyro.plate("draws", 5, dim=-2):
        found = pair({**sites, "noise": sites["noise"].unsqueeze(-2)})
    for values, expected in zip(found, zip(*alone, strict=True), strict=True):
        expected = torch.stack(expected)
        torch.testing.assert_close(
            values.reshape(-1) if expected.dim() == 1 else values, expected, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_a_lower_rank_leaves_the_other_rows_of_v_at_the_identity(covariance):
    """With differing ranks: the unused rows take no gradient, cost no KL, carry no noise."""
    network = mlp(4, 4)
    config = AdapterConfig(r=3, rank_pattern={"0": 1})
    joint = build(
        network, attach(network, config), config,
        montec(covariance=covariance), TwoOutputs(), 5,
    )  # fmt: skip
    program = joint.program
    rows = {b.layer: i for i, b in enumerate(program.layout.blocks)}
    name = "scale_diag" if covariance == "diagonal" else "scale_tril"
    program.get_parameter(name).data.add_(0.5)
    scale = program.df**0.5 * program._covariance().scale_tril[rows["0"]]
    torch.testing.assert_close(scale[1:, 1:], torch.eye(2))
    assert torch.equal(scale[1:, 0], torch.zeros(2))
    batch = {"inputs": torch.randn(5, 4), "labels": torch.randn(5, 4)}
    loss = NamedELBO().differentiable_loss(joint, lambda b: program.guide(), batch)
    loss.backward()
    gradient = program.get_parameter(name).grad[rows["0"]]
    used = 1 if covariance == "diagonal" else [0]
    assert gradient[used if covariance == "full" else 0].abs().sum() > 0
    assert gradient[1:].abs().sum() == 0
    quantities = program.quantities(program.draw(3))
    assert torch.equal(quantities["signal_to_noise"][0][:, rows["0"], 1:], torch.zeros(3, 2))


def test_number_of_sites_does_not_grow_with_layers():
    counts = []
    for depth in (1, 7):
        network = nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth)))
        config = AdapterConfig(r=2)
        joint = build(network, attach(network, config), config, montec(), TwoOutputs(), 5)
        batch = {"inputs": torch.randn(5, 4), "labels": torch.randn(5, 4)}
        trace = poutine.trace(joint).get_trace(batch)
        counts.append([(n, s["type"]) for n, s in trace.nodes.items()])
    assert counts[0] == counts[1]


def test_model_and_guide_have_the_same_sites_in_the_same_order():
    joint, batch = linear_problem(montec())
    model = poutine.trace(joint).get_trace(batch)
    guide = poutine.trace(joint.program.guide).get_trace()
    names = [
        [n for n, s in trace.nodes.items() if s["type"] == "sample" and not site_is_subsample(s)]
        for trace in (model, guide)
    ]
    assert names[0] == [*names[1], "y"] == ["mixture_weights", "covariance_tril", "noise", "y"]


@pytest.mark.parametrize("prior_scale", [None, 0.5])
def test_map_costs_nothing_without_a_prior_and_its_density_with_one(prior_scale):
    joint, batch = linear_problem(MAP(prior_scale=prior_scale))
    elbo = NamedELBO()
    elbo.differentiable_loss(joint, lambda b: joint.program.guide(), batch)
    cost = (elbo.terms["kl/A"] + elbo.terms["kl/B"]).item()
    entries = torch.cat([*joint.program.bank.parameters()]).detach()
    density = torch.distributions.Normal(0, 0.5).log_prob(entries).sum().item()
    assert cost == pytest.approx(-density if prior_scale else 0.0, rel=1e-5)


def test_around_zero_the_hierarchical_form_needs_enough_degrees_of_freedom():
    """E[Σ⁻¹] = ν V⁻¹ / (ν − r − 1): at ν = r + 1 and below the KL has no finite mean."""
    data = (torch.randn(8, 4), torch.randint(4, (8,)))

    def fitted(**options: Any) -> pyrolora.Posterior:
        guide = montec(component_prior="hierarchical", **options)
        adapter = AdapterConfig(r=3)
        return pyrolora.fit(
            mlp(4, 4), data, guide, task="classification", adapter=adapter, epochs=1
        )

    with pytest.raises(ConfigError, match=r"df_per_rank > 1\.33.* at rank 3, got 1\.3"):
        fitted(prior_mean="zero", df_per_rank=1.3)
    fitted(prior_mean="zero", df_per_rank=1.4)
    fitted(prior_mean="learned", df_per_rank=1)
