"""Whether draws can share a pass through a network: tried on a few rows, whatever its class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pyrolora.adapters.binding import Binding, Factors, SharedPassError

DRAWS, EXAMPLES = 3, 2
"""Numbers of draws, and of examples per draw, in the joint pass of a check."""
UPDATE = 0.5
"""The standard deviation of the random updates, about that of a layer's output."""
NUMBERS = 4
"""The number of random projections to which a row of a layer's input is reduced."""
TOLERANCE = {torch.float64: 0.02, torch.float32: 0.05}
"""Distance of rows that count as the same, relative to how rows differ among themselves.

Rounding is far below it, and other rows are at about 1. Shorter dtypes take `COARSE`.
"""
COARSE = 0.3


@dataclass
class Sharing:
    """Knowledge about one network with one set of adapted layers.

    Attributes
    ----------
    possible
        False after the first sign that draws cannot share a pass.
    checked
        The kinds of batches that were tried, by `kind_of`.
    seen
        The adapted layers that were called in a check.
    """

    possible: bool = True
    checked: set[Any] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)


_known: WeakKeyDictionary[nn.Module, dict[Any, Sharing]] = WeakKeyDictionary()


def sharing_of(network: nn.Module, layers: Iterable[str], copied_heads: Iterable[str]) -> Sharing:
    """Return the record of ``network`` with these adapted layers, and heads with a copy per draw.

    It lives as long as the network.
    """
    key = (frozenset(layers), frozenset(copied_heads))
    return _known.setdefault(network, {}).setdefault(key, Sharing())


def kind_of(batch: Mapping[str, Any]) -> Any:
    """Return what the order of rows in a network may depend on, as a key.

    It holds the columns, and which of their sizes are one: with a single example all copies of a
    check are equal, and say nothing about several.
    """
    return frozenset(
        (name, t.dtype, tuple(size > 1 for size in t.shape))
        for name, t in batch.items()
        if isinstance(t, Tensor)
    )


@torch.no_grad()
def shares(
    run: Callable[[dict[str, Any], Binding], Tensor],
    batch: Mapping[str, Any],
    plain: Binding,
    copied_heads: bool,
) -> tuple[bool, set[Any]]:
    """Return whether draws can share a pass, and the layers that were called.

    Each adapted layer, and each head with copies, then sees the rows of three draws in equal
    blocks, draw after draw. Three draws with two examples each run in one pass, and then each
    alone. In every call of a layer the joint pass has to have the very rows of the three, one after
    the other, and so does the output. The draws are random updates about as large as a layer's
    output, since those at the beginning of a fit do nothing; each has other examples where the
    batch has several, so that a router cannot send equal numbers of rows by chance. It costs the
    forward passes of 12 examples.

    Parameters
    ----------
    run
        The network's output for a batch under a binding, in evaluation mode.
    batch
        Examples of the kind that is to be run.
    plain
        Any setting: the layers, dtypes and devices of its factors count.
    copied_heads
        Whether each draw has its own copy of the heads.
    """
    size = len(next(iter(batch.values())))
    numbers = torch.tensor([1, 0, 0, 0, 1, 1]) if size == 2 else torch.arange(6) % size
    generator = torch.Generator().manual_seed(0)
    factors = {layer: _random(like, generator) for layer, like in plain.factors.items()}
    joint = _Pass(plain, factors, DRAWS if copied_heads else 1)
    try:
        together = run(_rows_of(batch, numbers), joint.binding)
    except (RuntimeError, ValueError, IndexError):  # the network's code mixes sizes up
        together = None
    alone, outputs = [], []
    for draw, examples in enumerate(numbers.split(EXAMPLES)):
        single = {layer: replace(f, A=f.A[draw], sB=f.sB[draw]) for layer, f in factors.items()}
        alone.append(_Pass(plain, single, 1))
        outputs.append(run(_rows_of(batch, examples), alone[-1].binding))
    called = set(joint.binding.used).union(*(one.binding.used for one in alone))
    if together is None or not _same(together, outputs, together.dtype):
        return False, called
    agreed = _agree(joint.rows, [one.rows for one in alone])
    if copied_heads:
        pairs = zip(joint.heads, alone, strict=True)
        agreed = agreed and all(_agree(rows, [one.heads[0]]) for rows, one in pairs)
    return agreed, called


