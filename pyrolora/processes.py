"""Work that the processes of a run share out, in blocks that all of them open."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import distributed, nn

from pyrolora.checks import positive
from pyrolora.errors import ConfigError

T = TypeVar("T")
R = TypeVar("R")

PATIENCE = 600.0
"""Seconds that a process waits for the others at the beginning of a block."""

_OPEN: ContextVar[Any] = ContextVar("_OPEN", default=None)
"""The group of processes of the block that is open in this thread; False where it works `alone`."""
_groups: dict[Any, Any] = {}  # the group of all processes -> the one that carries objects


@contextmanager
def all_processes(timeout: float = PATIENCE) -> Iterator[None]:
    """Share predictions out over all processes of the run for the block.

    Outside of such blocks each process predicts everything that it is asked, alone, and waits for
    nobody: ``if rank == 0: posterior.predict(...)`` is fine. Within one, every process makes the
    same calls in the same order, and has the whole results of one process, number by number: each
    predicts every W-th batch of `Posterior.predict`, `Posterior.evaluate` and whatever is made of
    them, or writes every W-th batch of prompts of `Posterior.generate`, and they exchange what they
    have. Draws without a seed are those of the first process.

    In a script that runs in one process the block changes nothing.

    Parameters
    ----------
    timeout
        Seconds to wait until all processes have opened the block.

    Raises
    ------
    ConfigError
        When some process does not open it in time, or when processes ask for different things.

    Examples
    --------
    ``torchrun --nproc_per_node 4 score.py`` with

        posterior = pyrolora.load("run")
        with pyrolora.all_processes():
            metrics = posterior.evaluate(test, seed=0)
    """
    positive("timeout", timeout)
    group = None if _OPEN.get() is not None else _group_of_run()
    if group is None:
        yield
        return
    _meet(group, timeout)
    token = _OPEN.set(group)
    try:
        yield
    finally:
        _OPEN.reset(token)
    _exchanged(group, "the end of the block")  # after an error nobody waits for the others


def is_sharded(network: nn.Module) -> bool:
    """Return whether each process has a part of the network's weights, as under FSDP2."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # it takes long to import
    return fsdp is not None and isinstance(network, fsdp.FSDPModule)


def take_part() -> bool:
    """Return whether all processes take part in what this thread does."""
    return bool(_OPEN.get())


def shared_out(
    items: Sequence[T], work: Callable[[Sequence[T]], Sequence[R]], subject: Any = None
) -> list[R]:
    """Return the results of ``work``, one for each item, made by all processes of an open block.

    Process r of W has the items r, r + W, r + 2 W, ... Without a block, it has all of them.

    Parameters
    ----------
    items
        The same in all processes.
    work
        Turns some of the items to as many results, tensors of which lie on the CPU.
    subject
        Describes the call, so that different ones of the processes are not mixed.

    Raises
    ------
    ConfigError
        When the processes did not ask for the same.
    Exception
        The error of this process, else the first one of another.
    """
    group = _OPEN.get()
    if not group:
        return [*work(items)]
    rank, count = group.rank(), group.size()
    results: Sequence[R] = []
    error = None
    try:
        results = work(items[rank::count])
    except Exception as raised:  # the others wait for this process, whatever happened
        error = raised
    mine = (list(items), subject), results, _portable(error)
    answers = _exchanged(group, "work to share out", mine)
    if error is not None:
        raise error
    for number, (_, _, other) in enumerate(answers):
        if other is not None:
            other.add_note(f"(in process {number} of {count})")
            raise other
    if any(answer[0] != answers[0][0] for answer in answers):
        raise ConfigError(
            f"the {count} processes of all_processes() asked for different things; make the same "
            "calls in each, with the same data, draws and seed"
        )
    return [answers[place % count][1][place // count] for place in range(len(items))]


def share_generators(device: torch.device) -> None:
    """Set torch's random numbers, of the CPU and of ``device``, to those of the first process."""
    group = _OPEN.get()
    if not group:
        return
    states: list[Any] = [torch.get_rng_state(), None]
    if device.type == "cuda":
        states[1] = torch.cuda.get_rng_state(device)
    states = _exchanged(group, "draws without a seed", states)[0]
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)


def check_agreement(what: str, value: Any, remedy: str) -> None:
    """Raise `ConfigError` unless all processes of an open block have the same value."""
    group = _OPEN.get()
    if not group:
        return
    values = _exchanged(group, what, value)
    if any(other != values[0] for other in values):
        found = ", ".join(f"process {i} has {other}" for i, other in enumerate(values))
        raise ConfigError(f"the processes differ in {what}: {found}; {remedy}")


@contextmanager
def alone() -> Iterator[None]:
    """Have this process train and predict for itself for the block, as if it were the only one.

    The Trainer and accelerate know of other processes by two states, which say otherwise meanwhile.
    """
    states = PartialState._shared_state, AcceleratorState._shared_state
    before, token = [dict(state) for state in states], _OPEN.set(False)
    only = {"num_processes": 1, "process_index": 0, "local_process_index": 0}
    states[0].update(distributed_type=DistributedType.NO, backend=None, **only)
    states[1].clear()
    try:
        yield
    finally:
        for state, kept in zip(states, before, strict=True):
            state.clear()
            state.update(kept)
        _OPEN.reset(token)


def launched() -> int:
    """Return the number of processes that the launcher has started, or that have found together."""
    if distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_world_size())
    # Schedulers of machines set the first as well, with another meaning.
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def processes() -> int:
    """Return the number of processes that take part in what this thread does."""
    group = _OPEN.get()
    return int(group.size()) if group else 1


def _group_of_run() -> Any:
    """Return the group that carries objects between all processes; None for one process."""
    if not distributed.is_available() or launched() == 1:
        return None
    if not distributed.is_initialized():
        PartialState(cpu=not torch.accelerator.is_available())  # as the Trainer does it
    whole = distributed.group.WORLD
    if whole not in _groups:
        _groups.clear()
        carries = distributed.get_backend(whole) == "gloo"
        _groups[whole] = whole if carries else distributed.new_group(backend="gloo")
    return _groups[whole]


def _meet(group: Any, timeout: float) -> None:
    try:
        distributed.monitored_barrier(group, timedelta(seconds=timeout), wait_all_ranks=True)
    except RuntimeError as error:
        raise ConfigError(
            f"process {group.rank()} of {group.size()} has waited {timeout:g} s for all others to "
            "open all_processes(), or to reach an evaluation of the fit, and they have not "
            f"({str(error).splitlines()[0]:.200}); open it in every process, not under "
            "'if rank == 0', or leave it out: then each process works alone"
        ) from error


def _exchanged(group: Any, what: str, value: Any = None) -> list[Any]:
    """Return the values of all processes, in their order, which have to be at the same place."""
    answers: list[Any] = [None] * group.size()
    distributed.all_gather_object(answers, (what, value), group=group)
    places = [place for place, _ in answers]
    if len({*places}) > 1:
        raise ConfigError(
            "the processes of all_processes() make different calls: "
            f"{', '.join(f'process {i} is at {place}' for i, place in enumerate(places))}; make "
            "the same calls in each, in the same order"
        )
    return [answer for _, answer in answers]


def _portable(error: Exception | None) -> Exception | None:
    """Return the error without what it carries beside its text, or as text if it cannot be sent."""
    if error is None:
        return None
    try:
        plain = type(error)(*error.args)
        pickle.loads(pickle.dumps(plain))  # of this process
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return plain
