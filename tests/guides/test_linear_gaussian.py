"""Every posterior of a linear layer with Gaussian noise against its closed form."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from linear import Gaussian, Layer, layer, products, standard_errors, svi
from problems import ABSOLUTE, absolute
from torch import Tensor
from torch.distributions import Chi2, Dirichlet, MultivariateNormal, kl_divergence

from pyrolora.guides import MAP, NUTS, Laplace, LowRank, MeanField, MonteCLoRA
from pyrolora.inference import NamedELBO, log_marginal_likelihood
from pyrolora.model import JointGuide

PRIOR_SCALE = 0.8


# NUTS --------------------------------------------------------------------------------------------


def assert_draws_from(chains: Tensor, law: Gaussian) -> None:
    """Mean and covariance within 4.5 standard errors: one test in a thousand fails by chance."""
    assert standard_errors(chains, law.mean).max() < 4.5
    assert standard_errors(products(chains, law.mean), law.covariance.flatten()).max() < 4.5


@pytest.mark.parametrize(("factor", "beta"), [("A", 0.5), ("B", 1.0)])
def test_nuts_has_the_exact_posterior_of_one_factor_given_the_other(factor, beta):
    """Tempered by β it is ∝ p(θ) p(y|θ)^(1/β), and not that of another β."""
    problem = layer(MAP(), rank=1)
    inner = MeanField(kl_weight=beta, prior_scale=PRIOR_SCALE, latent=factor, **ABSOLUTE)
    posterior = problem.fit(NUTS(inner=inner, num_samples=150, warmup_steps=80))
    chains = posterior.model.program.get_buffer(factor).unflatten(0, (2, -1)).double()
    prior = problem.prior(factor, PRIOR_SCALE)
    assert_draws_from(chains, problem.posterior(factor, prior, 1 / beta))
    wrong = problem.posterior(factor, prior, beta if beta < 1 else 0.5)
    with pytest.raises(AssertionError):
        assert_draws_from(chains, wrong)


def reference(problem: Layer, options: MonteCLoRA, count: int) -> tuple[Gaussian, float]:
    """The posterior's mean and covariance of A, and E[‖π‖² Σ | y], for rank 1, by importance
    sampling.

    Given c = ε₀² ‖π‖² Σ the columns are a_j ~ N(m_j, c), with m_j = 0 for a zero prior mean, and
    all that the data say is their evidence: with g = h − H m and P = H + I / c,

        log p(y | c) = ½ gᵀ P⁻¹ g − ½ log|I + c H| + constant.
    """
    weights = Dirichlet(torch.full((options.num_components,), options.concentration))
    squared = weights.sample((count,)).square().sum(-1).double()
    spread = squared
    if options.component_prior == "hierarchical":
        df = options.df_per_rank
        chi = Chi2(torch.tensor(df, dtype=torch.float64))
        spread = squared * chi.sample((count,)) / df
    c = options.sample_scale**2 * spread
    H, h = problem.quadratic("A")
    mean, eye = problem.mean("A"), torch.eye(len(h), dtype=torch.float64)
    if options.prior_mean == "zero":
        mean = torch.zeros_like(mean)
    g = h - H @ mean
    covariances = torch.linalg.inv(H + eye / c[:, None, None])
    shifts = covariances @ g
    evidence = 0.5 * shifts @ g - 0.5 * (eye + c[:, None, None] * H).logdet()
    share = evidence.softmax(0)
    assert 1 / share.square().sum() > 0.05 * count  # the effective sample size
    shift = share @ shifts
    centred = shifts - shift
    covariance = torch.einsum("s,sij->ij", share, covariances)
    covariance = covariance + torch.einsum("s,si,sj->ij", share, centred, centred)
    return Gaussian(mean + shift, torch.linalg.inv(covariance)), float(share @ spread)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prior", "prior_mean"),
    [("hierarchical", "learned"), ("isotropic", "learned"), ("hierarchical", "zero")],
)
def test_nuts_integrates_over_mixture_weights_and_covariance(prior, prior_mean):
    problem = layer(MAP(), n=5, inputs=2, outputs=3, rank=1)
    options = MonteCLoRA(
        component_prior=prior, prior_mean=prior_mean, sample_scale=0.7, num_components=2,
        units="one",
    )  # fmt: skip
    posterior = problem.fit(NUTS(inner=options, num_samples=250, warmup_steps=150))
    program = posterior.model.program
    sites = program.pick(torch.arange(program.stored()))
    expected, spread = reference(problem, options, 40_000)
    assert_draws_from(program.factors(sites).A.unflatten(0, (2, -1)).double(), expected)
    drawn = sites["mixture_weights"].square().sum(-1)
    if prior == "hierarchical":
        drawn = drawn * sites["covariance_tril"][..., 0, 0].square()
    assert standard_errors(drawn.unflatten(0, (2, -1)), torch.tensor([spread])).max() < 4.5


# Laplace -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", ["A", "B"])
def test_laplace_is_the_exact_posterior_of_one_factor_given_the_other(factor):
    problem = layer(MAP(prior_scale=PRIOR_SCALE, latent=factor))
    other = "B" if factor == "A" else "A"
    problem.joint.program.bank.get_parameter(f"{other}_loc").requires_grad_(False)
    expected = problem.posterior(factor, problem.prior(factor, PRIOR_SCALE))
    svi(problem, steps=500, rate=0.1, draws=1)
    guide = Laplace(prior_scale=PRIOR_SCALE, latent=factor)
    program = problem.fit(guide).model.program
    law = program.law(factor)
    torch.testing.assert_close(law.mean.double(), expected.mean, rtol=0, atol=2e-3)
    torch.testing.assert_close(dense_covariance(law), expected.covariance, rtol=1e-4, atol=1e-6)
    draws = program.draw(20_000)[factor].double()
    error = 5 * math.sqrt(2 / len(draws)) * expected.covariance.diagonal().max()
    assert (draws.T.cov() - expected.covariance).abs().max() < error


def dense_covariance(law) -> Tensor:
    """The covariance of a `KroneckerNormal` of one block, X = M + U (S * Z) Vᵀ row by row."""
    U, V = law.rows[0][0].double(), law.columns[0][0].double()
    root = torch.kron(U, V) * law.scale.detach().double()
    return root @ root.T


def test_marginal_likelihood_of_a_fixed_point_is_the_exact_evidence_at_its_own_precision():
    """∫ p(y|A) N(A; 0, I/λ) dA, from the law of y itself."""
    problem = layer(MAP(prior_scale=PRIOR_SCALE, latent="A"))
    problem.joint.program.bank.get_parameter("B_loc").requires_grad_(False)
    svi(problem, steps=500, rate=0.1, draws=1)
    program = problem.fit(Laplace(prior_scale=PRIOR_SCALE, latent="A")).model.program
    mean = problem.mean("A")
    at_mode = problem.log_likelihood("A", mean, torch.zeros(6, 6, dtype=torch.float64))
    found = log_marginal_likelihood(float(at_mode), *program.evidence(), PRIOR_SCALE**-2)
    # log p(y) = log p(y|A) + log p(A) − log p(A|y), for any A: here 0.
    prior = problem.prior("A", PRIOR_SCALE)
    exact = problem.posterior("A", prior)
    zero = torch.zeros_like(mean)
    at_zero = problem.log_likelihood("A", zero, torch.zeros(6, 6, dtype=torch.float64))
    laws = [MultivariateNormal(g.mean, precision_matrix=g.precision) for g in (prior, exact)]
    expected = at_zero + laws[0].log_prob(zero) - laws[1].log_prob(zero)
    assert found == pytest.approx(float(expected), abs=1e-3)


# Variational guides ------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", ["A", "B"])
def test_meanfield_converges_to_the_known_optimum(factor):
    """The mean of the exact posterior, and the variances 1 / Λ_ii of its precision Λ."""
    problem = layer(absolute(MeanField, kl_weight=1.0, prior_scale=PRIOR_SCALE, latent=factor))
    other = "B" if factor == "A" else "A"
    problem.joint.program.bank.get_parameter(f"{other}_loc").requires_grad_(False)
    svi(problem, steps=600, rate=0.1)
    exact = problem.posterior(factor, problem.prior(factor, PRIOR_SCALE))
    scale = problem.joint.program.param(f"{factor}_scale").detach().double()
    best = exact.precision.diagonal().rsqrt()
    assert ((problem.mean(factor) - exact.mean).abs() / best).max() < 0.05
    torch.testing.assert_close(scale, best, rtol=0.05, atol=0)
    marginal = exact.covariance.diagonal().sqrt()
    assert (marginal / best).max() > 1.1  # it is the factorised optimum, not the marginals


@pytest.mark.parametrize("factor", ["A", "B"])
def test_lowrank_with_enough_directions_converges_to_the_exact_posterior(factor):
    """Its covariance, not the factorised one: correlations of the exact one are up to 0.6."""
    options = {"kl_weight": 1.0, "prior_scale": PRIOR_SCALE, "latent": factor, "rank": 8}
    problem = layer(absolute(LowRank, **options))
    other = "B" if factor == "A" else "A"
    problem.joint.program.bank.get_parameter(f"{other}_loc").requires_grad_(False)
    svi(problem, steps=900, rate=0.2)
    exact = problem.posterior(factor, problem.prior(factor, PRIOR_SCALE))
    found = problem.joint.program.law(factor).covariance_matrix.detach().double()
    scale = exact.covariance.diagonal().sqrt()
    assert ((problem.mean(factor) - exact.mean).abs() / scale).max() < 0.05
    correlation = exact.covariance / torch.outer(scale, scale)
    assert (correlation - torch.eye(len(scale))).abs().max() > 0.3
    assert (found / torch.outer(scale, scale) - correlation).abs().max() < 0.05


def optimum(problem: Layer, options: MonteCLoRA) -> tuple[float, Tensor]:
    """The best ELBO of MonteCLoRA's guide given M and B, and its V, by direct optimisation."""
    rank = problem.joint.program.bank.layouts["A"].rank
    concentration = torch.zeros(options.num_components, dtype=torch.float64, requires_grad=True)
    entries = torch.zeros(rank, rank, dtype=torch.float64, requires_grad=True)

    def scale() -> Tensor:
        lower = entries.tril(-1) if options.covariance == "full" else torch.zeros_like(entries)
        return lower + entries.diagonal().exp().diag_embed()

    optimiser = torch.optim.LBFGS(
        [concentration, entries], max_iter=500, line_search_fn="strong_wolfe",
        tolerance_grad=1e-10, tolerance_change=1e-14,
    )  # fmt: skip

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = -elbo(problem, options, concentration.exp() * torch.tensor([1.0, 1.1, 0.9]), scale())
        loss.backward()
        return loss

    optimiser.step(closure)
    tril = scale().detach()
    return -closure().item(), tril @ tril.T


