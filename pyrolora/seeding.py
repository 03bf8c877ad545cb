"""Random numbers that depend on a seed alone, whichever thread draws them."""

from __future__ import annotations

import os
import random
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from typing import Any

import numpy as np
import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn

from pyrolora.checks import whole_number

Generators = tuple[Any, ...]


class Turns(ContextDecorator):
    """A re-entrant lock that one thread holds, or that several share which only run networks.

    ``with turns:`` holds it alone; ``with turns.shared():`` beside others that share it. Threads
    get it in the order in which they ask; one that shares it may not ask to be alone. While one
    thread holds it alone, torch's default dtype, which is the process's, is float32: parameters and
    draws are, whatever the caller has set.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # by itself, since Ctrl-C interrupts a condition's ends
        self._changed = threading.Condition(self._lock)
        self._queue: deque[int] = deque()
        self._owner: int | None = None
        self._depth = 0
        self._sharing: Counter[int] = Counter()
        self._callers_dtype = torch.float32

    def __enter__(self) -> None:
        before = self._depth if self.mine() else 0
        try:
            self._enter()
        except BaseException:
            self._leave(before)
            raise

    def _enter(self) -> None:
        me = threading.get_ident()
        with self._lock:
            if self._owner != me:
                assert not self._sharing[me], "a thread that shares the turn cannot have it alone"
                self._await(lambda: self._owner is None and not self._sharing.total())
                self._callers_dtype = torch.get_default_dtype()
                self._owner = me
                torch.set_default_dtype(torch.float32)
            self._depth += 1

    def __exit__(self, *_: object) -> None:
        left = None
        try:
            left = self._depth - 1
            self._leave(left)
        except BaseException:  # Ctrl-C: nobody else would ever let go
            self._leave(self._depth - 1 if left is None else left)
            raise

    def _leave(self, depth: int) -> None:
        """Hold it ``depth`` times from now on, if it is this thread's; doing so twice is harmless.

        It is not this thread's when a fit was interrupted, and again, while it was `released`.
        """
        with self._lock:
            if self.mine():
                self._depth = depth
                if not depth:
                    self._free()
            self._let_go()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold it beside others that share it, so that nobody is alone for the block."""
        me = threading.get_ident()
        before = self._sharing[me]
        try:
            with self._lock:
                if self._owner != me and not before:
                    self._await(lambda: self._owner is None)
                self._sharing[me] = before + 1
            yield
        finally:
            surely(lambda: self._share(me, before))

    def _share(self, thread: int, times: int) -> None:
        """Have a thread share it ``times`` times from now on."""
        with self._lock:
            self._sharing[thread] = times
            self._sharing += Counter()  # drops those at zero
            self._let_go()

    def mine(self) -> bool:
        """Return whether this thread holds it alone."""
        return self._owner == threading.get_ident()

    def awaited(self) -> bool:
        """Return whether other threads wait for it."""
        return bool(self._queue)

    @contextmanager
    def released(self) -> Iterator[None]:
        """Let others have it for the block, and those who wait already before it is taken back."""
        depth = self._depth
        try:
            self._leave(0)
            yield
        finally:
            surely(lambda: self._take(depth))  # what unwinds the stack needs it, too

    def _take(self, depth: int) -> None:
        self.__enter__()
        self._depth = depth

    @contextmanager
    def callers_dtype(self) -> Iterator[None]:
        """Have torch's default dtype as the caller set it, for code of the caller's."""
        if not self.mine() or self._callers_dtype == torch.float32:
            yield
            return
        torch.set_default_dtype(self._callers_dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)

    def forked(self) -> None:
        """Let go, in a forked process, of what threads hold that it does not have.

        Only the thread that forked lives on there; what the others were doing with a network stays
        as it was at that moment, and nobody ends it.
        """
        me = threading.get_ident()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._queue.clear()
        self._sharing = Counter({me: self._sharing[me]}) + Counter()
        if self._owner not in (None, me):
            self._depth = 0
            _PYRO_STACK.clear()
            self._free()

    def _free(self) -> None:
        torch.set_default_dtype(self._callers_dtype)
        self._owner = None

    def _await(self, free: Any) -> None:
        """Wait, with `_lock` held, until all who came before had their turn and it is free."""
        me = threading.get_ident()
        self._queue.append(me)
        self._changed.wait_for(lambda: self._queue[0] == me and free())
        self._let_go()

    def _let_go(self) -> None:
        """Tell all who wait that something has changed, and wait no more."""
        me = threading.get_ident()
        if me in self._queue:
            self._queue.remove(me)
        self._changed.notify_all()


