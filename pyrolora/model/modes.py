"""Training and evaluation mode of networks that hold more than weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from pyrolora.adapters import is_quantised_layer


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode for the block, and every submodule back in its mode.

    Quantised layers stay in training mode, as in `AdaptedNetwork.train`.
    """
    trained = [child for child in module.modules() if child.training]
    try:
        if not all(map(is_quantised_layer, trained)):
            module.eval()
            for child in filter(is_quantised_layer, trained):
                child.train()
        yield
    finally:
        for child in trained:
            child.training = True


def running_statistics(module: nn.Module) -> list[nn.Module]:
    """Return the normalisations in ``module`` that keep running statistics of their input."""
    return [m for m in module.modules() if isinstance(getattr(m, "running_mean", None), Tensor)]
