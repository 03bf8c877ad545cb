"""A Kronecker normal with a few eigenvectors: the dense normal, and the whole one at K = c."""

from __future__ import annotations

import pytest
import torch
from pyro.distributions import MultivariateNormal, Normal
from torch.distributions import kl_divergence

from pyrolora.distributions import BlockGroup, KroneckerNormal, TruncatedKroneckerNormal

GROUPS = (BlockGroup(2, 2, 5), BlockGroup(1, 3, 4))
REST = torch.tensor(1.3, dtype=torch.float64)


def law_of(kept: tuple[int, int], *batch: int) -> TruncatedKroneckerNormal:
    torch.manual_seed(0)
    sizes = sum(g.count * g.rank * k for g, k in zip(GROUPS, kept, strict=True))

    def basis(count: int, side: int, size: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(count, side, side).double()).Q[..., :size]

    return TruncatedKroneckerNormal(
        torch.randn(*batch, sum(g.total for g in GROUPS)).double(),
        0.3 + torch.rand(sizes).double(),
        REST,
        [basis(g.count, g.rank, g.rank) for g in GROUPS],
        [basis(g.count, g.columns, k) for g, k in zip(GROUPS, kept, strict=True)],
        GROUPS,
    )


def covariance(law: TruncatedKroneckerNormal) -> torch.Tensor:
    """ϱ² I + (U ⊗ V) diag(S² − ϱ²) (U ⊗ V)ᵀ, matrix by matrix."""
    blocks, start = [], 0
    for group, rows, columns in zip(law.groups, law.rows, law.columns, strict=True):
        for U, V in zip(rows, columns, strict=True):
            size = group.rank * V.shape[-1]
            W, S = torch.kron(U, V), law.scale[start : start + size]
            eye = torch.eye(len(W), dtype=W.dtype)
            blocks.append(REST**2 * eye + W @ torch.diag(S**2 - REST**2) @ W.T)
            start += size
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("kept", [(2, 1), (5, 4), (0, 0)])
def test_density_moments_and_divergence_are_those_of_the_dense_normal(
    kept: tuple[int, int],
) -> None:
    law = law_of(kept)
    dense = MultivariateNormal(law.loc, covariance(law))
    value = torch.randn(4, 2, *law.event_shape, dtype=torch.float64)
    torch.testing.assert_close(law.log_prob(value), dense.log_prob(value))
    torch.testing.assert_close(law.variance, covariance(law).diagonal())
    torch.testing.assert_close(law.mean, law.loc)
    scale = 0.5 + torch.rand(law.event_shape, dtype=torch.float64)
    prior = Normal(torch.zeros_like(scale), scale).to_event(1)
    wide = MultivariateNormal(torch.zeros_like(scale), torch.diag(scale**2))
    torch.testing.assert_close(kl_divergence(law, prior), kl_divergence(dense, wide))


def test_draws_have_the_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    """X − M is linear in Z: the map applied to all unit vectors gives the covariance exactly."""
    law = law_of((2, 1))
    total = law.event_shape[0]
    units = torch.eye(total, dtype=torch.float64)
    monkeypatch.setattr(torch, "randn", lambda shape, **_: units.expand(shape))
    square_root = law.rsample(torch.Size([total])) - law.loc
    torch.testing.assert_close(square_root.T @ square_root, covariance(law))


def test_with_all_eigenvectors_it_is_the_whole_law() -> None:
    law = law_of((5, 4))
    whole = KroneckerNormal(law.loc, law.scale, law.rows, law.columns, GROUPS)
    value = torch.randn(3, *law.event_shape, dtype=torch.float64)
    torch.testing.assert_close(law.log_prob(value), whole.log_prob(value))
    torch.testing.assert_close(law.variance, whole.variance)


def test_it_expands_as_a_plate_does() -> None:
    law = law_of((2, 1)).expand([3, 1])
    assert law.sample().shape == (3, 1, *law.event_shape)
    value = torch.randn(3, 1, *law.event_shape, dtype=torch.float64)
    torch.testing.assert_close(law.log_prob(value), law_of((2, 1)).log_prob(value))
