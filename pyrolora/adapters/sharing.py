"""Whether draws can share a pass through a network: seen on a few rows, not known by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pyrolora.adapters.binding import Binding, Factors, SharedPassError

DRAWS, EXAMPLES = 3, 2
"""Of the joint pass of a check; each draw then has a pass of its own."""
UPDATE = 0.5
"""The standard deviation of the random updates: of the order of a layer's output."""
NUMBERS = 4
"""To how many random projections a row of a layer's input is reduced."""
TOLERANCE = {torch.float64: 0.02, torch.float32: 0.05}
"""Distance of rows that count as the same, relative to how rows differ among themselves: rounding
is far below it, and other rows are at about 1. Of shorter numbers it is `COARSE`."""
COARSE = 0.3


@dataclass
class Sharing:
    """What is known of one network with one set of adapted layers.

    Attributes
    ----------
    possible
        False after the first sign that draws cannot share a pass.
    checked
        The kinds of batches that were tried.
    seen
        The adapted layers that were called in a check.
    """

    possible: bool = True
    checked: set[Any] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)


_known: WeakKeyDictionary[nn.Module, dict[Any, Sharing]] = WeakKeyDictionary()


def sharing_of(network: nn.Module, layers: Iterable[str], copied_heads: Iterable[str]) -> Sharing:
    """The record of ``network`` with these adapted layers, and heads of which each draw has a copy;
    it lives as long as the network."""
    key = (frozenset(layers), frozenset(copied_heads))
    return _known.setdefault(network, {}).setdefault(key, Sharing())


def kind_of(batch: Mapping[str, Any]) -> Any:
    """What the order of rows in a network may depend on: the columns, and which sizes are one; of
    one example alone the copies of a check are equal, and say nothing of several."""
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
) -> tuple[bool, set[nn.Module]]:
    """Whether each adapted layer, and each head with copies, sees the rows of three draws in equal
    blocks, draw after draw; and the layers that were called.

    Three draws with two examples each run in one pass, and then each alone. In every call of a
    layer the joint pass has to have the very rows of the three, one after the other, and so does
    the output. The draws are random updates about as large as a layer's output, since those of a
    fit that begins do nothing; each has other examples where the batch has several, so that a
    router cannot send equal numbers of rows by chance. Cost: the forward passes of 12 examples.

    Parameters
    ----------
    run
        The network's output for a batch under a binding, in evaluation mode.
    batch
        Examples of the kind that is to be run.
    plain
        Any setting: of its factors the layers, dtypes and devices count.
    copied_heads
        Whether draws have heads of their own.
    """
    size = len(next(iter(batch.values())))
    numbers = torch.tensor([1, 0, 0, 0, 1, 1]) if size == 2 else torch.arange(6) % size
    generator = torch.Generator().manual_seed(0)
    factors = {layer: _random(own, generator) for layer, own in plain.factors.items()}
    joint = _Pass(plain, factors, DRAWS if copied_heads else 1)
    try:
        together = run(_rows_of(batch, numbers), joint.binding)
    except (RuntimeError, ValueError, IndexError):  # of sizes that the network's code mixes up
        together = None
    alone, outputs = [], []
    for draw, own in enumerate(numbers.split(EXAMPLES)):
        single = {layer: replace(f, A=f.A[draw], sB=f.sB[draw]) for layer, f in factors.items()}
        alone.append(_Pass(plain, single, 1))
        outputs.append(run(_rows_of(batch, own), alone[-1].binding))
    called = set(joint.binding.used).union(*(one.binding.used for one in alone))
    if together is None or not _same(together, outputs, together.dtype):
        return False, called
    agreed = _agree(joint.rows, [one.rows for one in alone])
    if copied_heads:
        own = zip(joint.heads, alone, strict=True)
        agreed = agreed and all(_agree(rows, [one.heads[0]]) for rows, one in own)
    return agreed, called


class _Pass:
    """A binding whose layers, and whose heads, note what they are given."""

    def __init__(self, plain: Binding, factors: Mapping[nn.Module, Factors], copies: int) -> None:
        self.rows: list[_Rows] = []
        self.heads: list[list[_Rows]] = [[] for _ in range(copies)]
        noting = {
            layer: _Noting(own.A, own.sB, place=place, rows=self.rows)
            for place, (layer, own) in enumerate(factors.items())
        }
        heads = {
            slot: [_NotingHead(bound[0], place, rows) for rows in self.heads]
            for place, (slot, bound) in enumerate(plain.heads.items())
        }
        self.binding = Binding(noting, heads)


@dataclass(frozen=True)
class _Rows:
    """What one call was given: by which layer, and each row reduced to a few numbers."""

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


def _random(own: Factors, generator: torch.Generator) -> Factors:
    """Updates of rank one, another for each draw."""
    inputs, outputs = own.A.shape[-1], own.sB.shape[-1]
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float32}
    A = torch.randn(DRAWS, 1, inputs, **options) / inputs**0.5
    sB = UPDATE * torch.randn(DRAWS, 1, outputs, **options)
    return Factors(A.to(own.A), sB.to(own.sB))


def _rows_of(batch: Mapping[str, Any], numbers: Tensor) -> dict[str, Any]:
    return {n: t[numbers.to(t.device)] if isinstance(t, Tensor) else t for n, t in batch.items()}


def _reduced(x: Tensor) -> Tensor:
    """(rows, `NUMBERS`): random projections, the same for each width."""
    generator = torch.Generator().manual_seed(x.shape[-1])
    matrix = torch.randn(x.shape[-1], NUMBERS, generator=generator, dtype=torch.float32)
    return x.reshape(-1, x.shape[-1]).float() @ matrix.to(x.device)


def _agree(joint: Sequence[_Rows], alone: Sequence[Sequence[_Rows]]) -> bool:
    """Whether the joint pass has the calls of each draw's own, and their rows draw after draw."""
    if any([one.place for one in own] != [one.place for one in joint] for own in alone):
        return False
    calls = zip(joint, *alone, strict=True)
    return all(_same(c[0].numbers, [one.numbers for one in c[1:]], c[0].dtype) for c in calls)


def _same(joint: Tensor, alone: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether ``joint`` is the tensors of ``alone`` one after the other, up to rounding."""
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
