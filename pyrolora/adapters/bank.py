"""The stacked factors of all adapted layers: their means, their layout, their binding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrolora.adapters.initializers import initial_factor
from pyrolora.adapters.layer import Factors
from pyrolora.adapters.targets import LayerSpec
from pyrolora.distributions import BlockGroup, map_blocks, split_blocks
from pyrolora.parameters import ParamModule
from pyrolora.types import AdapterConfig


@dataclass(frozen=True)
class Block:
    """One factor of one layer as r x columns: A itself, or Bᵀ, whose columns are B's rows."""

    layer: str
    factor: str
    rank: int
    columns: int

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.factor}"


class Layout:
    """Where each block lies in a flat vector: blocks of equal shape are neighbours.

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
        self.rank = max(block.rank for block in self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __add__(self, other: Layout) -> Layout:
        return Layout([*self.blocks, *other.blocks])

    def matrices(self, flat: Tensor) -> dict[str, Tensor]:
        """Layer -> (..., r, columns); of a layout that holds one factor only."""
        parts = [part for group in split_blocks(flat, self.groups) for part in group.unbind(-3)]
        return {block.layer: part for block, part in zip(self.blocks, parts, strict=True)}

    def transform(self, per_block: Tensor, flat: Tensor) -> Tensor:
        """Each (r, columns) block multiplied from the left by its (r, r) in (..., L, r, r)."""
        return map_blocks(torch.matmul, per_block, flat, self.groups)

    def scale(self, per_block: Tensor, flat: Tensor) -> Tensor:
        """Each block times its number in ``per_block`` (..., L)."""
        return map_blocks(torch.mul, per_block[..., None, None], flat, self.groups)

    def rank_mask(self) -> Tensor:
        """(L, rank) booleans: the rows that each block has."""
        ranks = torch.tensor([block.rank for block in self.blocks])
        return torch.arange(self.rank) < ranks.unsqueeze(-1)


@dataclass(frozen=True)
class FlatFactors:
    """All A and all Bᵀ as flat vectors, (total,) or, for S draws, (S, total)."""

    A: Tensor
    B: Tensor

    @property
    def draws(self) -> int | None:
        """S, or None for a single setting."""
        sizes = {t.shape[0] for t in (self.A, self.B) if t.dim() > 1}
        return sizes.pop() if sizes else None

    @property
    def constant(self) -> bool:
        """Whether the S draws are one setting, repeated (``expand``): a point mass."""
        return all(t.dim() == 1 or t.stride(0) == 0 for t in (self.A, self.B))

    @staticmethod
    def cat(parts: Sequence[FlatFactors]) -> FlatFactors:
        """The draws of all parts in turn; a factor that is not drawn is the same in each."""
        A, B = (
            torch.cat(tensors) if tensors[0].dim() > 1 else tensors[0]
            for tensors in ([part.A for part in parts], [part.B for part in parts])
        )
        return FlatFactors(A, B)

    def __getitem__(self, index: int | slice) -> FlatFactors:
        A, B = (t[index] if t.dim() > 1 else t for t in (self.A, self.B))
        return FlatFactors(A, B)


class AdapterBank(ParamModule):
    """The adapter means of all layers, stacked: two parameters, ``A_loc`` and ``B_loc``.

    The programs of a guide read the means here, make factors of them, and own the Pyro sites; the
    layers of the network only ever receive factors.

    Parameters
    ----------
    specs
        The adapted layers.
    config
        The adapter configuration.
    """

    def __init__(self, specs: Sequence[LayerSpec], config: AdapterConfig) -> None:
        super().__init__()
        self.specs = {spec.name: spec for spec in specs}
        self.config = config
        self.layouts: Mapping[str, Layout] = {
            "A": Layout([Block(s.name, "A", s.rank, s.in_features) for s in specs]),
            "B": Layout([Block(s.name, "B", s.rank, s.out_features) for s in specs]),
        }
        start = [
            initial_factor(config.init_lora_weights, block.rank, block.columns).flatten()
            for block in self.layouts["A"].blocks
        ]
        self.declare("A_loc", torch.cat(start))
        self.declare("B_loc", torch.zeros(self.layouts["B"].total))

    def layout(self, latent: str) -> Layout:
        """The layout of the latent factors: ``"A"``, ``"B"``, or ``"AB"`` (A's blocks first)."""
        if latent == "AB":
            return self.layouts["A"] + self.layouts["B"]
        return self.layouts[latent]

    def means(self) -> FlatFactors:
        """M (and B) as they are, as parameter statements."""
        return FlatFactors(self.param("A_loc"), self.param("B_loc"))

    def shifted(self, latent: str, delta: Tensor) -> FlatFactors:
        """The means plus ``delta`` (..., total of ``layout(latent)``) on the latent factors."""
        means = self.means()
        if latent == "A":
            return FlatFactors(means.A + delta, means.B)
        if latent == "B":
            return FlatFactors(means.A, means.B + delta)
        delta_a, delta_b = delta.split([self.layouts["A"].total, self.layouts["B"].total], dim=-1)
        return FlatFactors(means.A + delta_a, means.B + delta_b)

    def layer_factors(self, factors: FlatFactors, dtype: torch.dtype) -> dict[str, Factors]:
        """Per layer the matrices of its two products: one cast and one scaling for all layers."""
        scalings = {spec.scaling for spec in self.specs.values()}
        sB = factors.B
        if len(scalings) == 1:
            sB = sB * scalings.pop()
        else:
            per_block = [self.specs[b.layer].scaling for b in self.layouts["B"].blocks]
            sB = self.layouts["B"].scale(sB.new_tensor(per_block), sB)
        A = self.layouts["A"].matrices(factors.A.to(dtype))
        B = self.layouts["B"].matrices(sB.to(dtype))
        dropout = self.config.lora_dropout
        return {name: Factors(A[name], B[name], dropout) for name in self.specs}

    def matrices(self, factors: FlatFactors) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer -> (A (..., r, in), B (..., out, r)), unscaled."""
        A = self.layouts["A"].matrices(factors.A)
        B = self.layouts["B"].matrices(factors.B)
        return {name: (A[name], B[name].mT) for name in self.specs}
