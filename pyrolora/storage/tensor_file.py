"""Tensors of a safetensors file: the header first, values once their sizes are known to fit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from pyrolora.errors import CheckpointError
from pyrolora.files import opened, read_bytes, shown, strict_json

MOST_HEADER = 10**8
"""The largest header, in bytes; that of safetensors itself."""
AT_ONCE = 2**30

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorFile:
    """A file of tensors; ``declared`` has their names, shapes and dtypes, without values."""

    path: Path
    declared: Mapping[str, Tensor]
    size: int

    def read(self, digest: str | None = None) -> dict[str, Tensor]:
        """Read the tensors, all of them finite, from the file that has this SHA-256.

        Raises
        ------
        CheckpointError
            When the file is another one, is damaged, or has a NaN or an infinity.
        """
        with opened(self.path) as (stream, size):
            content = stream.read(self.size + 1) if size == self.size else b""
        if digest is not None and hashlib.sha256(content).hexdigest() != digest:
            raise CheckpointError(other_file(self.path))
        try:
            tensors = load(content)
        except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"cannot read the saved tensors {self.path}: {error}; restore it from a copy"
            ) from error
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise CheckpointError(
                    f"the tensor {shown(name)} of {self.path} holds a NaN or an infinity, with "
                    "which nothing can be predicted; restore the file from a copy"
                )
        return tensors


def check_digest(path: Path, digest: str) -> None:
    """Raise `CheckpointError` where the file has another SHA-256.

    For a file above `AT_ONCE` bytes `TensorFile.read` compares it, when tensors are known to fit.
    """
    with opened(path) as (_, size):
        pass
    if size <= AT_ONCE and hashlib.sha256(read_bytes(path, AT_ONCE)).hexdigest() != digest:
        raise CheckpointError(other_file(path))


def tensor_file(path: Path) -> TensorFile:
    """Read the header of a safetensors file, and nothing else.

    Raises
    ------
    CheckpointError
        When it is no such file, or has another size than the header says.
    """
    with opened(path) as (stream, size):
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= min(size - 8, MOST_HEADER):
            raise CheckpointError(
                f"cannot read the saved tensors {path}: it has no header of safetensors; it is "
                "truncated, edited, or another file: restore it from a copy"
            )
        content = stream.read(length)
    try:
        entries = dict(strict_json(content))
        entries.pop("__metadata__", None)
        declared = {name: _declared(entry) for name, entry in entries.items()}
        bytes_needed = sum(t.numel() * t.element_size() for t in declared.values())
    except (ValueError, TypeError, LookupError, RecursionError, RuntimeError) as error:
        raise CheckpointError(
            f"cannot read the saved tensors {path}: its header is damaged "
            f"({type(error).__name__}: {str(error)[:200]}); it is truncated or edited: restore it "
            "from a copy"
        ) from error
    if size != 8 + length + bytes_needed:
        raise CheckpointError(
            f"cannot read the saved tensors {path}: it has {size:,} bytes, and by its header "
            f"{8 + length + bytes_needed:,}; it is truncated or edited: restore it from a copy"
        )
    return TensorFile(path, declared, size)


def other_file(path: Path) -> str:
    """Return the message for a file that does not have its digest."""
    return (
        f"{path} is not the file that was saved (its SHA-256 differs): it is truncated, edited, or "
        "from another save; restore it from a copy"
    )


def _declared(entry: Any) -> Tensor:
    shape = entry["shape"]
    if not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"the shape {shown(shape)}")
    return torch.empty(shape, dtype=DTYPES[entry["dtype"]], device="meta")
