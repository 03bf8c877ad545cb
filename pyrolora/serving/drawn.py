"""Draws that requests keep asking for, kept in memory within a budget."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any

from torch import Tensor

from pyrolora.adapters import AnyFactors, FlatFactors, LaterFactors
from pyrolora.posterior import Posterior

BUDGET = 2**28
"""Bytes of all draws that are kept, 256 MiB."""


Draws = tuple[AnyFactors, Tensor | None]
"""The factors of draws, and the state of the random numbers after them."""


class Drawn:
    """The factors of draws by posterior, number and seed; the least recently used leave first.

    A posterior that is let go takes its draws with it. One thread may use it.

    Parameters
    ----------
    budget
        The most bytes. Draws that are larger, or made some at a time, are made anew for every
        batch.
    """

    def __init__(self, budget: int = BUDGET) -> None:
        self.budget = budget
        self.bytes = 0
        self._kept: OrderedDict[tuple[Any, bool, Any], Draws] = OrderedDict()

    def factors(
        self,
        posterior: Posterior,
        num_samples: int,
        seed: int | None,
        draws: tuple[int, ...] | None = None,
    ) -> AnyFactors:
        """Return the factors of the numbered ``draws``, or of ``num_samples`` of ``seed``.

        Those of 0 draws are the mean adapter's.
        """
        return self._made(posterior, num_samples, seed, draws)[0]

    def drawn(
        self,
        posterior: Posterior,
        num_samples: int,
        seed: int | None,
        draws: tuple[int, ...] | None = None,
    ) -> Draws:
        """Return `factors`, and the state of the random numbers that sample tokens after them."""
        if draws is not None:  # they use none, and are the same for every seed of the tokens
            return self._made(posterior, num_samples, None, draws)[0], posterior.predictor.fresh(
                seed
            )
        return self._made(posterior, num_samples, seed, draws)

    def _made(
        self,
        posterior: Posterior,
        num_samples: int,
        seed: int | None,
        draws: tuple[int, ...] | None,
    ) -> Draws:
        asked = draws if draws is not None else (num_samples, seed)
        key = (weakref.ref(posterior, self._forget), draws is not None, asked)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        made = posterior.predictor.drawn(num_samples, seed, draws)
        repeatable = draws is not None or (num_samples and seed is not None)
        if isinstance(made[0], LaterFactors):  # they have the random numbers' states, not factors
            return made
        size = _bytes(made[0])
        if repeatable and size <= self.budget:
            self._kept[key] = made
            self.bytes += size
            while self.bytes > self.budget:
                self.bytes -= _bytes(self._kept.popitem(last=False)[1][0])
        return made

    def _forget(self, gone: Any) -> None:
        for key in [key for key in self._kept if key[0] is gone]:
            self.bytes -= _bytes(self._kept.pop(key)[0])


def _bytes(factors: AnyFactors) -> int:
    """Return the bytes of a draw's tensors, those of views that repeat one row included once."""
    assert isinstance(factors, FlatFactors)
    tensors = (factors.A, factors.B, factors.members, factors.seeds, factors.head)
    return sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor) and t.dim())