def elbo(problem: Layer, options: MonteCLoRA, alpha: Tensor, tril: Tensor) -> Tensor:
    """log p(y|M) − ½ tr(H Cov A) − KLs, with Cov a_j = ε² E‖π‖² V, in closed form."""
    df, rank = options.df_per_rank * len(tril), len(tril)
    V, total = tril @ tril.T, alpha.sum()
    squared = (alpha * (alpha + 1)).sum() / (total * (total + 1))
    mean = problem.mean("A")
    columns = len(mean) // rank
    covariance = torch.kron(
        options.sample_scale**2 * squared * V, torch.eye(columns, dtype=torch.float64)
    )
    kl = kl_divergence(Dirichlet(alpha), Dirichlet(torch.ones_like(alpha)))
    kl = kl + 0.5 * df * (V.trace() - rank - V.logdet())  # Wishart(ν, V/ν) from Wishart(ν, I/ν)
    if options.component_prior == "isotropic":
        halves = (df - torch.arange(rank, dtype=torch.float64)) / 2
        log_det = torch.digamma(halves).sum() + rank * math.log(2 / df) + V.logdet()
        kl = kl + columns * 0.5 * (V.trace() - rank - log_det)
    if options.prior_mean == "zero":
        kl = kl + 0.5 * mean @ prior_precision(problem, options, alpha, V) @ mean
    return problem.log_likelihood("A", mean, covariance) - kl


