"""`KroneckerNormal` against torch's dense multivariate normal, and its KL against Monte Carlo."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from pyrolora.distributions import BlockGroup, KroneckerNormal

GROUPS = {
    "one": [BlockGroup(1, 2, 3)],
    "equal": [BlockGroup(3, 2, 4)],
    "shapes": [BlockGroup(2, 3, 2), BlockGroup(1, 1, 4), BlockGroup(1, 2, 1)],
}
DRAWS = 50_000


@pytest.fixture(params=GROUPS.values(), ids=GROUPS.keys())
def groups(request):
    return request.param


def rotations(count, side):
    return torch.linalg.qr(torch.randn(count, side, side, dtype=torch.float64)).Q


def law_of(groups, *batch):
    total = sum(g.total for g in groups)
    return KroneckerNormal(
        torch.randn(*batch, total, dtype=torch.float64),
        0.3 + torch.rand(*batch, total, dtype=torch.float64),
        [rotations(g.count, g.rank) for g in groups],
        [rotations(g.count, g.columns) for g in groups],
        groups,
    )


def covariance(law):
    """(U ⊗ V) diag(S²) (U ⊗ V)ᵀ, matrix by matrix; of a law without batch shape."""
    blocks, start = [], 0
    for group, rows, columns in zip(law.groups, law.rows, law.columns, strict=True):
        for U, V in zip(rows, columns, strict=True):
            size = group.rank * group.columns
            W = torch.kron(U, V)
            blocks.append(W @ torch.diag(law.scale[start : start + size] ** 2) @ W.T)
            start += size
    return torch.block_diag(*blocks)


def dense(law):
    return MultivariateNormal(law.loc, covariance(law))


def test_log_prob_and_moments_are_those_of_the_dense_normal(groups):
    law = law_of(groups)
    value = torch.randn(5, 2, *law.event_shape, dtype=torch.float64)
    torch.testing.assert_close(law.log_prob(value), dense(law).log_prob(value))
    torch.testing.assert_close(law.mean, law.loc)
    torch.testing.assert_close(law.variance, covariance(law).diagonal())


def test_each_law_of_a_batch_is_its_own(groups):
    law = law_of(groups, 3)
    value = torch.randn(3, *law.event_shape, dtype=torch.float64)
    for i in range(3):
        one = KroneckerNormal(law.loc[i], law.scale[i], law.rows, law.columns, groups)
        torch.testing.assert_close(law.log_prob(value)[i], one.log_prob(value[i]))
        torch.testing.assert_close(law.variance[i], one.variance)
    assert law.rsample((4,)).shape == (4, 3, *law.event_shape)


def test_moments_of_draws_are_those_of_the_law(groups):
    """An entry of a covariance of n draws has standard error at most sqrt(2 v_i v_j / n)."""
    law = law_of(groups)
    draws = law.sample((DRAWS,))
    expected = covariance(law)
    sd = expected.diagonal().sqrt()
    tolerance = 5 * math.sqrt(2 / DRAWS) * sd[:, None] * sd[None, :]
    assert ((draws.T.cov() - expected).abs() <= tolerance).all()
    assert ((draws.mean(0) - law.loc).abs() <= 5 * sd / math.sqrt(DRAWS)).all()
    # It would also hold for independent entries, were the covariances within the tolerance of 0.
    assert (expected.abs() > tolerance).sum() > len(sd)


def test_it_is_the_posterior_of_a_kronecker_curvature_and_an_isotropic_prior():
    rows, columns = (torch.randn(k, 9, dtype=torch.float64) for k in (2, 3))
    rows, columns, precision = rows @ rows.T, columns @ columns.T, 0.7
    (rho, U), (kappa, V) = torch.linalg.eigh(rows), torch.linalg.eigh(columns)
    scale = (torch.outer(rho, kappa) + precision).rsqrt().flatten()
    law = KroneckerNormal(
        torch.zeros_like(scale), scale, [U[None]], [V[None]], [BlockGroup(1, 2, 3)]
    )
    expected = torch.kron(rows, columns) + precision * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(covariance(law).inverse(), expected)


def test_gradients_of_draws_and_density_agree_with_finite_differences():
    groups = GROUPS["shapes"]
    law = law_of(groups)
    value = torch.randn(law.event_shape, dtype=torch.float64)

    def both(loc, scale):
        torch.manual_seed(1)
        own = KroneckerNormal(loc, scale, law.rows, law.columns, groups, validate_args=False)
        return own.rsample(), own.log_prob(value)

    assert torch.autograd.gradcheck(both, (law.loc.requires_grad_(), law.scale.requires_grad_()))


def test_expand_gives_independent_copies_of_the_same_law(groups):
    law = law_of(groups, 2)
    wide = law.expand((3, 2))
    draw = wide.rsample()
    assert type(wide) is KroneckerNormal
    assert wide.batch_shape == (3, 2)
    assert draw.shape == (3, 2, *law.event_shape)
    assert not torch.equal(draw[0], draw[1])
    torch.testing.assert_close(wide.log_prob(draw), law.log_prob(draw))
    torch.testing.assert_close(wide.variance, law.variance.expand(3, *law.variance.shape))


def test_a_site_works_under_a_plate_of_draws():
    """Where the programs of the guides put it: dimension -2, outside of the site's own."""
    law = law_of(GROUPS["shapes"])

    def guide():
        with pyro.plate("draws", 5, dim=-2):
            pyro.sample("A", law)

    trace = pyro.poutine.trace(guide).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["A"]
    assert site["value"].shape == (5, 1, *law.event_shape)
    torch.testing.assert_close(site["log_prob"], dense(law).log_prob(site["value"]))


