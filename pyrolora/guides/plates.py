"""Plates of draws, their weights, and the shapes that they leave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import pyro
import torch
from pyro import poutine
from torch import Tensor


def spread(stored: int, num_samples: int) -> Tensor:
    """Return numbers of stored draws, evenly spaced; where there are fewer, they repeat."""
    return torch.arange(num_samples) * stored // num_samples


def tempered(kl_weight: float) -> AbstractContextManager[object]:
    """Scale the log-density of the latent sites inside by β; for model and guide alike."""
    return poutine.scale(scale=kl_weight)


@contextmanager
def averaged(name: str, count: int) -> Iterator[None]:
    """Open a plate of ``count`` draws at dimension -2 that averages their log-densities.

    For a count of 1 there is no plate.
    """
    with ExitStack() as stack:
        if count > 1:
            stack.enter_context(pyro.plate(name, count, dim=-2))
            stack.enter_context(poutine.scale(scale=1 / count))
        yield


def flat(value: Tensor) -> Tensor:
    """Return the value of a site without the inner plate's dimension: (total,), or (S, total)."""
    return value.squeeze(-2) if value.dim() > 2 else value


def without_plate(value: Tensor, event_dim: int, plates: int) -> Tensor:
    """Drop the dimension of 1 that a site outside of the inner plate has in its place."""
    return value if plates > 1 else value.squeeze(-1 - event_dim)
