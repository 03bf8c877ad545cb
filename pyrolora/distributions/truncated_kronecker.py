"""Kronecker normals that keep a few eigenvectors: Laplace's posterior of wide layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyrolora.distributions.column_normal import BlockGroup, Blocks
from pyrolora.distributions.kronecker_normal import sandwich


class TruncatedKroneckerNormal(TorchDistribution):
    r"""A `KroneckerNormal` whose columns have K <= c eigenvectors, and one scale for all others.

    With Z (r, c) standard normal, V (c, K) with orthonormal columns, and ϱ the scale of the rest,

        X = M + ϱ Z + U [(S - ϱ) ∘ (Uᵀ Z V)] Vᵀ,

    whose covariance is ϱ² I but in the span of U ⊗ V, where it is that of `KroneckerNormal`. With
    ϱ = λ^(-1/2) it is the inverse of (rows ⊗ columns) + λ I, where ``columns`` has rank K. With
    D = X - M,

        log p(x) = - ½ Σ_l [ ‖D_l‖² / ϱ² + Σ_ij (U_lᵀ D_l V_l)_ij² (1 / S_l,ij² - 1 / ϱ²) ]
                   - Σ_l [ Σ_ij log S_l,ij + r_l (c_l - K_l) log ϱ + ½ r_l c_l log 2π ].

    Parameters
    ----------
    loc : Tensor
        M, flat, shape ``(*batch_shape, total)``.
    scale : Tensor
        S > 0, flat, shape ``(Σ_l r_l K_l,)``, matrix after matrix.
    rest : Tensor
        ϱ > 0, shape ``()``.
    rows, columns : sequence of Tensor
        U (count, r, r) and V (count, c, K), one of each per group, orthonormal: not checked.
    groups : sequence of BlockGroup
        The shapes (r_l, c_l) of the L matrices, in runs of equal shape.
    """

    arg_constraints: ClassVar = {
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
        "rest": constraints.positive,
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        rest: Tensor,
        rows: Sequence[Tensor],
        columns: Sequence[Tensor],
        groups: Blocks,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.loc, self.scale, self.rest = loc, scale, rest
        self.rows, self.columns, self.groups = tuple(rows), tuple(columns), tuple(groups)
        self.kept = tuple(
            BlockGroup(group.count, group.rank, V.shape[-1])
            for group, V in zip(self.groups, self.columns, strict=True)
        )
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> TruncatedKroneckerNormal:
        loc = self.loc.expand(torch.Size(batch_shape) + self.event_shape)
        new = TruncatedKroneckerNormal(
            loc, self.scale, self.rest, self.rows, self.columns, self.groups, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        standard = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        inside = (self.scale - self.rest) * self._inside(standard)
        return self.loc + self.rest * standard + self._outside(inside)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        moved = value - self.loc
        inside = self._inside(moved).square() * (self.scale.square().reciprocal() - self.rest**-2)
        squares = moved.square().sum(-1) / self.rest.square() + inside.sum(-1)
        return -0.5 * squares - self.log_volume - 0.5 * self.event_shape[0] * math.log(2 * math.pi)

    @property
    def log_volume(self) -> Tensor:
        """Half the log-determinant of the covariance."""
        others = self.event_shape[0] - len(self.scale)
        return self.scale.log().sum(-1) + others * self.rest.log()

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        """The variances of the entries of X: ϱ² + Σ_ab U_ia² (S_ab² - ϱ²) V_jb²."""
        left, right = [U.square() for U in self.rows], [V.square() for V in self.columns]
        excess = sandwich(left, self.scale.square() - self.rest.square(), right, self.kept)
        return (self.rest.square() + excess).expand_as(self.loc)

    def _inside(self, flat: Tensor) -> Tensor:
        """Return U_lᵀ X_l V_l for every matrix of ``flat``, flat again."""
        left, right = [U.mT for U in self.rows], [V.mT for V in self.columns]
        return sandwich(left, flat, right, self.groups)

    def _outside(self, flat: Tensor) -> Tensor:
        """Return U_l Y_l V_lᵀ for every matrix of ``flat``, flat again."""
        return sandwich(self.rows, flat, self.columns, self.kept)
