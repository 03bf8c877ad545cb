"""How the means of the factors start, by name. B always starts at zero: the function unchanged."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyrolora.types import INITIALIZERS


def kaiming(rank: int, columns: int) -> Tensor:
    """PEFT's default for A: uniform on ±1/sqrt(in)."""
    return nn.init.kaiming_uniform_(torch.empty(rank, columns), a=math.sqrt(5))


def gaussian(rank: int, columns: int) -> Tensor:
    """PEFT's ``"gaussian"`` for A: standard deviation 1/r."""
    return torch.randn(rank, columns) / rank


_REGISTRY: dict[str, Callable[[int, int], Tensor]] = {"kaiming": kaiming, "gaussian": gaussian}
assert tuple(_REGISTRY) == INITIALIZERS


def initial_factor(name: str, rank: int, columns: int) -> Tensor:
    """The start of one A, (rank, columns)."""
    return _REGISTRY[name](rank, columns)
