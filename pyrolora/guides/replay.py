"""Draws of a guide some at a time, with the random numbers that all of them would have at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

R = TypeVar("R")

BLOCK = 16
"""Torch fills a tensor on the CPU with normal numbers in blocks of this many."""
FACTORIES = {"randn": "normal_", "rand": "uniform_"}
FILLS = ("normal_", "uniform_", "bernoulli_", "exponential_")
SAMPLERS = ("_standard_gamma", "_sample_dirichlet", "bernoulli")


class CannotReplayError(Exception):
    """Raised for random numbers of which some cannot be made without all others."""


@dataclass(frozen=True)
class _Call:
    """The states of the generator before a call: one, or, of a stream, one for each draw."""

    states: tuple[Tensor, ...]


class Replay:
    """S draws from a guide, of which any run is made again when it is asked for.

    Sampling S draws takes one tensor of random numbers after the other, each with all draws. The
    numbers of the draws ``start`` to ``stop`` are cut out of each: where torch fills a tensor in
    order (normal numbers on the CPU), from the state of the generator that they start with, and no
    others are made; small tensors, and those of other laws, are made whole and cut. So draws do not
    depend on how many are made at a time. An accelerator fills in no such order: there each draw's
    normal numbers have a seed of their own, and are others than those of S draws at once.

    Made with the state of torch's generator as it is, which is left as S draws at once leave it.
    Later runs do not touch it. Memory: 5 kB per draw and random tensor.

    Parameters
    ----------
    sample
        Traces the guide on some draws, in a plate of that many at dimension -2.
    draws
        S, two or more.

    Raises
    ------
    CannotReplayError
        For a guide that samples in other ways than `FILLS` and `SAMPLERS`, or by a parameter of
        these that differs between draws; and on a device without generators.
    """

    def __init__(self, sample: Callable[[int], Trace], draws: int) -> None:
        self.draws = draws
        self._sample = sample
        self._calls: list[_Call] = []
        generator = torch.Generator()
        generator.set_state(torch.get_rng_state())
        with torch.no_grad(), _Recorder(self._calls, draws, generator):
            sample(2)
        torch.set_rng_state(generator.get_state())

    def trace(self, start: int, stop: int) -> Trace:
        """Return the trace of the guide on the draws ``start`` to ``stop``, without the last."""
        with torch.no_grad(), _Player(self._calls, self.draws, start, stop):
            return self._sample(stop - start)

    def reading(self, read: Callable[[Trace], R]) -> Callable[[int, int], R]:
        """Return a function that reads the trace of a run of the draws."""
        return lambda start, stop: read(self.trace(start, stop))


class _Random(TorchDispatchMode):
    """Serves the random operators of torch with the numbers of the draws start to stop of S."""

    def __init__(self, draws: int, start: int, stop: int, generator: torch.Generator) -> None:
        super().__init__()
        self.draws, self.start, self.stop = draws, start, stop
        self.generator = generator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in FACTORIES:
            made = torch.empty(*args, **kwargs)
            return self._filled(FACTORIES[name], made, ())
        if name in FILLS and not any(isinstance(arg, Tensor) for arg in args[1:]):
            return self._filled(name, args[0], args[1:])
        if name in SAMPLERS and len(args) == 1:
            return self._sampled(func, args[0])
        raise CannotReplayError(str(func))

    def _filled(self, name: str, tensor: Tensor, args: Any) -> Tensor:
        count = self._rows(tensor)
        size = tensor.numel() // count
        if name == "normal_" and size >= BLOCK and tensor.is_contiguous():
            if tensor.device.type == "cpu":
                return self._streamed(tensor.view(-1), size, args).view(tensor.shape)
            seed = self._seed()
            for draw, row in enumerate(tensor, self.start):
                row.normal_(*args, generator=_seeded(tensor.device, seed + draw))
            return tensor
        whole = tensor.new_empty(self.draws, *tensor.shape[1:])
        getattr(whole, name)(*args, generator=self._for_whole(tensor.device))
        return tensor.copy_(whole[self.start : self.stop])

    def _sampled(self, func: Any, parameter: Tensor) -> Tensor:
        self._rows(parameter)
        if not torch.equal(parameter[:1].expand_as(parameter), parameter):
            raise CannotReplayError(f"{func} of draws")  # each draw has another parameter
        every = parameter[:1].expand(self.draws, *parameter.shape[1:])
        whole: Tensor = func(every, generator=self._for_whole(parameter.device))
        return whole[self.start : self.stop].clone()

    def _rows(self, tensor: Tensor) -> int:
        """Return how many draws the tensor has, its first dimension."""
        count = self.stop - self.start
        if not tensor.dim() or len(tensor) != count:
            raise CannotReplayError(f"{tuple(tensor.shape)}, outside of the plate of draws")
        return count

    def _streamed(self, flat: Tensor, size: int, args: Any) -> Tensor:
        """Fill ``flat`` with the normal numbers of its draws, ``size`` each."""
        first, last = self._bounds(size)
        start, stop = self.start * size, self.stop * size
        if (first, last) == (start, stop):
            return flat.normal_(*args, generator=self.generator)
        around = flat.new_empty(last - first).normal_(*args, generator=self.generator)
        return flat.copy_(around[start - first : stop - first])

    def _bounds(self, size: int) -> tuple[int, int]:
        """Return the first and the last number of the blocks that hold the draws' numbers.

        The last block of all is the last 16 numbers, which are drawn again where it is not full.
        """
        first = _whole_blocks(self.start * size)
        if self.stop == self.draws:
            return first, self.draws * size
        return first, _whole_blocks(self.stop * size + BLOCK - 1)

    def _for_whole(self, device: torch.device) -> torch.Generator:
        """Return the generator of a tensor that is made whole."""
        if device.type != "cpu":
            return _seeded(device, self._seed())
        self._next()
        return self.generator

    def _seed(self) -> int:
        self._next()
        return int(torch.randint(2**62, (), generator=self.generator))

    def _next(self) -> None:
        """Note the state of the generator before a call, or set it to the one that was noted."""
        raise NotImplementedError


class _Recorder(_Random):
    """Draws the first two of S draws, and notes the states of the generator for all."""

    def __init__(self, calls: list[_Call], draws: int, generator: torch.Generator) -> None:
        super().__init__(draws, 0, 2, generator)
        self.calls = calls

    def _streamed(self, flat: Tensor, size: int, args: Any) -> Tensor:
        states = []
        for draw in range(self.draws):
            states.append(self.generator.get_state())
            last = draw + 1 == self.draws
            end = self.draws * size if last else _whole_blocks((draw + 1) * size)
            count = end - _whole_blocks(draw * size)
            flat.new_empty(count).normal_(*args, generator=self.generator)
        after = self.generator.get_state()
        self.calls.append(_Call(tuple(states)))
        self.generator.set_state(states[0])
        filled = super()._streamed(flat, size, args)
        self.generator.set_state(after)
        return filled

    def _next(self) -> None:
        self.calls.append(_Call((self.generator.get_state(),)))


class _Player(_Random):
    """Draws some of the draws, from the states that were noted."""

    def __init__(self, calls: list[_Call], draws: int, start: int, stop: int) -> None:
        super().__init__(draws, start, stop, torch.Generator())
        self.calls = iter(calls)

    def _streamed(self, flat: Tensor, size: int, args: Any) -> Tensor:
        self.generator.set_state(next(self.calls).states[self.start])
        return super()._streamed(flat, size, args)

    def _next(self) -> None:
        self.generator.set_state(next(self.calls).states[0])


def _seeded(device: torch.device, seed: int) -> torch.Generator:
    try:
        return torch.Generator(device).manual_seed(seed)
    except RuntimeError as error:
        raise CannotReplayError(f"no generators of {device}") from error


def _whole_blocks(count: int) -> int:
    return count // BLOCK * BLOCK
