"""The adapter means of all layers, and the way from factors to the products of the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyrolora import defaults
from pyrolora.adapters.binding import Factors
from pyrolora.adapters.config import RANDOM_STARTS, AdapterConfig
from pyrolora.adapters.factors import FlatFactors, pooled_product
from pyrolora.adapters.initializers import Start, initial_factor
from pyrolora.adapters.layout import Matrices
from pyrolora.adapters.ranks import RankedLayouts
from pyrolora.adapters.targets import LayerSpec
from pyrolora.adapters.weight_noise import WeightNoise


class AdapterBank(RankedLayouts):
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
        Layer -> (A₀, B₀), where ``config`` asks for a start that is not random. Without it they are
        zeros, for a state dict to fill.
    """

    A_start: Tensor | None
    B_start: Tensor | None

    def __init__(
        self, specs: Sequence[LayerSpec], config: AdapterConfig, start: Start | None = None
    ) -> None:
        super().__init__(specs, config)
        flat = None if start is None else self.flattened(start)
        for factor, layout in self.layouts.items():
            fixed = None
            if config.init_lora_weights not in RANDOM_STARTS:
                fixed = torch.zeros(layout.total) if flat is None else getattr(flat, factor)
            self.register_buffer(f"{factor}_start", fixed)
        first = self.start()
        self.declare("A_loc", first.A)
        self.declare("B_loc", first.B)

    def start(self) -> FlatFactors:
        """Return the factors at which means start.

        They are the `origin`, where weights or gradients gave one; else each call draws a new
        random A in the active ranks, with B at zero.
        """
        if self.origin is not None:
            return self.origin
        kind = self.config.init_lora_weights
        parts = [torch.zeros(0)]
        for block in self.layouts["A"].blocks:
            # The distribution of a row depends on the layer's rank, not on its number of slots.
            rank = self.specs[block.layer].rank
            times = -(-block.rank // rank)
            fan_in = 1 if block.lookup else block.columns
            rows = [initial_factor(kind, rank, block.columns, fan_in) for _ in range(times)]
            parts.append(torch.cat(rows)[: block.rank].flatten())
        A = torch.cat(parts)
        if self.active is not None:
            A = self.kept("A", A.to(self.active.device))
        return FlatFactors(A, A.new_zeros(self.layouts["B"].total))

    @property
    def origin(self) -> FlatFactors | None:
        """Factors A₀ and B₀ of the network as it was, which priors centre on; None: zeros."""
        if self.A_start is None or self.B_start is None:
            return None
        return FlatFactors(self.A_start, self.B_start)

    def flattened(self, matrices: Start) -> FlatFactors:
        """Flatten layer -> (A (r, in), B (out, r))."""
        A, B = (self.layouts[factor].blocks for factor in "AB")
        return FlatFactors(
            torch.cat([matrices[block.layer][0].flatten() for block in A]),
            torch.cat([matrices[block.layer][1].mT.flatten() for block in B]),
        )

    # Means and latent factors ------------------------------------------------------------------

    def means(self) -> FlatFactors:
        """Return the means of A and B, as parameter statements."""
        return FlatFactors(self.param("A_loc"), self.param("B_loc"))

    def shifted(self, latent: str, delta: Tensor, means: FlatFactors | None = None) -> FlatFactors:
        """Add ``delta`` (..., total of ``layout(latent)``) to the means of the latent factors.

        A program that has read the means already passes them as ``means``.
        """
        means = self.means() if means is None else means
        return self.replaced(latent, self.latent_part(latent, means) + delta, means)

    def latent_part(self, latent: str, factors: FlatFactors) -> Tensor:
        """Return the entries of the latent factors, (..., total of ``layout(latent)``)."""
        if latent == "AB":
            return torch.cat([factors.A, factors.B], dim=-1)
        return factors.A if latent == "A" else factors.B

    def replaced(self, latent: str, value: Tensor, means: FlatFactors | None = None) -> FlatFactors:
        """Return factors with ``value`` for the latent ones, and the mean for the other one."""
        if latent == "AB":
            sizes = [self.layouts["A"].total, self.layouts["B"].total]
            return FlatFactors(*value.split(sizes, dim=-1))
        means = self.means() if means is None else means
        return FlatFactors(value, means.B) if latent == "A" else FlatFactors(means.A, value)

    def alone(self, latent: str, value: Tensor) -> FlatFactors:
        """Return factors with ``value`` for the latent ones, and zeros for the other one."""
        A, B = (torch.zeros_like(self.get_parameter(f"{factor}_loc")) for factor in "AB")
        return self.replaced(latent, value, FlatFactors(A, B))

    @torch.no_grad()
    def activate(self, mask: Tensor) -> dict[str, Tensor]:
        """Make the ranks of ``mask`` (L, r_max) the active ones.

        A new rank gets a new row of A, and B = 0, so that the function stays. One that goes gets
        zeros in both.

        Returns
        -------
        dict
            ``A_loc`` and ``B_loc`` -> (total,) booleans: the entries of ranks that came or went.
        """
        assert self.active is not None
        mask = mask.to(self.active.device)
        changed = mask != self.active
        self.active.copy_(mask)
        entries_changed = {}
        for factor, value in (("A", self.start().A), ("B", torch.zeros(()))):
            name = f"{factor}_loc"
            entries = self.spread(factor, changed)
            parameter = self.get_parameter(name)
            parameter.copy_(torch.where(entries, value.to(parameter), parameter))
            entries_changed[name] = entries
        return entries_changed

    @property
    def draws_at_once(self) -> int:
        """The most draws of the factors that are held at a time, by `defaults.DRAWN_BYTES`."""
        size = sum(self.get_parameter(f"{f}_loc").nbytes for f in "AB")
        return max(1, defaults.DRAWN_BYTES // max(size, 1))

    # From factors to the products of the layers ------------------------------------------------

    def layer_factors(self, factors: FlatFactors, dtype: torch.dtype) -> dict[str, Factors]:
        """Return layer -> the matrices of its two products.

        They are cast and scaled once for all layers.
        """
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
        """Return layer -> (A (..., r, in), B (..., out, r)), unscaled; their product is the update.

        r counts the active ranks. Pooled factors give matrices of rank S r, whose product is the
        mean of the updates; with an `origin` there are r ranks more.
        """
        A, B = self._joined(self._terms(factors), factors.pooled, self.in_use)
        return {name: (A[name], B[name].mT) for name in self.specs}

    def update_norms(self, factors: FlatFactors) -> Tensor:
        """Return ‖s B A‖_F per draw and layer, (S, L).

        They come from the r x r Gram matrices BᵀB and A Aᵀ: no rotation of the ranks changes them.
        """
        norms = []
        for name, (A, B) in self.matrices(factors).items():
            squared = ((B.mT @ B) * (A @ A.mT)).sum((-2, -1)).clamp(min=0)
            norms.append(self.specs[name].scaling * squared.sqrt())
        return torch.stack(norms, dim=-1) if norms else factors.A

    def _terms(self, factors: FlatFactors) -> list[tuple[Tensor, Tensor]]:
        """Return flat pairs whose products add up to the update: A and B, or those of a start.

        With a start the update is

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
        """Return the matrices of all terms as those of one product, their ranks side by side."""
        (A, B), *others = ((split("A", a), split("B", b)) for a, b in terms)
        if pooled:
            A, B = pooled_product(A, B)
        for a, b in others:
            A = {name: torch.cat([A[name], a[name]], -2) for name in A}
            B = {name: torch.cat([B[name], b[name]], -2) for name in B}
        return A, B

    def _all(self, factor: str, value: Tensor) -> Matrices:
        return self.layouts[factor].matrices(value)

    def _scaled(self, B: Tensor) -> Tensor:
        """Return s B for every layer."""
        scalings = {spec.scaling for spec in self.specs.values()}
        if len(scalings) == 1:
            return B * scalings.pop()
        per_block = [self.specs[b.layer].scaling for b in self.layouts["B"].blocks]
        return self.layouts["B"].scale(B.new_tensor(per_block), B)
