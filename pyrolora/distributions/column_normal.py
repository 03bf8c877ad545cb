"""Independent Gaussian columns whose covariance is shared within a matrix: the adapter's noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints


@dataclass(frozen=True)
class BlockGroup:
    """``count`` consecutive matrices of one shape (rank, columns)."""

    count: int
    rank: int
    columns: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (count, rank, columns)."""
        return (self.count, self.rank, self.columns)

    @property
    def total(self) -> int:
        """The number of entries."""
        return self.count * self.rank * self.columns


Blocks = Sequence[BlockGroup]


def split_blocks(flat: Tensor, groups: Blocks) -> list[Tensor]:
    """Split a flat vector (..., total) into views (..., count, rank, columns), one per group.

    ``split`` and ``unflatten`` only: the backward pass is one concatenation.
    """
    parts = flat.split([group.total for group in groups], dim=-1)
    return [part.unflatten(-1, group.shape) for part, group in zip(parts, groups, strict=True)]


def map_blocks(
    function: Callable[[Tensor, Tensor], Tensor], per_block: Tensor, flat: Tensor, groups: Blocks
) -> Tensor:
    """Apply ``function(per_block, matrices)`` group by group and flatten the results again.

    ``per_block`` is (..., L, r, r); it is cut to each group's rank. The leading principal block of
    a lower factor is the lower factor of the leading principal block.
    """
    if len(groups) == 1:
        rank = groups[0].rank
        matrices = flat.unflatten(-1, groups[0].shape)
        return function(per_block[..., :rank, :rank], matrices).flatten(-3)
    factors = per_block.split([group.count for group in groups], dim=-3)
    parts = split_blocks(flat, groups)
    return torch.cat(
        [
            function(factor[..., : group.rank, : group.rank], part).flatten(-3)
            for factor, part, group in zip(factors, parts, groups, strict=True)
        ],
        dim=-1,
    )


def whiten(scale_tril: Tensor, flat: Tensor, groups: Blocks) -> Tensor:
    """Return S⁻¹ X of every matrix, flat again."""
    return map_blocks(
        lambda tril, x: torch.linalg.solve_triangular(tril, x, upper=False),
        scale_tril,
        flat,
        groups,
    )


