"""Factors of all layers: one setting of the latent variables, or S draws of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyrolora.adapters.layout import Matrices


@dataclass(frozen=True)
class FlatFactors:
    """Factors that a setting of the latent variables, or S draws, puts into the adapted layers.

    Attributes
    ----------
    A, B
        All A and all Bᵀ as flat vectors, (total,) or, for S draws, (S, total).
    members
        Number of the task head that each draw uses, (S,) or (); None where there is one head.
    seeds
        Seeds of the noise on the weights, (S,) or (); None without noise.
    noise_scale
        σ of that noise, relative to the norm of each row of the weight.
    pooled
        Whether the S draws together are one setting: the mean of their updates, (1/S) Σ s B A, and
        of their heads. (The mean of the factors would not do: those of two fits differ by a
        rotation.)
    """

    A: Tensor
    B: Tensor
    members: Tensor | None = None
    seeds: Tensor | None = None
    noise_scale: float = 0.0
    pooled: bool = False

    @property
    def draws(self) -> int | None:
        """Return S, or None for a single setting."""
        if self.pooled:
            return None
        sizes = {t.shape[0] for t in (self.A, self.B) if t.dim() > 1}
        sizes |= {t.shape[0] for t in (self.members, self.seeds) if t is not None and t.dim()}
        return sizes.pop() if sizes else None

    def distinct(self) -> tuple[FlatFactors, Tensor]:
        """Return the different settings among the S draws, and how many neighbours have each."""
        draws = self.draws
        assert draws is not None
        if self.seeds is None and self.members is not None:  # a member is a point mass
            counts = self.members.unique_consecutive(return_counts=True)[1]
            return self[counts.cumsum(0) - counts], counts
        point = all(t.dim() == 1 or t.stride(0) == 0 for t in (self.A, self.B))
        if self.seeds is None and point:
            return self[:1], torch.tensor([draws])
        return self, torch.ones(draws, dtype=torch.long)

    def checksum(self) -> tuple[Any, ...]:
        """Return numbers that differ, all but surely, where factors do, bit for bit."""
        bits = [int(t.float().view(torch.int32).sum(dtype=torch.int64)) for t in (self.A, self.B)]
        chosen = [None if t is None else t.tolist() for t in (self.members, self.seeds)]
        return (*bits, *chosen, self.noise_scale, self.draws)

    @staticmethod
    def cat(parts: Sequence[FlatFactors]) -> FlatFactors:
        """Concatenate the draws of all parts; a factor that is not drawn is the same in each."""
        first = parts[0]
        drawn: dict[str, Any] = {}
        for name, plain in (("A", 1), ("B", 1), ("members", 0), ("seeds", 0)):
            tensor = getattr(first, name)
            if tensor is not None and tensor.dim() > plain:
                drawn[name] = torch.cat([getattr(part, name) for part in parts])
        return replace(first, **drawn)

    def __getitem__(self, index: int | slice | Tensor) -> FlatFactors:
        A, B = (t[index] if t.dim() > 1 else t for t in (self.A, self.B))
        members, seeds = (
            t[index] if t is not None and t.dim() else t for t in (self.members, self.seeds)
        )
        return replace(self, A=A, B=B, members=members, seeds=seeds)


@dataclass(frozen=True)
class LaterFactors:
    """Factors of S draws that are made whenever they are asked for, and kept nowhere.

    Attributes
    ----------
    draws
        S.
    at_once
        The most draws to ask for at a time.
    make
        Returns the factors of a run of the draws, from their first number to their last (without
        it). It draws, so that a thread that shares `pyrolora.seeding.DRAWING` cannot call it.
    """

    draws: int
    at_once: int
    make: Callable[[int, int], FlatFactors]

    def distinct(self) -> tuple[LaterFactors, Tensor]:
        """Return the settings, and how many draws have each: one."""
        return self, torch.ones(self.draws, dtype=torch.long)

    def checksum(self) -> tuple[Any, ...]:
        """Return that of the first draw, and the number of draws."""
        return (*self[0].checksum(), self.draws)

    @torch.no_grad()
    def __getitem__(self, index: int | slice) -> FlatFactors:
        if isinstance(index, int):
            number = range(self.draws)[index]
            return self.make(number, number + 1)[0]
        start, stop, step = index.indices(self.draws)
        assert step == 1, "draws are made in runs"
        return self.make(start, stop)


AnyFactors = FlatFactors | LaterFactors
"""Factors of one setting, or of draws, which are there or made later."""


def pooled_product(A: Matrices, B: Matrices) -> tuple[Matrices, Matrices]:
    """Return factors, layer by layer, of the mean update (1/K) Σ_k B_k A_k.

    They have K r ranks or, if that is less, as many as the layer has features on its narrow side.
    """
    left, right = {}, {}
    for name in A:
        a, b = A[name].flatten(-3, -2), B[name].flatten(-3, -2) / len(B[name])
        ranks, inputs, outputs = len(a), a.shape[-1], b.shape[-1]
        if ranks > min(inputs, outputs):
            update = b.mT @ a
            wide = inputs > outputs
            a = update if wide else torch.eye(inputs, dtype=update.dtype, device=update.device)
            b = torch.eye(outputs, dtype=update.dtype, device=update.device) if wide else update.mT
        left[name], right[name] = a, b
    return left, right
