"""The layout of all layers' factors in flat vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyrolora.distributions import BlockGroup, map_blocks, split_blocks

Matrices = Mapping[str, Tensor]
"""Layer -> (..., r, columns)."""

TINY = 1e-12
"""The size of a row of zeros, so that scales, which are multiples of it, stay positive."""


@dataclass(frozen=True)
class Block:
    """One factor of one layer as r x columns: A itself, or Bᵀ, whose columns are B's rows."""

    layer: str
    factor: str
    rank: int
    columns: int
    lookup: bool = False
    """Whether each product takes one of the columns, rather than the sum over all of them."""

    @property
    def name(self) -> str:
        """Return ``layer.factor``."""
        return f"{self.layer}.{self.factor}"


class Layout:
    """Places of the blocks in a flat vector; blocks of equal shape are neighbours.

    One flat vector is one Pyro site and one tensor for the optimiser, whatever the number of
    layers, without padding where shapes or ranks differ.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        by_shape: dict[tuple[str, int, int], list[Block]] = {}
        for block in blocks:
            by_shape.setdefault((block.factor, block.rank, block.columns), []).append(block)
        self.blocks = [block for group in by_shape.values() for block in group]
        self.groups = tuple(
            BlockGroup(len(group), rank, columns) for (_, rank, columns), group in by_shape.items()
        )
        self.total = sum(group.total for group in self.groups)
        self.rank = max((block.rank for block in self.blocks), default=0)

    def __len__(self) -> int:
        return len(self.blocks)

    def __add__(self, other: Layout) -> Layout:
        return Layout([*self.blocks, *other.blocks])

    def matrices(self, flat: Tensor) -> Matrices:
        """Return layer -> (..., r, columns); for a layout that holds one factor only."""
        parts = [part for group in split_blocks(flat, self.groups) for part in group.unbind(-3)]
        return {block.layer: part for block, part in zip(self.blocks, parts, strict=True)}

    def transform(self, per_block: Tensor, flat: Tensor) -> Tensor:
        """Multiply each (r, columns) block from the left by its (r, r) in (..., L, r, r)."""
        return map_blocks(torch.matmul, per_block, flat, self.groups)

    def scale(self, per_block: Tensor, flat: Tensor) -> Tensor:
        """Multiply each block by its number in ``per_block`` (..., L)."""
        return map_blocks(torch.mul, per_block[..., None, None], flat, self.groups)

    def scale_rows(self, per_row: Tensor, flat: Tensor) -> Tensor:
        """Multiply each row of each block by its number in ``per_row`` (..., L, r)."""
        return map_blocks(torch.mul, per_row[..., None], flat, self.groups)

    def spread_rows(self, per_row: Tensor) -> Tensor:
        """Return the number in ``per_row`` (L, r) of the row of each entry, flat."""
        places = per_row.new_empty(()).expand(self.total)  # of which the shapes count alone
        return map_blocks(Tensor.expand_as, per_row[..., None], places, self.groups)

    def row_sizes(self, flat: Tensor) -> Tensor:
        """Return the root mean square of each row of each block, (L, rank).

        It is 1 for rows that a block does not have, and `TINY`, without gradient, for rows of
        zeros, which are those of idle ranks.
        """
        sizes = [
            pad(
                (torch.linalg.vector_norm(part, dim=-1) * part.shape[-1] ** -0.5).clamp(min=TINY),
                (0, self.rank - part.shape[-2]),
                value=1.0,
            )
            for part in split_blocks(flat, self.groups)
        ]
        return torch.cat(sizes)

    def fan_in(self) -> Tensor:
        """Return how many numbers each output of each block's matrix sums, (L,): in for A, r for B.

        The blocks hold A and Bᵀ; the matrices are A and B.
        """
        sums = [1 if b.lookup else b.columns if b.factor == "A" else b.rank for b in self.blocks]
        return torch.tensor([float(count) for count in sums])

    def rank_mask(self) -> Tensor:
        """Return which of ``rank`` rows each block has, (L, rank) booleans."""
        ranks = torch.tensor([block.rank for block in self.blocks])
        return torch.arange(self.rank) < ranks.unsqueeze(-1)
