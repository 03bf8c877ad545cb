"""Rows of several posteriors in one pass: every row has the factors of its own posterior."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pyrolora.adapters.binding import Binding, Factors


@dataclass(frozen=True)
class Portion:
    """The part of a mixed pass that belongs to one posterior: S draws of b examples.

    Attributes
    ----------
    factors, heads
        Layer -> its factors, and head -> the heads in its place (one, or one per draw), by their
        names in the network.
    draws, examples
        S and b; their rows lie in the pass draw after draw.
    """

    factors: Mapping[str, Factors]
    heads: Mapping[str, Sequence[nn.Module]]
    draws: int
    examples: int

    @property
    def rows(self) -> int:
        """Return the number of rows, S b."""
        return self.draws * self.examples

    def per_block(self, matrix: Tensor, rank: int, block: int) -> Tensor:
        """Return a factor (r, k) or (S, r, k), filled with zeros, once per ``block`` rows.

        It is (S b / block, rank, k).
        """
        if rank > matrix.shape[-2]:
            matrix = pad(matrix, (0, 0, 0, rank - matrix.shape[-2]))
        drawn = matrix.expand(self.draws, *matrix.shape[-2:])
        blocks = self.examples // block
        return drawn if blocks == 1 else drawn.repeat_interleave(blocks, 0)


def mixed_binding(
    portions: Sequence[Portion], layers: Mapping[str, Any], slots: Mapping[str, nn.Module]
) -> Binding:
    """Return the binding of a pass whose rows are those of all portions, one after the other.

    Row i of Σ S b gets W x_i + s B_i A_i x_i. To the layers the rows are draws of g examples each,
    with g the greatest common divisor of all b, and ranks below the largest are filled up with
    zeros, which change nothing.

    Parameters
    ----------
    portions
        The portions, which have the same layers and heads.
    layers, slots
        The wrapped layers and heads of the network that runs, by name.
    """
    block = math.gcd(*(portion.examples for portion in portions))
    factors = {layer: _stacked(portions, name, block) for name, layer in layers.items()}
    blocks = [
        portion.rows // count
        for portion in portions
        for count in [max((len(heads) for heads in portion.heads.values()), default=1)]
        for _ in range(count)
    ]
    heads = {slot: [h for p in portions for h in p.heads[name]] for name, slot in slots.items()}
    return Binding(factors, heads, blocks, rows=sum(portion.rows for portion in portions))


def _stacked(portions: Sequence[Portion], name: str, block: int) -> Factors:
    parts = [(portion, portion.factors[name]) for portion in portions]
    rank = max(part.A.shape[-2] for _, part in parts)
    return Factors(
        torch.cat([portion.per_block(part.A, rank, block) for portion, part in parts]),
        torch.cat([portion.per_block(part.sB, rank, block) for portion, part in parts]),
    )
