"""The stacked factors of all adapted layers: their means, their layout, their binding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyrolora.adapters.config import RANDOM_STARTS, AdapterConfig
from pyrolora.adapters.initializers import Start, initial_factor
from pyrolora.adapters.layer import Factors
from pyrolora.adapters.targets import LayerSpec
from pyrolora.adapters.weight_noise import WeightNoise
from pyrolora.distributions import BlockGroup, map_blocks, split_blocks
from pyrolora.parameters import ParamModule

Matrices = Mapping[str, Tensor]
"""Layer -> (..., r, columns)."""

TINY = 1e-12  # the size of a row of zeros, which scales are multiples of


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
        self.rank = max((block.rank for block in self.blocks), default=0)

    def __len__(self) -> int:
        return len(self.blocks)

    def __add__(self, other: Layout) -> Layout:
        return Layout([*self.blocks, *other.blocks])

    def matrices(self, flat: Tensor) -> Matrices:
        """Layer -> (..., r, columns); of a layout that holds one factor only."""
        parts = [part for group in split_blocks(flat, self.groups) for part in group.unbind(-3)]
        return {block.layer: part for block, part in zip(self.blocks, parts, strict=True)}

    def transform(self, per_block: Tensor, flat: Tensor) -> Tensor:
        """Each (r, columns) block multiplied from the left by its (r, r) in (..., L, r, r)."""
        return map_blocks(torch.matmul, per_block, flat, self.groups)

    def scale(self, per_block: Tensor, flat: Tensor) -> Tensor:
        """Each block times its number in ``per_block`` (..., L)."""
        return map_blocks(torch.mul, per_block[..., None, None], flat, self.groups)

    def scale_rows(self, per_row: Tensor, flat: Tensor) -> Tensor:
        """Each row of each block times its number in ``per_row`` (..., L, r)."""
        return map_blocks(torch.mul, per_row[..., None], flat, self.groups)

    def row_sizes(self, flat: Tensor) -> Tensor:
        """(L, rank): the root mean square of each row of each block; 1 for rows that a block does
        not have. That of zeros, of an idle rank, is all but zero and has no gradient."""
        sizes = [
            pad(
                part.square().mean(-1).clamp(min=TINY**2).sqrt(),
                (0, self.rank - part.shape[-2]),
                value=1.0,
            )
            for part in split_blocks(flat, self.groups)
        ]
        return torch.cat(sizes)

    def fan_in(self) -> Tensor:
        """(L,): how many numbers an output of each block's matrix is a sum of: in for A, r for
        B."""
        return torch.tensor([float(b.columns if b.factor == "A" else b.rank) for b in self.blocks])

    def rank_mask(self) -> Tensor:
        """(L, rank) booleans: the rows that each block has."""
        ranks = torch.tensor([block.rank for block in self.blocks])
        return torch.arange(self.rank) < ranks.unsqueeze(-1)


@dataclass(frozen=True)
class FlatFactors:
    """What a setting of the latent variables, or S draws of it, puts into the adapted layers.

    Attributes
    ----------
    A, B
        All A and all Bᵀ as flat vectors, (total,) or, for S draws, (S, total).
    members
        Whose task head each draw uses, (S,) or (); None where there is one.
    seeds
        Of the noise on the weights, (S,) or (); None without noise.
    noise_scale
        σ of that noise, relative to the norm of each row of the weight.
    pooled
        The S draws together are one setting: the mean of their updates, (1/S) Σ s B A, and of
        their heads. (The mean of the factors is none: those of two fits differ by a rotation.)
    """

    A: Tensor
    B: Tensor
    members: Tensor | None = None
    seeds: Tensor | None = None
    noise_scale: float = 0.0
    pooled: bool = False

    @property
    def draws(self) -> int | None:
        """S, or None for a single setting."""
        if self.pooled:
            return None
        sizes = {t.shape[0] for t in (self.A, self.B) if t.dim() > 1}
        sizes |= {t.shape[0] for t in (self.members, self.seeds) if t is not None and t.dim()}
        return sizes.pop() if sizes else None

    def distinct(self) -> tuple[FlatFactors, Tensor]:
        """The different settings among the S draws, and how many neighbours have each."""
        draws = self.draws
        assert draws is not None
        if self.seeds is None and self.members is not None:  # a member is a point mass
            counts = self.members.unique_consecutive(return_counts=True)[1]
            return self[counts.cumsum(0) - counts], counts
        point = all(t.dim() == 1 or t.stride(0) == 0 for t in (self.A, self.B))
        if self.seeds is None and point:
            return self[:1], torch.tensor([draws])
        return self, torch.ones(draws, dtype=torch.long)

    @staticmethod
    def cat(parts: Sequence[FlatFactors]) -> FlatFactors:
        """The draws of all parts in turn; a factor that is not drawn is the same in each."""
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


class AdapterBank(ParamModule):
    """The adapter means of all layers, stacked: two parameters, ``A_loc`` and ``B_loc``.

    The programs of a guide read the means here, make factors of them, and own the Pyro sites; the
    layers of the network only ever receive factors. A start that is not random is kept in the
    buffers ``A_start`` and ``B_start``, and the update of a layer is then s (B A − B₀ A₀): the
    network's W, which others share, stays as it is.

    Parameters
    ----------
    specs
        The adapted layers; none where the network itself is trained.
    config
        The adapter configuration.
    start
        Layer -> (A₀, B₀), where ``config`` asks for a start that is not random: zeros, for a state
        dict to fill, without it.

    Attributes
    ----------
    active
        Which ranks of which layers are in use, (L, r_max) booleans, where ``config`` has the layers
        share a budget; else None: all are. The others, idle, have zeros in A and B.
    """

    A_start: Tensor | None
    B_start: Tensor | None
    active: Tensor | None

    def __init__(
        self, specs: Sequence[LayerSpec], config: AdapterConfig, start: Start | None = None
    ) -> None:
        super().__init__()
        self.specs = {spec.name: spec for spec in specs}
        self.config = config
        slots = {spec.name: _slots(spec, config) for spec in specs}
        self.layouts: Mapping[str, Layout] = {
            "A": Layout([Block(s.name, "A", slots[s.name], s.in_features) for s in specs]),
            "B": Layout([Block(s.name, "B", slots[s.name], s.out_features) for s in specs]),
        }
        given = None if start is None else self.flattened(start)
        for factor, layout in self.layouts.items():
            fixed = None
            if config.init_lora_weights not in RANDOM_STARTS:
                fixed = torch.zeros(layout.total) if given is None else getattr(given, factor)
            self.register_buffer(f"{factor}_start", fixed)
        active = None
        if config.allocation is not None:
            ranks = torch.tensor([spec.rank for spec in specs]).unsqueeze(-1)
            own = torch.arange(self.layouts["A"].rank) < ranks
            active = own if config.allocation.schedule == "move" else self.slots()
        self.register_buffer("active", active)
        first = self.start()
        self.declare("A_loc", first.A)
        self.declare("B_loc", first.B)

    def start(self) -> FlatFactors:
        """The one start that weights or gradients gave; else a new random A in the active ranks,
        with B at zero."""
        if self.origin is not None:
            return self.origin
        kind = self.config.init_lora_weights
        parts = [torch.zeros(0)]
        for block in self.layouts["A"].blocks:
            rank = self.specs[block.layer].rank  # what the law of the start depends on
            times = -(-block.rank // rank)
            rows = [initial_factor(kind, rank, block.columns) for _ in range(times)]
            parts.append(torch.cat(rows)[: block.rank].flatten())
        A = torch.cat(parts)
        if self.active is not None:
            A = self.kept("A", A.to(self.active.device))
        return FlatFactors(A, A.new_zeros(self.layouts["B"].total))

    @property
    def origin(self) -> FlatFactors | None:
        """The factors of the network as it was, around which priors are centred: A₀ and B₀, or
        None: zero."""
        if self.A_start is None or self.B_start is None:
            return None
        return FlatFactors(self.A_start, self.B_start)

    def flattened(self, matrices: Start) -> FlatFactors:
        """Layer -> (A (r, in), B (out, r)), as flat vectors."""
        A, B = (self.layouts[factor].blocks for factor in "AB")
        return FlatFactors(
            torch.cat([matrices[block.layer][0].flatten() for block in A]),
            torch.cat([matrices[block.layer][1].mT.flatten() for block in B]),
        )

    def layout(self, latent: str) -> Layout:
        """The layout of the latent factors: ``"A"``, ``"B"``, or ``"AB"`` (A's blocks first)."""
        if latent == "AB":
            return self.layouts["A"] + self.layouts["B"]
        return self.layouts[latent]

    def means(self) -> FlatFactors:
        """M (and B) as they are, as parameter statements."""
        return FlatFactors(self.param("A_loc"), self.param("B_loc"))

    def shifted(self, latent: str, delta: Tensor, means: FlatFactors | None = None) -> FlatFactors:
        """The means plus ``delta`` (..., total of ``layout(latent)``) on the latent factors;
        ``means`` are those of a program that has read them already."""
        means = self.means() if means is None else means
        return self.replaced(latent, self.latent_part(latent, means) + delta, means)

    def latent_part(self, latent: str, factors: FlatFactors) -> Tensor:
        """The entries of the latent factors, (..., total of ``layout(latent)``)."""
        if latent == "AB":
            return torch.cat([factors.A, factors.B], dim=-1)
        return factors.A if latent == "A" else factors.B

    def replaced(self, latent: str, value: Tensor, means: FlatFactors | None = None) -> FlatFactors:
        """``value`` as the latent factors; the mean as the other one."""
        if latent == "AB":
            sizes = [self.layouts["A"].total, self.layouts["B"].total]
            return FlatFactors(*value.split(sizes, dim=-1))
        means = self.means() if means is None else means
        return FlatFactors(value, means.B) if latent == "A" else FlatFactors(means.A, value)

    def layer_factors(self, factors: FlatFactors, dtype: torch.dtype) -> dict[str, Factors]:
        """Per layer the matrices of its two products: one cast and one scaling for all layers."""
        if not self.specs:
            return {}
        terms = [
            (A.to(dtype), self._scaled(self.kept("B", B)).to(dtype))
            for A, B in self._terms(factors)
        ]
        A, B = self._joined(terms, factors.pooled, self._all)
        noises: list[WeightNoise | None] = [None] * len(self.specs)
        if factors.seeds is not None and factors.noise_scale:
            seeds = tuple(factors.seeds.flatten().tolist())
            noises = [WeightNoise(seeds, factors.noise_scale, i) for i in range(len(self.specs))]
        return {
            name: Factors(A[name], B[name], self.config.lora_dropout, noise)
            for name, noise in zip(self.specs, noises, strict=True)
        }

    def matrices(self, factors: FlatFactors) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer -> (A (..., r, in), B (..., out, r)), unscaled, r the active ranks, whose product
        is the update: for pooled factors those of rank S r that give the mean of the updates, and
        r ranks more where there is an `origin`."""
        A, B = self._joined(self._terms(factors), factors.pooled, self.in_use)
        return {name: (A[name], B[name].mT) for name in self.specs}

    # Which ranks are in use ----------------------------------------------------------------------

    def moves(self) -> bool:
        """Whether training changes which ranks are in use: not where the means are given."""
        return self.active is not None and self.get_parameter("A_loc").requires_grad

    def ranks(self) -> dict[str, int]:
        """Layer -> how many ranks are active."""
        return dict(zip(self.specs, self.mask().sum(-1).tolist(), strict=True))

    def budget(self) -> int:
        """The sum of the ranks that the configuration gives."""
        return sum(spec.rank for spec in self.specs.values())

    def slots(self) -> Tensor:
        """(L, r_max) booleans, layers in the order of ``specs``: the ranks that there are."""
        return self.layouts["A"].rank_mask()[self._places("A")]

    def mask(self) -> Tensor:
        """(L, r_max) booleans, layers in the order of ``specs``: the active ranks."""
        return self.slots() if self.active is None else self.active

    def rows(self, latent: str) -> Tensor | None:
        """`mask` by the blocks of ``layout(latent)``; None where all are active."""
        return None if self.active is None else self.by_block(latent, self.active)

    def entries(self, latent: str) -> Tensor | None:
        """(total,) booleans: which entries are of active ranks; None where all are."""
        return None if self.active is None else self.spread(latent, self.active)

    def by_block(self, latent: str, ranks: Tensor) -> Tensor:
        """(L, r_max), layers in the order of ``specs``, in that of the blocks of
        ``layout(latent)``."""
        return torch.cat([ranks[self._numbers(factor)] for factor in latent])

    def spread(self, latent: str, ranks: Tensor) -> Tensor:
        """(total,) of ``layout(latent)``: each entry has the boolean of its rank, of (L, r_max)."""
        layout = self.layout(latent)
        rows = self.by_block(latent, ranks)
        ones = torch.ones(layout.total, dtype=torch.bool, device=rows.device)
        return map_blocks(torch.mul, rows[..., None], ones, layout.groups)

    def kept(self, factor: str, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """``value`` (..., total) of a factor with zeros in all ranks but the active ones, or those
        of ``mask`` (..., L, r_max)."""
        rows = self.rows(factor) if mask is None else mask[..., self._numbers(factor), :]
        if rows is None:
            return value
        return map_blocks(torch.mul, rows[..., None], value, self.layouts[factor].groups)

    def in_use(self, factor: str, value: Tensor) -> Matrices:
        """Layer -> the active rows, (..., r, columns), of a factor (..., total)."""
        found = self.layouts[factor].matrices(value)
        if self.active is None:
            return found
        rows = dict(zip(self.specs, self.active, strict=True))
        return {n: matrix[..., rows[n][: matrix.shape[-2]], :] for n, matrix in found.items()}

    @torch.no_grad()
    def activate(self, mask: Tensor) -> dict[str, Tensor]:
        """Make the ranks of ``mask`` (L, r_max) the active ones. A new one gets a new row of A, and
        B = 0: the function stays. One that goes has zeros in both.

        Returns
        -------
        dict
            ``A_loc`` and ``B_loc`` -> (total,) booleans: the entries of ranks that came or went.
        """
        assert self.active is not None
        mask = mask.to(self.active.device)
        changed = mask != self.active
        self.active.copy_(mask)
        found = {}
        for factor, value in (("A", self.start().A), ("B", torch.zeros(()))):
            name = f"{factor}_loc"
            entries = self.spread(factor, changed)
            parameter = self.get_parameter(name)
            parameter.copy_(torch.where(entries, value.to(parameter), parameter))
            found[name] = entries
        return found

    def _numbers(self, factor: str) -> list[int]:
        """Of each block of a factor, the number of its layer."""
        numbers = {name: number for number, name in enumerate(self.specs)}
        return [numbers[block.layer] for block in self.layouts[factor].blocks]

    def _places(self, factor: str) -> list[int]:
        """Of each layer, the number of its block."""
        places = {block.layer: place for place, block in enumerate(self.layouts[factor].blocks)}
        return [places[name] for name in self.specs]

    # Norms ---------------------------------------------------------------------------------------

    def update_norms(self, factors: FlatFactors) -> Tensor:
        """‖s B A‖_F per draw and layer, (S, L), from the r x r Gram matrices BᵀB and A Aᵀ: no
        rotation of the ranks changes it."""
        norms = []
        for name, (A, B) in self.matrices(factors).items():
            squared = ((B.mT @ B) * (A @ A.mT)).sum((-2, -1)).clamp(min=0)
            norms.append(self.specs[name].scaling * squared.sqrt())
        return torch.stack(norms, dim=-1) if norms else factors.A

    def _terms(self, factors: FlatFactors) -> list[tuple[Tensor, Tensor]]:
        """Flat pairs whose products add up to the update: A and B; or, with a start,

            B A − B₀ A₀ = B (A − A₀) + (B − B₀) A₀,

        whose right side is exactly zero at the start and has no difference of large products.
        """
        A, B, origin = factors.A, factors.B, self.origin
        if origin is None:
            return [(A, B)]
        moved = B - origin.B
        if factors.pooled:
            return [(A - origin.A, B), (origin.A, moved.mean(0))]
        return [(A - origin.A, B), (origin.A.expand_as(A), moved)]

    def _joined(
        self,
        terms: Sequence[tuple[Tensor, Tensor]],
        pooled: bool,
        split: Callable[[str, Tensor], Matrices],
    ) -> tuple[Matrices, Matrices]:
        """The matrices of all terms as those of one product, their ranks one after the other."""
        (A, B), *others = ((split("A", a), split("B", b)) for a, b in terms)
        if pooled:
            A, B = _pooled(A, B)
        for a, b in others:
            A = {name: torch.cat([A[name], a[name]], -2) for name in A}
            B = {name: torch.cat([B[name], b[name]], -2) for name in B}
        return A, B

    def _all(self, factor: str, value: Tensor) -> Matrices:
        return self.layouts[factor].matrices(value)

    def _scaled(self, B: Tensor) -> Tensor:
        """s B of every layer."""
        scalings = {spec.scaling for spec in self.specs.values()}
        if len(scalings) == 1:
            return B * scalings.pop()
        per_block = [self.specs[b.layer].scaling for b in self.layouts["B"].blocks]
        return self.layouts["B"].scale(B.new_tensor(per_block), B)


def _slots(spec: LayerSpec, config: AdapterConfig) -> int:
    """How many ranks of a layer are laid out."""
    if config.allocation is None:
        return spec.rank
    return config.allocation.slots(spec.rank, min(spec.in_features, spec.out_features))


def _pooled(A: Matrices, B: Matrices) -> tuple[Matrices, Matrices]:
    """(1/K) Σ_k B_k A_k as one product, of K r ranks or, if that is less, of the layer's own."""
    left, right = {}, {}
    for name in A:
        a, b = A[name].flatten(-3, -2), B[name].flatten(-3, -2) / len(B[name])
        ranks, inputs, outputs = len(a), a.shape[-1], b.shape[-1]
        if ranks > min(inputs, outputs):
            update = b.mT @ a
            wide = inputs > outputs
            a = update if wide else torch.eye(inputs).to(update)
            b = torch.eye(outputs).to(update) if wide else update.mT
        left[name], right[name] = a, b
    return left, right
