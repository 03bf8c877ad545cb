"""`WishartCholesky`: density, moments and gradients against torch, scipy and Monte Carlo."""

from __future__ import annotations

import math

import pyro
import pytest
import scipy.stats
import torch
from pyro.infer import MCMC, NUTS
from torch.distributions import Wishart, biject_to, transform_to
from torch.func import jacrev

from pyrolora.distributions import VectorToLowerFactor, WishartCholesky

DRAWS = 200_000


def scale_tril(*batch: int, r: int) -> torch.Tensor:
    """A well-conditioned lower factor, in double precision so that densities compare closely."""
    below = 0.3 * torch.randn(*batch, r, r, dtype=torch.float64)
    return below.tril(-1) + torch.diag_embed(0.5 + torch.rand(*batch, r, dtype=torch.float64))


def gram(L: torch.Tensor) -> torch.Tensor:
    return L @ L.mT


def assert_within_error(samples: torch.Tensor, expected: torch.Tensor, sigmas: float = 5) -> None:
    """The mean over the first axis is within ``sigmas`` standard errors, entry by entry."""
    error = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - expected).abs() <= sigmas * error + 1e-12).all()


# A diagonal scale --------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_a_diagonal_scale_gives_the_law_of_its_matrix(batch):
    diag = 0.5 + torch.rand(*batch, 3, dtype=torch.float64)
    law, whole = WishartCholesky(6.0, scale_diag=diag), WishartCholesky(6.0, torch.diag_embed(diag))
    assert law.batch_shape == whole.batch_shape == batch
    assert law.event_shape == whole.event_shape
    drawn = []
    for one in (law, whole, law.expand((5, *batch))):
        torch.manual_seed(0)
        drawn.append(one.rsample() if one.batch_shape == batch else one.log_prob(drawn[0]))
    torch.testing.assert_close(drawn[0], drawn[1])
    torch.testing.assert_close(law.log_prob(drawn[0]), whole.log_prob(drawn[0]))
    torch.testing.assert_close(drawn[2], whole.log_prob(drawn[0]).expand(5, *batch))
    for name in ("mean", "variance", "wishart_mean", "scale_tril", "log_det_scale"):
        torch.testing.assert_close(getattr(law, name), getattr(whole, name))


@pytest.mark.parametrize("given", [{}, {"scale_tril": torch.eye(2), "scale_diag": torch.ones(2)}])
def test_the_scale_is_given_once(given):
    with pytest.raises(ValueError, match="one of scale_tril and scale_diag"):
        WishartCholesky(6.0, **given)


def test_a_diagonal_scale_that_is_not_positive_raises():
    with pytest.raises(ValueError, match="scale_tril"):
        WishartCholesky(6.0, scale_diag=torch.tensor([1.0, -1.0]), validate_args=True)


# Density ---------------------------------------------------------------------------------------


# Torch's Wishart warns that its own sampler may fail there; this test draws nothing from it.
@pytest.mark.filterwarnings("ignore:Low df values detected:UserWarning")
@pytest.mark.parametrize(("r", "df"), [(1, 0.5), (1, 3.0), (2, 2.0), (3, 2.5), (4, 16.0), (8, 8.0)])
def test_log_prob_is_the_wisharts_plus_the_log_jacobian_of_the_gram_matrix(r, df):
    S = scale_tril(r=r)
    L = scale_tril(5, r=r)
    powers = torch.arange(r, 0, -1, dtype=torch.float64)
    log_jacobian = r * math.log(2) + (powers * L.diagonal(dim1=-2, dim2=-1).log()).sum(-1)
    # A Gram matrix is symmetric up to rounding only, which torch's own validation refuses.
    wishart = Wishart(torch.tensor(df).double(), scale_tril=S, validate_args=False)

    actual = WishartCholesky(df, S).log_prob(L)

    torch.testing.assert_close(actual, wishart.log_prob(gram(L)) + log_jacobian)


