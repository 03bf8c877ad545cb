"""`ColumnNormal`: each column of each matrix is one multivariate normal, whatever the shapes."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from torch.distributions import MultivariateNormal

from pyrolora.distributions import (
    BlockGroup,
    ColumnNormal,
    StandardColumns,
    map_blocks,
    split_blocks,
)

GROUPS = {
    "one": [BlockGroup(1, 3, 4)],
    "equal": [BlockGroup(3, 2, 5)],
    "columns": [BlockGroup(2, 3, 4), BlockGroup(1, 3, 1)],
    "ranks": [BlockGroup(2, 3, 4), BlockGroup(1, 1, 6), BlockGroup(2, 2, 2)],
}
DRAWS = 50_000


@pytest.fixture(params=GROUPS.values(), ids=GROUPS.keys())
def groups(request):
    return request.param


def lower_factors(groups, *batch):
    """One factor a matrix, at the highest rank, in double precision."""
    count, r = sum(g.count for g in groups), max(g.rank for g in groups)
    below = 0.4 * torch.randn(*batch, count, r, r, dtype=torch.float64)
    on = 0.5 + torch.rand(*batch, count, r, dtype=torch.float64)
    return below.tril(-1) + torch.diag_embed(on)


def matrices(flat, groups):
    """The matrices of a flat vector, cut out by plain slicing."""
    out, start = [], 0
    for group in groups:
        for _ in range(group.count):
            size = group.rank * group.columns
            piece = flat[..., start : start + size]
            out.append(piece.reshape(*flat.shape[:-1], group.rank, group.columns))
            start += size
    assert start == flat.shape[-1]
    return out


def column_log_prob(scale_tril, value, groups, loc=None):
    """Sum over matrices and columns of the multivariate normals' densities."""
    total = 0
    means = matrices(torch.zeros_like(value) if loc is None else loc, groups)
    for index, (matrix, mean) in enumerate(zip(matrices(value, groups), means, strict=True)):
        r = matrix.shape[-2]
        # The covariance of a lower rank is the leading block of the covariance.
        S = scale_tril[..., index, :, :]
        covariance = (S @ S.mT)[..., :r, :r].unsqueeze(-3)
        law = MultivariateNormal(mean.mT, covariance)
        total = total + law.log_prob(matrix.mT).sum(-1)
    return total


@pytest.mark.parametrize("batch", [(), (2,), (3, 2)])
def test_log_prob_is_the_sum_over_columns_of_multivariate_normals(groups, batch):
    S = lower_factors(groups, *batch)
    law = ColumnNormal(S, groups)
    value = torch.randn(*batch, law.event_shape[0], dtype=torch.float64)

    actual = law.log_prob(value)

    assert actual.shape == batch
    torch.testing.assert_close(actual, column_log_prob(S, value, groups))


@pytest.mark.parametrize(
    ("scales", "means"),
    [((), ()), ((2,), ()), ((), (2,)), ((2,), (2,)), ((3, 1), (2,)), ((), (3, 1))],
)
def test_log_prob_with_a_mean_is_that_of_multivariate_normals(groups, scales, means):
    """Either of mean and scale may have the batch dimensions, or both different ones."""
    batch = torch.broadcast_shapes(scales, means)
    S, total = lower_factors(groups, *scales), sum(g.total for g in groups)
    loc, value = (torch.randn(*shape, total, dtype=torch.float64) for shape in (means, batch))

    law = ColumnNormal(S, groups, loc)

    assert law.batch_shape == batch
    assert law.scale_tril.shape[:-3] == batch
    assert law.rsample().shape == (*batch, total)
    assert torch.equal(law.mean, loc.expand(*batch, total))
    variance = ColumnNormal(S, groups).variance
    torch.testing.assert_close(law.variance, variance.expand(*batch, total))
    expected = column_log_prob(S, value, groups, loc)
    torch.testing.assert_close(law.log_prob(value), expected.expand(batch))


def test_log_prob_takes_a_batch_of_draws(groups):
    S = lower_factors(groups)
    law = ColumnNormal(S, groups)
    draws = law.rsample((4, 3))
    assert draws.shape == (4, 3, *law.event_shape)
    actual = law.log_prob(draws)
    expected = [[column_log_prob(S, x, groups) for x in row] for row in draws]
    torch.testing.assert_close(actual, torch.stack([torch.stack(row) for row in expected]))


