"""Which ranks of which layers are in use, where the layers share one budget of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyrolora.adapters.config import AdapterConfig
from pyrolora.adapters.layout import Block, Layout, Matrices
from pyrolora.adapters.targets import LayerSpec
from pyrolora.distributions import map_blocks
from pyrolora.parameters import ParamModule


class RankedLayouts(ParamModule):
    """Layouts of the factors of all layers, with a slot per rank, and the ranks that are in use.

    Masks of ranks are (L, r_max) booleans, with the layers in the order of ``specs``.

    Parameters
    ----------
    specs
        The adapted layers; none where the network itself is trained.
    config
        The adapter configuration.

    Attributes
    ----------
    layouts
        The layouts of ``"A"`` and of ``"B"``.
    active
        Mask of the ranks in use, where ``config`` has the layers share a budget; else None: all
        are. The others, idle, have zeros in A and B.
    """

    active: Tensor | None

    def __init__(self, specs: Sequence[LayerSpec], config: AdapterConfig) -> None:
        super().__init__()
        self.specs = {spec.name: spec for spec in specs}
        self.config = config
        slots = {spec.name: _slots(spec, config) for spec in specs}
        self.layouts: Mapping[str, Layout] = {
            "A": Layout(
                [Block(s.name, "A", slots[s.name], s.in_features, s.lookup) for s in specs]
            ),
            "B": Layout([Block(s.name, "B", slots[s.name], s.out_features) for s in specs]),
        }
        active = None
        if config.allocation is not None:
            active = self.slots()
            if config.allocation.schedule == "move":
                ranks = torch.tensor([spec.rank for spec in specs]).unsqueeze(-1)
                active = torch.arange(self.layouts["A"].rank) < ranks
        self.register_buffer("active", active)

    def layout(self, latent: str) -> Layout:
        """Return the layout of the latent factors: ``"A"``, ``"B"``, or ``"AB"``, A's blocks first.

        A guide names its latent factors so.
        """
        if latent == "AB":
            return self.layouts["A"] + self.layouts["B"]
        return self.layouts[latent]

    def moves(self) -> bool:
        """Return whether training changes which ranks are in use; with frozen means it does not."""
        return self.active is not None and self.get_parameter("A_loc").requires_grad

    def ranks(self) -> dict[str, int]:
        """Return layer -> its number of active ranks."""
        return dict(zip(self.specs, self.mask().sum(-1).tolist(), strict=True))

    def budget(self) -> int:
        """Return the sum of the ranks that the configuration gives."""
        return sum(spec.rank for spec in self.specs.values())

    def slots(self) -> Tensor:
        """Return the mask of the ranks that each layer has room for."""
        return self.layouts["A"].rank_mask()[self._places("A")]

    def mask(self) -> Tensor:
        """Return the mask of the active ranks."""
        return self.slots() if self.active is None else self.active

    def rows(self, latent: str) -> Tensor | None:
        """Return `mask` by the blocks of ``layout(latent)``; None where all ranks are active."""
        return None if self.active is None else self.by_block(latent, self.active)

    def entries(self, latent: str) -> Tensor | None:
        """Return which entries belong to active ranks, (total,); None where all do."""
        return None if self.active is None else self.spread(latent, self.active)

    def by_block(self, latent: str, ranks: Tensor) -> Tensor:
        """Reorder a mask from the order of ``specs`` to the blocks of ``layout(latent)``."""
        return torch.cat([ranks[self._numbers(factor)] for factor in latent])

    def spread(self, latent: str, ranks: Tensor) -> Tensor:
        """Expand a mask to the entries of ``layout(latent)``, (total,) booleans."""
        layout = self.layout(latent)
        rows = self.by_block(latent, ranks)
        ones = torch.ones(layout.total, dtype=torch.bool, device=rows.device)
        return map_blocks(torch.mul, rows[..., None], ones, layout.groups)

    def kept(self, factor: str, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``value`` (..., total) of a factor with zeros in all idle ranks.

        ``mask`` (..., L, r_max), if passed, says which ranks count as active.
        """
        rows = self.rows(factor) if mask is None else mask[..., self._numbers(factor), :]
        if rows is None:
            return value
        return map_blocks(torch.mul, rows[..., None], value, self.layouts[factor].groups)

    def in_use(self, factor: str, value: Tensor) -> Matrices:
        """Return layer -> the active rows, (..., r, columns), of a factor (..., total)."""
        matrices = self.layouts[factor].matrices(value)
        if self.active is None:
            return matrices
        rows = dict(zip(self.specs, self.active, strict=True))
        return {n: matrix[..., rows[n][: matrix.shape[-2]], :] for n, matrix in matrices.items()}

    def _numbers(self, factor: str) -> list[int]:
        """Return the layer's index in ``specs`` for each block of ``factor``."""
        numbers = {name: number for number, name in enumerate(self.specs)}
        return [numbers[block.layer] for block in self.layouts[factor].blocks]

    def _places(self, factor: str) -> list[int]:
        """Return the index of its block of ``factor`` for each layer in ``specs``."""
        places = {block.layer: place for place, block in enumerate(self.layouts[factor].blocks)}
        return [places[name] for name in self.specs]


def _slots(spec: LayerSpec, config: AdapterConfig) -> int:
    """Return for how many ranks a layer has room."""
    if config.allocation is None:
        return spec.rank
    return config.allocation.slots(spec.rank, min(spec.in_features, spec.out_features))