def test_log_jacobian_of_the_gram_matrix_is_the_one_that_autograd_finds():
    """The Jacobian that the density test adds is itself derived from nothing of ours."""
    r = 3
    L = scale_tril(r=r)
    row, column = torch.tril_indices(r, r)

    def lower_half(entries: torch.Tensor) -> torch.Tensor:
        return gram(entries.new_zeros(r, r).index_put((row, column), entries))[row, column]

    expected = torch.linalg.slogdet(jacrev(lower_half)(L[row, column])).logabsdet
    powers = torch.arange(r, 0, -1, dtype=torch.float64)
    torch.testing.assert_close(r * math.log(2) + (powers * L.diagonal().log()).sum(), expected)


def test_log_prob_agrees_with_scipys_wishart():
    r, df = 3, 5.5
    S, L = scale_tril(r=r), scale_tril(r=r)
    powers = torch.arange(r, 0, -1, dtype=torch.float64)
    log_jacobian = r * math.log(2) + (powers * L.diagonal().log()).sum()
    expected = scipy.stats.wishart(df, gram(S).numpy()).logpdf(gram(L).numpy()) + log_jacobian
    torch.testing.assert_close(WishartCholesky(df, S).log_prob(L), expected)


def test_log_prob_of_rank_one_is_the_density_of_a_scaled_chi():
    df, s, x = 3.7, 0.6, 1.1
    law = WishartCholesky(df, torch.tensor([[s]], dtype=torch.float64))
    actual = law.log_prob(torch.tensor([[x]], dtype=torch.float64))
    assert actual.item() == pytest.approx(scipy.stats.chi(df, scale=s).logpdf(x), abs=1e-12)


# Moments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("r", "df"), [(1, 1.5), (2, 1.3), (3, 3.0), (4, 9.25)])
def test_gram_of_a_draw_has_the_mean_and_variance_of_scipys_wishart(r, df):
    S = scale_tril(r=r)
    law = WishartCholesky(df, S)
    draws = gram(law.sample((DRAWS,)))
    assert_within_error(draws, law.wishart_mean)
    torch.testing.assert_close(law.wishart_mean, df * gram(S))
    reference = scipy.stats.wishart(df, gram(S).numpy())
    variance = torch.as_tensor(reference.var()).reshape(r, r)
    assert_within_error((draws - law.wishart_mean).square(), variance)


@pytest.mark.parametrize(("r", "df"), [(1, 0.7), (2, 2.0), (3, 2.4), (4, 16.0)])
def test_mean_and_variance_are_those_of_the_drawn_factors(r, df):
    law = WishartCholesky(df, scale_tril(r=r))
    draws = law.sample((DRAWS,))
    assert_within_error(draws, law.mean)
    assert_within_error((draws - law.mean).square(), law.variance)


def test_diagonal_of_a_draw_at_unit_scale_is_chi_distributed_with_falling_degrees():
    """Bartlett: T_ii ~ chi(df - i + 1), for a df that is no whole number."""
    draws = WishartCholesky(4.3, torch.eye(3, dtype=torch.float64)).sample((4000,))
    for i in range(3):
        test = scipy.stats.kstest(draws[:, i, i].numpy(), scipy.stats.chi(4.3 - i).cdf)
        assert test.pvalue > 1e-3
    for i, j in [(1, 0), (2, 0), (2, 1)]:
        assert scipy.stats.kstest(draws[:, i, j].numpy(), "norm").pvalue > 1e-3


def test_draws_are_lower_factors():
    draws = WishartCholesky(2.1, torch.eye(3)).sample((1000,))
    assert (draws.triu(1) == 0).all()
    assert (draws.diagonal(dim1=-2, dim2=-1) > 0).all()


def test_draws_stay_positive_where_the_chi_underflows():
    """df just above r - 1: most draws of Gamma(5e-4) are below the smallest float32."""
    draws = WishartCholesky(1.001, torch.eye(2)).sample((2000,))
    assert (draws.diagonal(dim1=-2, dim2=-1) > 0).all()
    assert draws.isfinite().all()


# Shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("df_shape", "scale_batch", "batch"),
    [((), (), ()), ((), (3,), (3,)), ((3,), (), (3,)), ((2, 1), (3,), (2, 3))],
)
def test_df_and_scale_broadcast_to_one_batch_shape(df_shape, scale_batch, batch):
    df = 3 + torch.rand(df_shape, dtype=torch.float64)
    S = scale_tril(*scale_batch, r=3)
    law = WishartCholesky(df, S)
    draw = law.rsample((5,))

    assert law.batch_shape == batch
    assert law.event_shape == (3, 3)
    assert draw.shape == (5, *batch, 3, 3)
    assert law.mean.shape == law.variance.shape == law.wishart_mean.shape == (*batch, 3, 3)
    # Element by element, the batch is so many laws of one matrix.
    dfs = df.expand(batch).reshape(-1)
    scales = S.expand(*batch, 3, 3).reshape(-1, 3, 3)
    single = [
        WishartCholesky(d, s).log_prob(x)
        for d, s, x in zip(dfs, scales, draw.reshape(5, -1, 3, 3).unbind(1), strict=True)
    ]
    torch.testing.assert_close(law.log_prob(draw).reshape(5, -1), torch.stack(single, 1))


def test_expand_gives_independent_copies_of_the_same_law():
    law = WishartCholesky(4.5, scale_tril(2, r=3))
    wide = law.expand((4, 2))
    draw = wide.rsample()

    assert type(wide) is WishartCholesky
    assert wide.batch_shape == (4, 2)
    assert draw.shape == (4, 2, 3, 3)
    assert not torch.equal(draw[0], draw[1])
    torch.testing.assert_close(wide.log_prob(draw), law.log_prob(draw))
    torch.testing.assert_close(wide.mean, law.mean.expand(4, 2, 3, 3))


def test_draws_keep_dtype_of_the_scale():
    assert WishartCholesky(3.0, torch.eye(2)).sample().dtype == torch.float32
    assert WishartCholesky(3.0, torch.eye(2).double()).sample().dtype == torch.float64


# Gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("r", "df"), [(1, 1.2), (3, 2.3), (3, 12.0)])
def test_pathwise_gradient_in_df_estimates_the_derivative_of_the_expected_trace(r, df):
    """d/dν E tr(L Lᵀ) = d/dν ν ‖S‖² = ‖S‖²."""
    S = scale_tril(r=r)
    nu = torch.full((DRAWS,), df, dtype=torch.float64, requires_grad=True)
    WishartCholesky(nu, S).rsample().square().sum().backward()
    assert_within_error(nu.grad, S.square().sum())


def test_pathwise_gradient_in_df_estimates_the_derivative_of_the_expected_log_determinant():
    """d/dν E log|L Lᵀ| = ½ Σ_i ψ'((ν - i + 1) / 2)."""
    nu = torch.full((DRAWS,), 4.3, dtype=torch.float64, requires_grad=True)
    L = WishartCholesky(nu, scale_tril(r=3)).rsample()
    (2 * L.diagonal(dim1=-2, dim2=-1).log()).sum().backward()
    halves = torch.tensor([4.3, 3.3, 2.3], dtype=torch.float64) / 2
    assert_within_error(nu.grad, 0.5 * torch.polygamma(1, halves).sum())