@pytest.mark.parametrize("located", [False, True])
def test_draws_have_the_mean_and_covary_by_the_scale_within_columns_only(groups, located):
    """Tolerance: an entry of a covariance of n draws has standard error at most
    sqrt(2 v_i v_j / n); five of them for the worst of up to 35² entries."""
    S, total = lower_factors(groups), sum(g.total for g in groups)
    mean = (1 + torch.rand(total, dtype=torch.float64)) * (1 if located else 0)
    law = ColumnNormal(S, groups, mean if located else None)
    draws = law.sample((DRAWS,)) - mean
    blocks = []
    for index, group in enumerate(g for g in groups for _ in range(g.count)):
        covariance = (S[index] @ S[index].mT)[: group.rank, : group.rank]
        # Row by row, entry (i, j) lies at i * columns + j.
        blocks.append(torch.kron(covariance, torch.eye(group.columns, dtype=torch.float64)))
    expected = torch.block_diag(*blocks)

    actual = draws.mT @ draws / DRAWS
    sd = expected.diagonal().sqrt()
    tolerance = 5 * math.sqrt(2 / DRAWS) * sd[:, None] * sd[None, :]

    assert ((actual - expected).abs() <= tolerance).all()
    assert (draws.mean(0).abs() <= 5 * sd / math.sqrt(DRAWS)).all()
    torch.testing.assert_close(law.variance, expected.diagonal())
    assert torch.equal(law.mean, mean)


def test_gradient_of_rsample_in_scale_and_mean_agrees_with_finite_differences():
    groups = GROUPS["ranks"]
    S = lower_factors(groups).requires_grad_()
    loc = torch.randn(sum(g.total for g in groups), dtype=torch.float64, requires_grad=True)

    def draw(scale, loc):
        torch.manual_seed(1)
        return ColumnNormal(scale, groups, loc, validate_args=False).rsample()

    assert torch.autograd.gradcheck(draw, (S, loc))


