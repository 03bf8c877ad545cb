"""Checks of numbers before, and of errors during, a decomposition of matrices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pyrolora.errors import NonFiniteError


def check_finite(name: str, *tensors: Tensor, remedy: str) -> None:
    """Raise `NonFiniteError` unless all numbers of the tensors are finite."""
    broken = sum(int((~tensor.isfinite()).sum()) for tensor in tensors)
    if broken:
        total = sum(tensor.numel() for tensor in tensors)
        raise NonFiniteError(
            f"{name} is not finite: NaN or infinity in {broken} of {total} numbers; {remedy}"
        )


@contextmanager
def decomposing(name: str, *matrices: Tensor, remedy: str) -> Iterator[None]:
    """Raise `NonFiniteError` for matrices that are not finite, or that the block cannot decompose.

    LAPACK raises an error for some matrices with NaN or infinity, and returns NaN for others.
    """
    check_finite(name, *matrices, remedy=remedy)
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NonFiniteError(f"{name} cannot be decomposed: {error}; {remedy}") from error