def test_pathwise_gradient_in_the_scale_is_exact_for_the_same_random_numbers():
    S = scale_tril(r=3).requires_grad_()

    def draw(scale: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return WishartCholesky(5.0, scale, validate_args=False).rsample()

    assert torch.autograd.gradcheck(draw, S)


def test_log_prob_gradients_in_value_df_and_scale_agree_with_finite_differences():
    lower = torch.ones(3, 3, dtype=torch.float64).tril()
    df = torch.tensor([4.5], dtype=torch.float64, requires_grad=True)
    S, L = scale_tril(r=3).requires_grad_(), scale_tril(r=3).requires_grad_()

    def log_prob(df: torch.Tensor, S: torch.Tensor, L: torch.Tensor) -> torch.Tensor:
        return WishartCholesky(df, S * lower, validate_args=False).log_prob(L * lower)

    assert torch.autograd.gradcheck(log_prob, (df, S, L))


# The bijection ---------------------------------------------------------------------------------


@pytest.mark.parametrize("registry", [biject_to, transform_to])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
@pytest.mark.parametrize("r", [1, 2, 5])
def test_vectors_and_lower_factors_map_onto_each_other(registry, batch, r):
    transform = registry(WishartCholesky(r + 1.0, torch.eye(r)).support)
    x = torch.randn(*batch, r * (r + 1) // 2, dtype=torch.float64)
    L = transform(x)

    assert L.shape == (*batch, r, r) == transform.forward_shape(x.shape)
    assert transform.inverse_shape(L.shape) == x.shape
    assert transform.codomain.check(L).all()
    torch.testing.assert_close(transform.inv(L), x)
    factor = scale_tril(*batch, r=r)
    torch.testing.assert_close(transform(transform.inv(factor)), factor)


@pytest.mark.parametrize("r", [1, 2, 4])
def test_log_abs_det_jacobian_is_autograds(r):
    transform = VectorToLowerFactor()
    row, column = torch.tril_indices(r, r)
    x = torch.randn(6, r * (r + 1) // 2, dtype=torch.float64)
    expected = [
        torch.linalg.slogdet(jacrev(lambda v: transform(v)[row, column])(one)).logabsdet
        for one in x
    ]
    actual = transform.log_abs_det_jacobian(x, transform(x))
    assert actual.shape == (6,)
    torch.testing.assert_close(actual, torch.stack(expected))


# Validation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("df", [2.0, 1.0, -1.0])
def test_degrees_of_freedom_up_to_r_minus_one_raise(df):
    with pytest.raises(ValueError, match="df"):
        WishartCholesky(df, torch.eye(3), validate_args=True)


def test_one_bad_df_of_a_batch_raises_and_the_message_names_it():
    with pytest.raises(ValueError, match=r"df > r - 1 = 2, got 1\.5"):
        WishartCholesky(torch.tensor([4.0, 1.5]), torch.eye(3), validate_args=True)


@pytest.mark.parametrize(
    "scale",
    [
        pytest.param(torch.tensor([[1.0, 0.5], [0.0, 1.0]]), id="upper"),
        pytest.param(torch.tensor([[1.0, 0.5], [0.5, 1.0]]), id="symmetric"),
        pytest.param(torch.tensor([[1.0, 0.0], [0.5, -1.0]]), id="negative-diagonal"),
        pytest.param(torch.tensor([[1.0, 0.0], [0.5, float("nan")]]), id="nan"),
    ],
)
def test_a_scale_that_is_no_lower_factor_raises(scale):
    with pytest.raises(ValueError, match="scale_tril"):
        WishartCholesky(3.0, scale, validate_args=True)


@pytest.mark.parametrize("value", [torch.ones(2, 2), -torch.eye(2)])
def test_log_prob_refuses_values_that_are_no_lower_factors(value):
    with pytest.raises(ValueError, match="support"):
        WishartCholesky(3.0, torch.eye(2), validate_args=True).log_prob(value)


# Pyro ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["to_event", "plate"])
def test_nuts_on_a_batched_site_recovers_the_mean_of_the_gram_matrices(batching):
    """Tolerance: a Wishart diagonal entry has standard deviation mean * sqrt(2 / ν) = 0.5 mean;
    with some 150 effective draws of 300, 0.17 mean is four standard errors."""
    df = torch.tensor([8.0, 8.0])
    S = torch.tensor([[[1.0, 0.0], [0.4, 0.8]], [[0.5, 0.0], [-0.3, 1.2]]])
    expected = df[:, None, None] * gram(S)

    def model():
        if batching == "plate":
            with pyro.plate("layers", 2):
                pyro.sample("L", WishartCholesky(df, S))
        else:
            pyro.sample("L", WishartCholesky(df, S).to_event(1))

    pyro.set_rng_seed(0)
    sampler = MCMC(NUTS(model), num_samples=300, warmup_steps=100, disable_progbar=True)
    sampler.run()
    draws = sampler.get_samples()["L"]

    assert draws.shape == (300, 2, 2, 2)
    assert (draws[..., 0, 1] == 0).all()
    size = expected.diagonal(dim1=-2, dim2=-1)
    tolerance = 0.17 * (size.unsqueeze(-1) * size.unsqueeze(-2)).sqrt()
    assert ((gram(draws).mean(0) - expected).abs() <= tolerance).all()