class ColumnNormal(TorchDistribution):
    r"""The columns of L matrices: column j of matrix l is N(m_j, S_l S_lᵀ), independent given S.

    The value is one flat vector, matrix after matrix, each row by row, so that one Pyro site
    carries matrices of several shapes without padding.

        log p(x) = Σ_l [ -½ ‖S_l⁻¹ (X_l - M_l)‖² - c_l log|S_l| - ½ r_l c_l log 2π ]

    Parameters
    ----------
    scale_tril : Tensor
        S, lower factors, shape ``(*batch_shape, L, r, r)``.
    groups : sequence of BlockGroup
        The shapes (r_l, c_l) of the L matrices, in runs of equal shape, with r_l <= r. A matrix of
        lower rank uses the leading principal block of its S.
    loc : Tensor, optional
        m, flat as the value is, shape ``(*batch_shape, total)``; None for zeros.
    """

    arg_constraints: ClassVar = {
        "scale_tril": constraints.independent(constraints.lower_cholesky, 1)
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        scale_tril: Tensor,
        groups: Blocks,
        loc: Tensor | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.groups = tuple(groups)
        total = sum(group.total for group in self.groups)
        batch_shape = scale_tril.shape[:-3]
        if loc is not None:
            batch_shape = torch.broadcast_shapes(batch_shape, loc.shape[:-1])
            loc = loc.expand(*batch_shape, total)
        self.scale_tril = scale_tril.expand(*batch_shape, *scale_tril.shape[-3:])
        self.loc = loc
        super().__init__(batch_shape, torch.Size([total]), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ColumnNormal:
        new = self._get_checked_instance(ColumnNormal, _instance)
        batch_shape = torch.Size(batch_shape)
        new.scale_tril = self.scale_tril.expand(batch_shape + self.scale_tril.shape[-3:])
        new.groups = self.groups
        new.loc = None if self.loc is None else self.loc.expand(batch_shape + self.event_shape)
        super(ColumnNormal, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        standard = torch.randn(shape, dtype=self.scale_tril.dtype, device=self.scale_tril.device)
        centred = map_blocks(torch.matmul, self.scale_tril, standard, self.groups)
        return centred if self.loc is None else centred + self.loc

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        centred = value if self.loc is None else value - self.loc
        whitened = whiten(self.scale_tril, centred, self.groups)
        log_diagonal = self.scale_tril.diagonal(dim1=-2, dim2=-1).log()
        # log|S_l| counts once per column, over the rows that the matrix has.
        half = (log_diagonal * self.half_weights()).sum((-2, -1))
        constant = 0.5 * self.event_shape[0] * math.log(2 * math.pi)
        return torch.sub(-0.5 * whitened.square().sum(-1), half, alpha=2) - constant

    def half_weights(self) -> Tensor:
        """Return ½ c_l, of the columns, for the rows that matrix l has, else 0: (L, r)."""
        tril = self.scale_tril
        return _half_weights(self.groups, tril.shape[-1], tril.dtype, tril.device)

    @property
    def mean(self) -> Tensor:
        if self.loc is not None:
            return self.loc
        zero = self.scale_tril.new_zeros(())
        return zero.expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        per_row = self.scale_tril.square().sum(-1, keepdim=True)
        return map_blocks(
            lambda variances, x: variances[..., :1] + x,
            per_row.expand(self.scale_tril.shape),
            torch.zeros_like(self.mean),
            self.groups,
        )


class StandardColumns(ColumnNormal):
    """`ColumnNormal` with S = I: all entries are independent, N(m, 1).

    Priors take this one: draws, densities and divergences need no products with S.

    Parameters
    ----------
    like : Tensor
        Any tensor of the dtype and on the device that the values are to have.
    groups, loc
        As in `ColumnNormal`.
    """

    arg_constraints: ClassVar = {}

    def __init__(
        self,
        like: Tensor,
        groups: Blocks,
        loc: Tensor | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.like = like
        self.groups = tuple(groups)
        total = torch.Size([sum(group.total for group in self.groups)])
        batch_shape = torch.Size() if loc is None else loc.shape[:-1]
        self.loc = None if loc is None else loc.expand(batch_shape + total)
        TorchDistribution.__init__(self, batch_shape, total, validate_args=validate_args)

    @property
    def scale_tril(self) -> Tensor:  # type: ignore[override]
        """The identity, (*batch_shape, L, r, r)."""
        rank = max(group.rank for group in self.groups)
        eye = torch.eye(rank, dtype=self.like.dtype, device=self.like.device)
        blocks = sum(group.count for group in self.groups)
        return eye.expand(*self.batch_shape, blocks, rank, rank)

    def expand(self, batch_shape: Any, _instance: Any = None) -> StandardColumns:
        new = self._get_checked_instance(StandardColumns, _instance)
        batch_shape = torch.Size(batch_shape)
        new.like, new.groups = self.like, self.groups
        new.loc = None if self.loc is None else self.loc.expand(batch_shape + self.event_shape)
        TorchDistribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        standard = torch.randn(shape, dtype=self.like.dtype, device=self.like.device)
        return standard if self.loc is None else standard + self.loc

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        centred = value if self.loc is None else value - self.loc
        constant = 0.5 * self.event_shape[0] * math.log(2 * math.pi)
        return -0.5 * centred.square().sum(-1) - constant


@lru_cache(maxsize=64)
def _half_weights(
    groups: tuple[BlockGroup, ...], rank: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    rows = [
        [0.5 * group.columns if row < group.rank else 0.0 for row in range(rank)]
        for group in groups
        for _ in range(group.count)
    ]
    with torch.inference_mode(False):  # the cached tensor also serves training
        return torch.tensor(rows, dtype=dtype, device=device)
