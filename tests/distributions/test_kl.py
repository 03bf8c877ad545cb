"""Closed-form divergences against Monte Carlo and against independent closed forms."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import (
    LowRankMultivariateNormal,
    MultivariateNormal,
    Wishart,
    kl_divergence,
)

from pyrolora.distributions import BlockGroup, ColumnNormal, StandardColumns, WishartCholesky

DRAWS = 100_000
GROUPS = [BlockGroup(2, 3, 4), BlockGroup(1, 1, 6), BlockGroup(2, 2, 2)]


def lower_factors(*shape):
    *batch, r = shape
    below = 0.3 * torch.randn(*batch, r, r, dtype=torch.float64)
    on = 0.7 + 0.6 * torch.rand(*batch, r, dtype=torch.float64)
    return below.tril(-1) + torch.diag_embed(on)


def means(*batch):
    """Means of all columns of `GROUPS`, flat."""
    return torch.randn(*batch, sum(group.total for group in GROUPS), dtype=torch.float64)


def assert_is_monte_carlo_kl(p, q, draws=DRAWS):
    """The closed form is within five standard errors of the mean log ratio under p."""
    x = p.sample((draws,))
    ratio = p.log_prob(x) - q.log_prob(x)
    error = ratio.std(0) / math.sqrt(draws)
    exact = kl_divergence(p, q)
    assert exact.shape == p.batch_shape
    assert ((ratio.mean(0) - exact).abs() <= 5 * error).all()
    # The comparison would be empty, were the error as large as the divergence.
    assert (error < 0.05 * exact).all()


# Wishart ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nu_p", "nu_q"), [(6.0, 6.0), (6.5, 4.2), (3.4, 9.0)], ids=["same", "lower", "higher"]
)
def test_wishart_kl_is_the_monte_carlo_mean_of_the_log_ratio(nu_p, nu_q):
    p = WishartCholesky(nu_p, lower_factors(2, 3))
    q = WishartCholesky(nu_q, lower_factors(2, 3))
    assert_is_monte_carlo_kl(p, q)


@pytest.mark.parametrize(("nu_p", "nu_q"), [(6.0, 6.0), (6.5, 4.2), (3.4, 9.0)])
def test_wishart_kl_is_minus_entropy_plus_cross_entropy_of_torchs_wisharts(nu_p, nu_q):
    """The cross entropy -E_p log q(Σ) needs E log|Σ| and E Σ only; the entropy is torch's."""
    r = 3
    Sp, Sq = lower_factors(r), lower_factors(r)
    Vp, Vq = Sp @ Sp.mT, Sq @ Sq.mT
    i = torch.arange(r, dtype=torch.float64)
    mean_log_det = torch.digamma((nu_p - i) / 2).sum() + r * math.log(2) + Vp.logdet()
    mean_log_q = (
        (nu_q - r - 1) / 2 * mean_log_det
        - nu_p / 2 * torch.trace(torch.linalg.inv(Vq) @ Vp)
        - nu_q * r / 2 * math.log(2)
        - nu_q / 2 * Vq.logdet()
        - torch.mvlgamma(torch.tensor(nu_q / 2).double(), r)
    )
    entropy = Wishart(torch.tensor(nu_p).double(), scale_tril=Sp).entropy()

    actual = kl_divergence(WishartCholesky(nu_p, Sp), WishartCholesky(nu_q, Sq))

    torch.testing.assert_close(actual, -entropy - mean_log_q)


def test_wishart_kl_of_equal_df_is_half_df_times_the_stein_loss():
    """ν/2 [tr(V₀⁻¹ V) - r - log|V₀⁻¹ V|], for the mean-normalised V/ν and V₀/ν as well."""
    nu, r = 12.0, 4
    S, S0 = lower_factors(r), lower_factors(r)
    ratio = torch.linalg.inv(S0 @ S0.mT) @ (S @ S.mT)
    expected = nu / 2 * (ratio.trace() - r - ratio.logdet())
    for scale in (1.0, nu**-0.5):
        p, q = WishartCholesky(nu, scale * S), WishartCholesky(nu, scale * S0)
        torch.testing.assert_close(kl_divergence(p, q), expected)


def test_wishart_kl_ignores_padded_dimensions_at_unit_scale_and_equal_df():
    """What differing ranks rely on: dimensions with V = V₀ = I beyond the rank cost nothing."""
    nu, S = 16.0, lower_factors(3)
    padded = torch.eye(5, dtype=torch.float64)
    padded[:3, :3] = S
    eye = torch.eye(5, dtype=torch.float64)
    small = kl_divergence(WishartCholesky(nu, S), WishartCholesky(nu, eye[:3, :3]))
    large = kl_divergence(WishartCholesky(nu, padded), WishartCholesky(nu, eye))
    torch.testing.assert_close(large, small)