def prior_precision(problem: Layer, options: MonteCLoRA, alpha: Tensor, V: Tensor) -> Tensor:
    """E[(ε² ‖π‖² Σ)⁻¹] of all entries of A under the guide: E[Σ⁻¹] = ν V⁻¹ / (ν − r − 1) for
    Σ ~ Wishart(ν, V/ν), and E[‖π‖⁻²] from many draws of its Dirichlet."""
    df, rank = options.df_per_rank * len(V), len(V)
    inverse = Dirichlet(alpha).sample((200_000,)).square().sum(-1).reciprocal().mean()
    if options.component_prior == "hierarchical":
        per_column = df / (df - rank - 1) * torch.linalg.inv(V).contiguous()
    else:
        per_column = torch.eye(rank, dtype=torch.float64)
    columns = len(problem.mean("A")) // rank
    eye = torch.eye(columns, dtype=torch.float64)
    return inverse / options.sample_scale**2 * torch.kron(per_column, eye)


def found_by(problem: Layer) -> tuple[Tensor, Tensor]:
    """The guide's concentration and the factor of V."""
    program = problem.joint.program
    alpha, tril = program.param("concentration")[0], program._covariance().scale_tril[0]
    tril = tril * program.df**0.5
    return alpha.detach().double(), tril.detach().double()