def test_gradient_of_log_prob_agrees_with_finite_differences():
    groups = [BlockGroup(1, 2, 3), BlockGroup(1, 1, 2)]
    S = lower_factors(groups).requires_grad_()
    loc, value = (torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def log_prob(scale, loc, value):
        return ColumnNormal(scale.tril(), groups, loc, validate_args=False).log_prob(value)

    assert torch.autograd.gradcheck(log_prob, (S, loc, value))


def test_log_prob_has_gradients_after_a_first_use_in_inference_mode():
    """Prediction runs in inference mode; training the same shapes afterwards has to work."""
    groups = [BlockGroup(1, 2, 7), BlockGroup(1, 1, 11)]  # shapes that no other test uses
    S = lower_factors(groups)
    value = torch.randn(25, dtype=torch.float64)
    with torch.inference_mode():
        ColumnNormal(S, groups).log_prob(value)
    S.requires_grad_()
    ColumnNormal(S, groups).log_prob(value).backward()
    assert S.grad.isfinite().all()


@pytest.mark.parametrize("located", [False, True])
def test_expand_gives_independent_copies_of_the_same_law(groups, located):
    loc = torch.randn(2, sum(g.total for g in groups), dtype=torch.float64)
    law = ColumnNormal(lower_factors(groups, 2), groups, loc if located else None)
    wide = law.expand((3, 2))
    draw = wide.rsample()

    assert type(wide) is ColumnNormal
    assert wide.batch_shape == (3, 2)
    assert wide.event_shape == law.event_shape
    assert draw.shape == (3, 2, *law.event_shape)
    assert not torch.equal(draw[0], draw[1])
    torch.testing.assert_close(wide.log_prob(draw), law.log_prob(draw))
    torch.testing.assert_close(wide.variance, law.variance.expand(3, *law.variance.shape))
    assert torch.equal(wide.mean, law.mean.expand(3, *law.mean.shape))


def test_rows_of_the_scale_that_no_matrix_has_change_nothing():
    groups = [BlockGroup(1, 2, 3)]
    S = lower_factors([BlockGroup(1, 4, 3)])
    value = torch.randn(6, dtype=torch.float64)
    padded, cut = ColumnNormal(S, groups), ColumnNormal(S[:, :2, :2], groups)
    torch.testing.assert_close(padded.log_prob(value), cut.log_prob(value))
    torch.testing.assert_close(padded.variance, cut.variance)


def test_a_site_works_under_a_pyro_plate():
    groups = GROUPS["ranks"]
    S = lower_factors(groups)

    def model():
        with pyro.plate("draws", 5):
            return pyro.sample("delta", ColumnNormal(S, groups))

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["delta"]
    assert site["value"].shape == (5, sum(g.total for g in groups))
    torch.testing.assert_close(site["log_prob"], column_log_prob(S, site["value"], groups))


def test_a_site_has_one_mean_a_draw_under_a_pyro_plate():
    """The scale has no dimension of the plate, as in MonteCLoRA's model."""
    groups = GROUPS["ranks"]
    S, total = lower_factors(groups), sum(g.total for g in groups)
    loc = 100.0 * torch.arange(5, dtype=torch.float64)[:, None, None].expand(5, 1, total)

    def model():
        with pyro.plate("draws", 5, dim=-2):
            return pyro.sample("delta", ColumnNormal(S, groups, loc))

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["delta"]
    assert site["value"].shape == (5, 1, total)
    torch.testing.assert_close((site["value"] / 100).round().mul(100), loc)
    expected = column_log_prob(S, site["value"], groups, loc)
    torch.testing.assert_close(site["log_prob"], expected)


def test_a_scale_that_is_no_lower_factor_raises():
    with pytest.raises(ValueError, match="scale_tril"):
        ColumnNormal(torch.ones(1, 2, 2), [BlockGroup(1, 2, 3)], validate_args=True)


def test_log_prob_refuses_a_value_of_another_length():
    law = ColumnNormal(torch.eye(2).expand(1, 2, 2), [BlockGroup(1, 2, 3)], validate_args=True)
    with pytest.raises(ValueError, match="size"):
        law.log_prob(torch.zeros(7))


def test_split_blocks_are_the_matrices_one_after_the_other(groups):
    total = sum(g.total for g in groups)
    flat = torch.arange(2 * total).reshape(2, total)
    parts = split_blocks(flat, groups)
    assert [part.shape for part in parts] == [(2, *g.shape) for g in groups]
    found = [matrix for part in parts for matrix in part.unbind(-3)]
    for matrix, expected in zip(found, matrices(flat, groups), strict=True):
        assert torch.equal(matrix, expected)


def test_map_blocks_applies_the_leading_block_of_each_law_to_its_matrix(groups):
    S = lower_factors(groups)
    flat = torch.randn(sum(g.total for g in groups), dtype=torch.float64)
    actual = matrices(map_blocks(torch.matmul, S, flat, groups), groups)
    for index, (result, matrix) in enumerate(zip(actual, matrices(flat, groups), strict=True)):
        r = matrix.shape[0]
        torch.testing.assert_close(result, S[index, :r, :r] @ matrix)


# Standard columns -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("located", [False, True])
def test_standard_columns_are_columns_with_s_equal_to_i(groups, located, batch):
    total, count = sum(g.total for g in groups), sum(g.count for g in groups)
    rank = max(g.rank for g in groups)
    like = torch.zeros(1, dtype=torch.float64)
    loc = torch.randn(*batch, total, dtype=torch.float64) if located else None
    eye = torch.eye(rank, dtype=torch.float64).expand(count, rank, rank)
    law = StandardColumns(like, groups, loc)
    whole = ColumnNormal(eye, groups, loc)
    if not located:
        law, whole = law.expand(batch), whole.expand(batch)
    assert law.batch_shape == whole.batch_shape == batch
    assert law.event_shape == whole.event_shape
    values = []
    for one in (law, whole):
        torch.manual_seed(0)
        values.append(one.rsample((3,)))
    assert values[0].dtype == torch.float64
    torch.testing.assert_close(*values)
    torch.testing.assert_close(law.log_prob(values[0]), whole.log_prob(values[0]))
    for name in ("mean", "variance", "scale_tril"):
        torch.testing.assert_close(getattr(law, name), getattr(whole, name))
    wide = law.expand((4, *batch))
    torch.testing.assert_close(wide.log_prob(values[0][0].expand(4, *batch, total)),
                               whole.log_prob(values[0][0]).expand(4, *batch))  # fmt: skip


def test_standard_columns_refuse_a_value_of_another_shape():
    law = StandardColumns(torch.zeros(1), [BlockGroup(1, 2, 3)], validate_args=True)
    with pytest.raises(ValueError, match="event_shape"):
        law.log_prob(torch.zeros(5))
