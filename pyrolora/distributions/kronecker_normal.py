"""Gaussian matrices whose covariance is diagonal in a Kronecker eigenbasis: Laplace's posterior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyrolora.distributions.column_normal import Blocks, split_blocks


class KroneckerNormal(TorchDistribution):
    r"""L independent matrices X_l = M_l + U_l (S_l ∘ Z_l) V_lᵀ with standard normal entries in Z_l.

    The value is one flat vector, matrix after matrix, each row by row. In that order
    vec(U Z Vᵀ) = (U ⊗ V) vec(Z), so that matrix l has the covariance

        (U_l ⊗ V_l) diag(vec(S_l)²) (U_l ⊗ V_l)ᵀ.

    With U, V the eigenvectors and ρ, κ the eigenvalues of two curvature factors, and
    S_ij = (ρ_i κ_j + λ)^(-1/2), it is the inverse of (rows ⊗ columns) + λ I.

        log p(x) = Σ_l [ -½ ‖(U_lᵀ (X_l - M_l) V_l) / S_l‖² - Σ_ij log S_l,ij - ½ r_l c_l log 2π ]

    Parameters
    ----------
    loc, scale : Tensor
        M and S > 0, flat, shape ``(*batch_shape, total)`` after broadcasting. The entries of S
        belong to pairs of columns of U and V, not to entries of X.
    rows, columns : sequence of Tensor
        U (count, r, r) and V (count, c, c), one of each per group, orthogonal: not checked.
        They have no batch shape.
    groups : sequence of BlockGroup
        The shapes (r_l, c_l) of the L matrices, in runs of equal shape.

    Raises
    ------
    ValueError
        When the shapes of the rotations do not fit ``groups``; with ``validate_args``, when a
        scale is not positive.
    """

    arg_constraints: ClassVar = {
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        rows: Sequence[Tensor],
        columns: Sequence[Tensor],
        groups: Blocks,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.groups = tuple(groups)
        self.rows, self.columns = tuple(rows), tuple(columns)
        for name, found, sides in (
            ("rows", self.rows, [(g.count, g.rank, g.rank) for g in self.groups]),
            ("columns", self.columns, [(g.count, g.columns, g.columns) for g in self.groups]),
        ):
            shapes = [tuple(t.shape) for t in found]
            if shapes != sides:
                raise ValueError(
                    f"KroneckerNormal needs {name} of shapes {sides}, one per group, got {shapes}"
                )
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        total = sum(group.total for group in self.groups)
        if self.loc.shape[-1] != total:
            raise ValueError(
                f"KroneckerNormal needs {total} entries for its groups, got {self.loc.shape[-1]}"
            )
        super().__init__(self.loc.shape[:-1], torch.Size([total]), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> KroneckerNormal:
        new = self._get_checked_instance(KroneckerNormal, _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc = self.loc.expand(batch_shape + self.event_shape)
        new.scale = self.scale.expand(batch_shape + self.event_shape)
        new.rows, new.columns, new.groups = self.rows, self.columns, self.groups
        super(KroneckerNormal, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        standard = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self._sandwich(self.rows, self.scale * standard, self.columns)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        left, right = [U.mT for U in self.rows], [V.mT for V in self.columns]
        whitened = self._sandwich(left, value - self.loc, right) / self.scale
        constant = 0.5 * self.event_shape[0] * math.log(2 * math.pi)
        return -0.5 * whitened.square().sum(-1) - self.scale.log().sum(-1) - constant

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        """The variances of the entries of X: Σ_ab U_ia² S_ab² V_jb²."""
        left, right = [U.square() for U in self.rows], [V.square() for V in self.columns]
        return self._sandwich(left, self.scale.square(), right)

    def _sandwich(self, left: Sequence[Tensor], flat: Tensor, right: Sequence[Tensor]) -> Tensor:
        return sandwich(left, flat, right, self.groups)


def sandwich(
    left: Sequence[Tensor], flat: Tensor, right: Sequence[Tensor], groups: Blocks
) -> Tensor:
    """Return left_l X_l right_lᵀ for every matrix of ``flat``, flat again.

    For S draws of X, ``L @ X`` would copy L, which is far larger, S times; ``einsum`` takes the
    draws of a matrix together as columns or rows of one product.
    """
    done = []
    for L, X, R in zip(left, split_blocks(flat, groups), right, strict=True):
        turned = torch.einsum("lij,...ljk->...lik", L, X)
        done.append(torch.einsum("...lik,lmk->...lim", turned, R).flatten(-3))
    return torch.cat(done, dim=-1)
