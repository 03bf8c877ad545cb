"""Random numbers that depend on a seed alone, in whichever thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pyrolora.errors import whole_number

DRAWING = threading.RLock()
"""Torch's generators and Pyro's stack of handlers are the process's: who uses them to draw holds
this, so that posteriors can serve several threads."""


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """A context whose random numbers are drawn in this thread alone, and depend on ``seed`` alone,
    if there is one; torch's generators, of the CPU and of all GPUs, are then as they were before.
    """
    if seed is None:
        with DRAWING:
            yield
        return
    whole_number("seed", seed, at_least=0, at_most=2**64 - 1)
    with DRAWING, torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(int(seed))
        yield