class Largest(TorchDispatchMode):
    """Notes the most bytes of a storage that an operation gives."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("way", ["sample", "plate"])
def test_draws_take_no_copy_of_the_rotations(way):
    """40 draws of 2 x 64 matrices; rotations once a draw would be 32 times as large."""
    draws, groups = 40, [BlockGroup(3, 2, 64), BlockGroup(2, 1, 64)]
    law = law_of(groups)
    with Largest() as largest:
        if way == "sample":
            value = law.sample((draws,))
        else:
            with pyro.plate("draws", draws, dim=-2):
                value = pyro.sample("A", law)
        law.log_prob(value)
    rotations_once = sum(g.count * g.columns**2 for g in groups)
    needed = max(draws * law.event_shape[0], rotations_once) * law.loc.element_size()
    assert largest.bytes <= needed


def test_shapes_that_do_not_fit_raise():
    group = [BlockGroup(2, 2, 3)]
    loc, U, V = torch.zeros(12), torch.eye(2).expand(2, 2, 2), torch.eye(3).expand(2, 3, 3)
    KroneckerNormal(loc, torch.ones(12), [U], [V], group)
    with pytest.raises(ValueError, match=r"rows of shapes \[\(2, 2, 2\)\]"):
        KroneckerNormal(loc, torch.ones(12), [V], [V], group)
    with pytest.raises(ValueError, match=r"columns of shapes \[\(2, 3, 3\)\]"):
        KroneckerNormal(loc, torch.ones(12), [U], [V[:1]], group)
    with pytest.raises(ValueError, match="needs 12 entries"):
        KroneckerNormal(loc[:11], torch.ones(11), [U], [V], group)
    with pytest.raises(ValueError, match="scale"):
        KroneckerNormal(loc, torch.zeros(12), [U], [V], group, validate_args=True)


# The divergence to a prior -----------------------------------------------------------------------


def prior(scale, total):
    return dist.Normal(0.0, torch.tensor(scale).double()).expand([total]).to_event(1)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_kl_to_an_isotropic_prior_is_that_of_the_dense_normals(groups, scale):
    law = law_of(groups)
    total = law.event_shape[0]
    eye = torch.eye(total, dtype=torch.float64)
    other = MultivariateNormal(torch.zeros(total, dtype=torch.float64), scale**2 * eye)
    actual = kl_divergence(law, prior(scale, total))
    torch.testing.assert_close(actual, kl_divergence(dense(law), other))


def test_kl_to_normals_of_differing_scales_and_means_is_that_of_the_dense_normals(groups):
    law = law_of(groups)
    loc, scale = torch.randn_like(law.loc), 0.5 + torch.rand_like(law.loc)
    actual = kl_divergence(law, dist.Normal(loc, scale).to_event(1))
    other = MultivariateNormal(loc, torch.diag(scale**2))
    torch.testing.assert_close(actual, kl_divergence(dense(law), other))


def test_kl_is_the_monte_carlo_mean_of_the_log_ratio():
    law = law_of(GROUPS["shapes"], 2)
    q = prior(0.8, law.event_shape[0])
    draws = law.sample((DRAWS,))
    ratio = law.log_prob(draws) - q.log_prob(draws)
    error = ratio.std(0) / math.sqrt(DRAWS)
    exact = kl_divergence(law, q)
    assert exact.shape == (2,)
    assert ((ratio.mean(0) - exact).abs() <= 5 * error).all()
    assert (error < 0.05 * exact).all()


def test_kl_to_the_very_same_isotropic_law_is_zero():
    law = law_of(GROUPS["shapes"])
    same = KroneckerNormal(
        0 * law.loc, torch.full_like(law.scale, 0.3), law.rows, law.columns, law.groups
    )
    assert kl_divergence(same, prior(0.3, law.event_shape[0])).abs() < 1e-12


@pytest.mark.parametrize(
    "other",
    [
        dist.Normal(torch.zeros(2, 6), 1.0).to_event(2),
        dist.Laplace(torch.zeros(6), torch.ones(6)).to_event(1),
    ],
    ids=["shape", "family"],
)
def test_a_kl_without_a_closed_form_raises(other):
    with pytest.raises(NotImplementedError, match="Normal"):
        kl_divergence(law_of(GROUPS["one"]), other)