# Column normals --------------------------------------------------------------------------------


def test_column_normal_kl_is_the_monte_carlo_mean_of_the_log_ratio():
    p = ColumnNormal(lower_factors(2, 5, 3), GROUPS)
    q = ColumnNormal(lower_factors(2, 5, 3), GROUPS)
    assert_is_monte_carlo_kl(p, q)


@pytest.mark.parametrize("located", ["neither", "p", "q", "both"])
def test_column_normal_kl_is_one_multivariate_normal_kl_a_column(located):
    Sp, Sq, zero = lower_factors(5, 3), lower_factors(5, 3), torch.zeros_like(means())
    mp, mq = (means() if located in (name, "both") else zero for name in "pq")
    expected, start = torch.zeros((), dtype=torch.float64), 0
    for index, group in enumerate(g for g in GROUPS for _ in range(g.count)):
        end = start + group.rank * group.columns
        p, q = (
            MultivariateNormal(
                m[start:end].reshape(group.rank, group.columns).mT,
                (S[index] @ S[index].mT)[: group.rank, : group.rank],
            )
            for m, S in ((mp, Sp), (mq, Sq))
        )
        expected = expected + kl_divergence(p, q).sum()
        start = end
    p, q = (ColumnNormal(S, GROUPS, None if m is zero else m) for m, S in ((mp, Sp), (mq, Sq)))
    torch.testing.assert_close(kl_divergence(p, q), expected)


def test_column_normal_kl_to_a_prior_with_one_mean_a_draw():
    """What MonteCLoRA's plate of draws asks for: the scales are shared, and one mean is none."""
    p, scale, loc = ColumnNormal(lower_factors(5, 3), GROUPS), lower_factors(5, 3), means(4, 1)
    actual = kl_divergence(p, ColumnNormal(scale, GROUPS, loc))
    alone = [kl_divergence(p, ColumnNormal(scale, GROUPS, m)) for m in loc[:, 0]]
    torch.testing.assert_close(actual, torch.stack(alone).unsqueeze(-1))
    assert torch.stack(alone).unique().numel() == 4


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("located", ["neither", "p", "q", "both"])
@pytest.mark.parametrize("guide", ["general", "standard"])
def test_kl_of_standard_columns_is_that_of_columns_with_s_equal_to_i(guide, located, batch):
    like, eye = means(), torch.eye(3, dtype=torch.float64).expand(*batch, 5, 3, 3)
    mp, mq = (means(*batch) if located in (name, "both") else None for name in "pq")
    if guide == "general":
        S = lower_factors(*batch, 5, 3)
        p = reference = ColumnNormal(S, GROUPS, mp)
    else:
        p, reference = (
            StandardColumns(like, GROUPS, mp).expand(batch),
            ColumnNormal(eye, GROUPS, mp),
        )
    q = StandardColumns(like, GROUPS, mq).expand(batch)
    actual = kl_divergence(p, q)
    assert actual.shape == batch
    torch.testing.assert_close(actual, kl_divergence(reference, ColumnNormal(eye, GROUPS, mq)))


@pytest.mark.parametrize("diagonal", ["p", "q", "both"])
@pytest.mark.parametrize("nu_q", [6.0, 9.5])
def test_wishart_kl_of_a_diagonal_scale_is_that_of_its_matrix(diagonal, nu_q):
    def law(nu, name):
        S = lower_factors(2, 3)
        if diagonal not in (name, "both"):
            return WishartCholesky(nu, S), WishartCholesky(nu, S)
        diag = S.diagonal(dim1=-2, dim2=-1)
        return WishartCholesky(nu, scale_diag=diag), WishartCholesky(nu, torch.diag_embed(diag))

    (p, p_whole), (q, q_whole) = law(6.0, "p"), law(nu_q, "q")
    torch.testing.assert_close(kl_divergence(p, q), kl_divergence(p_whole, q_whole))