def surely(work: Callable[[], None]) -> None:
    """Do work that can be done twice, and do it again where Ctrl-C interrupts it."""
    try:
        work()
    except BaseException:
        work()
        raise


DRAWING = Turns()
"""The lock of torch's generators, Pyro's stack of handlers and the modes of networks.

They are the process's. A thread that draws or trains holds it alone, and one that runs a network
shares it, so that posteriors can serve several threads, also beside a fit.
"""

_FITTING = threading.RLock()
_outside: list[Generators] = []  # generators of the process before each running fit


def _forked() -> None:
    """Make the locks usable in a forked process, whichever thread held them in its parent."""
    global _FITTING
    if not DRAWING.mine():
        _FITTING = threading.RLock()
        if _outside:  # a fit in another thread: the random numbers go on where they were before it
            _restore((*_outside[0][:3], []))
            _outside.clear()
    DRAWING.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw random numbers in this thread alone for the block; with a seed, from that seed alone.

    Torch's generators, of the CPU and of all accelerators, are then set back to what they were.
    """
    if seed is None:
        with DRAWING:
            yield
        return
    whole_number("seed", seed, at_least=0, at_most=2**64 - 1)
    with DRAWING:
        before = torch.get_rng_state(), _of_devices()
        try:
            seed_torch(int(seed))
            yield
        finally:
            torch.set_rng_state(before[0])
            _restore_devices(before[1])


def state_of(device: torch.device) -> torch.Tensor | None:
    """Return the state of torch's generator of a device; None where it cannot be copied."""
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def fitting() -> Iterator[None]:
    """Let this thread alone draw and run networks for the block, except at `give_way`.

    The process's random numbers, which the fit draws from a seed of its own, then go on where they
    were before.
    """
    with _FITTING, DRAWING:
        _outside.append(_generators())
        try:
            yield
        finally:
            _restore(_outside.pop())


def give_way(trained: nn.Module | None = None) -> None:
    """Let waiting threads draw and run networks between two steps of a fit.

    The module ``trained`` is in evaluation mode meanwhile, and after. The fit's random numbers go
    on where they were, and those of the process where they were before the fit.
    """
    if not (_outside and DRAWING.mine() and DRAWING.awaited()):
        return
    if trained is not None:
        trained.eval()
    of_fit = _generators()
    _restore(_outside[0])
    with DRAWING.released():
        pass
    _outside[0] = _generators()
    _restore(of_fit)


def seed_of_process(seed: int, number: int) -> int:
    """Return the seed of the noise of one of several processes that train together.

    Each gets another, unlike those of fits with a seed nearby. Numbers that have to agree among
    them are drawn with ``seed`` itself.
    """
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def seed_of_draw(seed: int, number: int) -> int:
    """Return the seed of one draw of a posterior whose fit had ``seed``.

    There is another for each number below 2**32, more than which torch's generator does not take,
    and they are far from small seeds.
    """
    first = int(np.random.SeedSequence(seed, spawn_key=(1,)).generate_state(1)[0])
    return (first + number) % 2**32


def _generators() -> Generators:
    """Return the states of all generators: of Python, NumPy, and torch on all devices in use."""
    devices = _of_devices() if _devices_in_use() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), devices


def _restore(states: Generators) -> None:
    python, numpy, cpu, devices = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    module = _device_module()
    if not devices and _devices_in_use() and hasattr(module, "manual_seed_all"):
        module.manual_seed_all(torch.initial_seed())  # in use since then: from the CPU's seed
    _restore_devices(devices)


def seed_torch(seed: int) -> None:
    """Seed torch's generators, as ``torch.manual_seed`` does.

    Without an accelerator that of the CPU is all there are, and torch would write down the caller's
    stack for devices to come, which takes longer than a draw.
    """
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def _device_module() -> Any:
    """Return torch's module of the accelerator, such as ``torch.cuda``, or None without one."""
    if not torch.accelerator.is_available():
        return None
    return torch.get_device_module(torch.accelerator.current_accelerator())


def _devices_in_use() -> bool:
    module = _device_module()
    return module is not None and getattr(module, "is_initialized", lambda: True)()


def _of_devices() -> list[Tensor]:
    """Return the states of the generators of all accelerators."""
    module = _device_module()
    if module is None:
        return []
    if module is torch.mps:  # there is one, and it has no number
        return [module.get_rng_state()]
    return [module.get_rng_state(number) for number in range(torch.accelerator.device_count())]


def _restore_devices(states: list[Tensor]) -> None:
    module = _device_module()
    for number, state in enumerate(states):
        module.set_rng_state(state, *(() if module is torch.mps else (number,)))