MONTEC = [
    absolute(
        MonteCLoRA, component_prior=prior, covariance=covariance, sample_scale=0.5,
        num_components=3, kl_weight=1.0, prior_mean="learned", init_covariance=1.0,
    )
    for prior in ("isotropic", "hierarchical")
    for covariance in ("diagonal", "full")
]  # fmt: skip

AROUND_ZERO = [
    dataclasses.replace(o, prior_mean="zero", df_per_rank=8)
    for o in MONTEC
    if o.covariance == "full"
]


def montec_name(options: MonteCLoRA) -> str:
    around = "-zero" if options.prior_mean == "zero" else ""
    return f"{options.component_prior}-{options.covariance}{around}"


def montec_layer(options: MonteCLoRA) -> Layer:
    problem = layer(options, n=6)
    problem.joint.program.bank.requires_grad_(False)
    return problem


def perturb_scales(problem: Layer) -> None:
    program = problem.joint.program
    for name in program.scale_parameters():
        program.get_parameter(name).data.add_(0.3 * torch.randn(program.get_parameter(name).shape))


@pytest.mark.parametrize("options", [*MONTEC, *AROUND_ZERO], ids=montec_name)
def test_montec_estimates_its_bound(options):
    """The mean of draws of the bound, at random parameters, is the closed form."""
    problem = montec_layer(options)
    program = problem.joint.program
    perturb_scales(problem)
    estimator, guide = NamedELBO(), JointGuide(program)
    with torch.no_grad():
        losses = [estimator.loss(problem.joint, guide, problem.batch) for _ in range(300)]
    found = -torch.tensor(losses)
    expected = elbo(problem, options, *found_by(problem)).item()
    assert found.mean().item() == pytest.approx(expected, abs=4 * found.std().item() / 300**0.5)


@pytest.mark.parametrize("options", MONTEC, ids=montec_name)
def test_montec_converges_to_the_optimum_of_its_bound(options):
    problem = montec_layer(options)
    best, V = optimum(problem, options)
    start = float(elbo(problem, options, *found_by(problem)))
    svi(problem, steps=400, rate=0.1)
    alpha, tril = found_by(problem)
    reached = float(elbo(problem, options, alpha, tril))
    assert best - 0.02 < reached < best + 1e-6
    assert start < best - 0.5
    torch.testing.assert_close(tril @ tril.T, V, rtol=0.05, atol=0.02 * float(V.max()))


@pytest.mark.parametrize("options", AROUND_ZERO, ids=montec_name)
def test_the_means_of_montec_around_zero_converge_to_a_ridge_regression(options):
    """Given the guide's scales M is the posterior mean under N(0, P⁻¹), P the mean precision of the
    prior: it is shrunk, where a prior that moves with M would leave it at least squares."""
    problem = montec_layer(options)
    perturb_scales(problem)
    program = problem.joint.program
    for name in program.scale_parameters():
        program.get_parameter(name).requires_grad_(False)
    program.bank.get_parameter("A_loc").requires_grad_(True)
    alpha, tril = found_by(problem)
    precision = prior_precision(problem, options, alpha, tril @ tril.T)
    prior = Gaussian(torch.zeros(len(precision), dtype=torch.float64), precision)
    exact = problem.posterior("A", prior)
    spread = exact.covariance.diagonal().sqrt()
    H, h = problem.quadratic("A")
    assert ((torch.linalg.solve(H, h) - exact.mean).abs() / spread).max() > 1
    svi(problem, steps=400, rate=0.1)
    assert ((problem.mean("A") - exact.mean).abs() / spread).max() < 0.1