def test_kl_of_point_masses_is_zero_at_the_same_point_and_infinite_elsewhere():
    point = torch.tensor([1.0, -2.0])
    p = dist.Delta(point, event_dim=1)
    same, copy, other = (
        dist.Delta(v, event_dim=1) for v in (point.view(2), point.clone(), point + 1)
    )
    assert kl_divergence(p, same) == kl_divergence(p, copy) == 0
    assert kl_divergence(p, other) == math.inf
    denser = dist.Delta(point, log_density=0.5, event_dim=1)
    assert kl_divergence(denser, p) == kl_divergence(denser, dist.Delta(point.clone(), event_dim=1))
    assert kl_divergence(denser, p) == 0.5
    # Views of one storage are the same numbers only where they lie alike.
    square = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert kl_divergence(dist.Delta(square), dist.Delta(square.mT))[0, 1] == math.inf


# All -------------------------------------------------------------------------------------------


def pairs(batch):
    yield (
        WishartCholesky(4.5, lower_factors(*batch, 3)),
        WishartCholesky(5.5, lower_factors(*batch, 3)),
    )
    yield (
        ColumnNormal(lower_factors(*batch, 5, 3), GROUPS),
        ColumnNormal(lower_factors(*batch, 5, 3), GROUPS),
    )
    yield (
        ColumnNormal(lower_factors(*batch, 5, 3), GROUPS, means(*batch)),
        ColumnNormal(lower_factors(*batch, 5, 3), GROUPS, means(*batch)),
    )


KINDS = pytest.mark.parametrize("index", [0, 1, 2], ids=["wishart", "columns", "located columns"])


@pytest.mark.parametrize("batch", [(), (1,), (4,), (2, 3)])
@KINDS
def test_kl_has_exactly_the_batch_shape_and_is_positive(batch, index):
    p, q = list(pairs(batch))[index]
    assert kl_divergence(p, q).shape == batch
    assert (kl_divergence(p, q) > 0).all()


@KINDS
def test_kl_under_to_event_sums_the_batch(index):
    p, q = list(pairs((2, 3)))[index]
    actual = kl_divergence(p.to_event(1), q.to_event(1))
    torch.testing.assert_close(actual, kl_divergence(p, q).sum(-1))