class _Pass:
    """A binding whose layers and heads note their inputs."""

    def __init__(self, plain: Binding, factors: Mapping[Any, Factors], copies: int) -> None:
        self.rows: list[_Rows] = []
        self.heads: list[list[_Rows]] = [[] for _ in range(copies)]
        noting = {
            layer: _Noting(bound.A, bound.sB, place=place, rows=self.rows)
            for place, (layer, bound) in enumerate(factors.items())
        }
        heads = {
            slot: [_NotingHead(bound[0], place, rows) for rows in self.heads]
            for place, (slot, bound) in enumerate(plain.heads.items())
        }
        self.binding = Binding(noting, heads, eager=True)


@dataclass(frozen=True)
class _Rows:
    """The input of one call: the number of its layer, and each row reduced to a few numbers."""

    place: int
    numbers: Tensor
    dtype: torch.dtype


@dataclass(frozen=True)
class _Noting(Factors):
    place: int = 0
    rows: list[_Rows] = field(default_factory=list)

    def apply(self, layer: nn.Module, x: Tensor, training: bool) -> Tensor:
        self.rows.append(_Rows(self.place, _reduced(x), x.dtype))
        if self.A.dim() == 3 and x.shape[:-1].numel() % len(self.A):
            raise SharedPassError("rows that do not fall into blocks")
        return super().apply(layer, x, training)


class _NotingHead(nn.Module):
    def __init__(self, head: nn.Module, place: int, rows: list[_Rows]) -> None:
        super().__init__()
        self.head = head
        self.place = place
        self.rows = rows

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for arg in (*args, *kwargs.values()):
            if isinstance(arg, Tensor) and arg.dim():
                flat = arg.reshape(len(arg), -1)
                self.rows.append(_Rows(self.place, _reduced(flat), arg.dtype))
        return self.head(*args, **kwargs)


def _random(like: Factors, generator: torch.Generator) -> Factors:
    """Return random updates of rank one, one per draw."""
    inputs, outputs = like.A.shape[-1], like.sB.shape[-1]
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float32}
    A = torch.randn(DRAWS, 1, inputs, **options) / inputs**0.5
    sB = UPDATE * torch.randn(DRAWS, 1, outputs, **options)
    return Factors(A.to(like.A), sB.to(like.sB))


def _rows_of(batch: Mapping[str, Any], numbers: Tensor) -> dict[str, Any]:
    return {n: t[numbers.to(t.device)] if isinstance(t, Tensor) else t for n, t in batch.items()}


def _reduced(x: Tensor) -> Tensor:
    """Return random projections of each row, (rows, `NUMBERS`), the same for each width."""
    generator = torch.Generator().manual_seed(x.shape[-1])
    matrix = torch.randn(x.shape[-1], NUMBERS, generator=generator, dtype=torch.float32)
    return x.reshape(-1, x.shape[-1]).float() @ matrix.to(x.device)


def _agree(joint: Sequence[_Rows], alone: Sequence[Sequence[_Rows]]) -> bool:
    """Return whether the joint pass made the calls of each draw alone, with their rows in order."""
    if any([one.place for one in calls] != [one.place for one in joint] for calls in alone):
        return False
    together = zip(joint, *alone, strict=True)
    return all(_same(c[0].numbers, [one.numbers for one in c[1:]], c[0].dtype) for c in together)


def _same(joint: Tensor, alone: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Return whether ``joint`` is the concatenation of ``alone``, up to rounding."""
    if any(one.shape != alone[0].shape for one in alone):
        return False
    apart = torch.cat([*alone])
    if joint.shape != apart.shape:
        return False
    joint, apart = joint.float(), apart.float()
    spread = (apart - apart.mean(0)).norm()
    rounding = 100 * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    bound = TOLERANCE.get(dtype, COARSE) * spread + min(rounding, 0.1) * apart.norm()
    return bool((joint - apart).norm() <= bound)
