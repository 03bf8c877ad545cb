"""Distributions that the model/guide pairs need and Pyro does not have."""

from pyrolora.distributions import kl  # noqa: F401  (registers the divergences)
from pyrolora.distributions.column_normal import (
    BlockGroup,
    ColumnNormal,
    StandardColumns,
    map_blocks,
    split_blocks,
)
from pyrolora.distributions.kronecker_normal import KroneckerNormal
from pyrolora.distributions.logits_categorical import (
    LogitsCategorical,
    drawn_residual,
    rows_at_once,
)
from pyrolora.distributions.truncated_kronecker import TruncatedKroneckerNormal
from pyrolora.distributions.wishart_cholesky import VectorToLowerFactor, WishartCholesky

__all__ = [
    "BlockGroup",
    "ColumnNormal",
    "KroneckerNormal",
    "LogitsCategorical",
    "StandardColumns",
    "TruncatedKroneckerNormal",
    "VectorToLowerFactor",
    "WishartCholesky",
    "drawn_residual",
    "map_blocks",
    "rows_at_once",
    "split_blocks",
]