@KINDS
def test_kl_to_an_unbatched_prior_is_that_to_its_expansion(index):
    """A guide batched over layers against one prior for all of them."""
    p = list(pairs((4,)))[index][0]
    q = list(pairs(()))[index][1]
    actual = kl_divergence(p, q)
    assert actual.shape == (4,)
    torch.testing.assert_close(actual, kl_divergence(p, q.expand((4,))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_kl_of_equal_laws_is_exactly_zero_at_unit_scale(batch, dtype):
    """The collapsed start of a guide at its prior costs exactly nothing."""
    eye = torch.eye(8, dtype=dtype).expand(*batch, 8, 8)
    diag = eye.diagonal(dim1=-2, dim2=-1)
    prior = WishartCholesky(32.0, scale_diag=diag / math.sqrt(32.0))
    groups = [BlockGroup(1, 8, 3)]
    columns = ColumnNormal(eye.unsqueeze(-3), groups)
    for guide in (prior, WishartCholesky(32.0, eye / math.sqrt(32.0))):
        assert (kl_divergence(guide, prior) == 0).all()
    for law in (columns, StandardColumns(eye, groups)):
        assert (kl_divergence(columns, law) == 0).all()


@KINDS
def test_kl_of_equal_laws_is_zero_up_to_the_rounding_of_the_solve(index):
    """S⁻¹ S of a general S is the identity to a few ulps (2e-16) in each of at most 45 entries."""
    p = list(pairs((3,)))[index][0]
    assert (kl_divergence(p, p).abs() < 1e-12).all()


def test_wishart_kl_gradient_agrees_with_finite_differences():
    q = WishartCholesky(5.5, lower_factors(3))
    Sp = lower_factors(3).requires_grad_()
    nu = torch.tensor(4.5, dtype=torch.float64, requires_grad=True)

    def kl(S, nu):
        return kl_divergence(WishartCholesky(nu, S.tril(), validate_args=False), q)

    assert torch.autograd.gradcheck(kl, (Sp, nu))


@pytest.mark.parametrize("located", [False, True])
def test_column_normal_kl_gradient_agrees_with_finite_differences(located):
    """In both scales and, where there are any, both means."""
    scales = [lower_factors(5, 3).requires_grad_() for _ in range(2)]
    locs = [means().requires_grad_() for _ in range(2 * located)]

    def kl(Sp, Sq, mp=None, mq=None):
        p, q = (
            ColumnNormal(S.tril(), GROUPS, m, validate_args=False) for S, m in ((Sp, mp), (Sq, mq))
        )
        return kl_divergence(p, q)

    assert torch.autograd.gradcheck(kl, (*scales, *locs))


def test_column_normal_kl_has_gradients_after_a_first_use_in_inference_mode():
    groups = [BlockGroup(1, 2, 13)]  # a shape that no other test uses
    S = lower_factors(1, 2)
    q = ColumnNormal(lower_factors(1, 2), groups)
    with torch.inference_mode():
        kl_divergence(ColumnNormal(S, groups), q)
    S.requires_grad_()
    kl_divergence(ColumnNormal(S, groups), q).backward()
    assert S.grad.isfinite().all()


# The mixture weights ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("posterior", "prior"),
    [
        pytest.param([1.0] * 8, [0.1] * 8, id="paper"),
        pytest.param([0.5, 2.0, 1.0, 0.7, 3.0, 0.9, 1.2, 0.4], [0.1] * 8, id="paper-learned"),
        pytest.param([3.0, 0.8, 1.5, 2.0], [1.0] * 4, id="default"),
    ],
)
def test_dirichlet_kl_is_the_monte_carlo_mean_of_the_log_ratio(posterior, prior):
    """Also for the paper's N = 8 components under the sparse prior 0.1."""
    p = dist.Dirichlet(torch.tensor(posterior, dtype=torch.float64))
    q = dist.Dirichlet(torch.tensor(prior, dtype=torch.float64))
    assert_is_monte_carlo_kl(p, q)


# The two costs of the isotropic prior ----------------------------------------------------------


@pytest.mark.parametrize(("nu", "cost"), [(8, 4.6), (16, 1.4), (64, 0.3)])
def test_isotropic_prior_costs_so_many_nats_a_column_at_unit_scale(nu, cost):
    """E over Σ ~ Wishart(ν, I/ν) of KL(N(0, Σ) || N(0, I)), r = 8, to the digit that is quoted:
    4.6 nats for ν = r, 1.4 for 2 r, 0.3 for 8 r."""
    r, columns, draws = 8, 3, 20_000
    eye = torch.eye(r, dtype=torch.float64)
    L = WishartCholesky(float(nu), eye / math.sqrt(nu)).sample((draws,))
    groups = [BlockGroup(1, r, columns)]
    kl = kl_divergence(
        ColumnNormal(L.unsqueeze(-3), groups),
        ColumnNormal(eye.expand(draws, 1, r, r), groups),
    )
    per_column = kl / columns
    i = torch.arange(r, dtype=torch.float64)
    exact = -0.5 * (torch.digamma((nu - i) / 2) + math.log(2 / nu)).sum()

    assert per_column.shape == (draws,)
    error = per_column.std() / math.sqrt(draws)
    assert (per_column.mean() - exact).abs() <= 5 * error
    assert per_column.mean().item() == pytest.approx(cost, abs=0.05 + 5 * error.item())


# Low-rank normals --------------------------------------------------------------------------------


def low_rank(n=9, rank=3, *batch):
    factor = 0.5 * torch.randn(*batch, n, rank, dtype=torch.float64)
    diagonal = 0.2 + torch.rand(*batch, n, dtype=torch.float64)
    return torch.randn(*batch, n, dtype=torch.float64), factor, diagonal


@pytest.mark.parametrize("batch", [(), (2, 1)], ids=str)
def test_low_rank_kl_is_that_of_the_dense_normals(batch):
    loc, factor, diagonal = low_rank(9, 3, *batch)
    p = LowRankMultivariateNormal(loc, factor, diagonal)
    q = dist.Normal(torch.randn(9).double(), 0.5 + torch.rand(9).double()).to_event(1)
    dense = MultivariateNormal(q.mean, q.variance.diag())
    expected = kl_divergence(MultivariateNormal(loc, p.covariance_matrix), dense)
    torch.testing.assert_close(kl_divergence(p, q), expected)
    assert expected.min() > 1


def test_low_rank_kl_of_pyros_law_in_single_precision_and_many_dimensions():
    """Of 200,000 entries: within 0.2 nats of double precision, of 650,000."""
    loc, factor, diagonal = low_rank(200_000, 8)
    found = []
    for dtype in (torch.float64, torch.float32):
        parts = [t.to(dtype) for t in (loc, 0.1 * factor, diagonal)]
        q = dist.Normal(torch.zeros(200_000, dtype=dtype), 0.2).to_event(1)
        found.append(kl_divergence(dist.LowRankMultivariateNormal(*parts), q).item())
    assert found[1] == pytest.approx(found[0], abs=0.2 * max(1, found[0] / 650_000))
