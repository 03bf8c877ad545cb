"""Names and shapes of the tensors that PEFT's file has for an adapted layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from pyrolora.adapters.other_kinds import CONVOLUTIONS


def tensor_name(layer: nn.Module, name: str, factor: str) -> str:
    """Return the name of the tensor of ``factor``, A or B, of the layer of this name."""
    kind = f"embedding_{factor}" if isinstance(layer, nn.Embedding) else f"{factor}.weight"
    return f"{name}.lora_{kind}"


def shape(layer: nn.Module, factor: str, rows: int, columns: int) -> Sequence[int]:
    """Return the shape in which PEFT keeps a matrix (rows, columns).

    A of a convolution is one to r channels with the layer's kernel; the kernel of B has one entry.
    """
    if not isinstance(layer, CONVOLUTIONS):
        return (rows, columns)
    kernel = layer.kernel_size if factor == "A" else (1,) * len(layer.kernel_size)
    channels = layer.in_channels if factor == "A" else columns
    return (rows, channels, *kernel)


def as_kept(layer: nn.Module, factor: str, matrix: Tensor) -> Tensor:
    """Return a matrix in the shape in which PEFT keeps it."""
    return matrix.reshape(*shape(layer, factor, *matrix.shape))
