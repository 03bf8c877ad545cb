"""Tensors that belong to a posterior, by name: read, checked, set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from pyrolora.errors import CheckpointError


def tensors_of(parts: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the tensors of all parts, named ``part.tensor``.

    A base network with adapters is none of the parts, and must not be asked for its state:
    bitsandbytes then unpacks 4-bit weights in place, and rounds their scales.
    """
    for part, module in parts.items():
        for name, tensor in module.state_dict().items():
            yield f"{part}.{name}", tensor


def load_tensors(parts: Mapping[str, nn.Module], state: Mapping[str, Tensor]) -> None:
    """Set the tensors of all parts to those of ``state``, which has each of them in its shape."""
    check_tensors(parts, state)
    with torch.no_grad():
        for name, tensor in tensors_of(parts):
            tensor.copy_(state[name])


def check_tensors(parts: Mapping[str, nn.Module], state: Mapping[str, Tensor]) -> None:
    """Compare names, shapes and dtypes of ``state``, but no values, with the tensors of the parts.

    A network's own weights may be in another precision.

    Raises
    ------
    CheckpointError
        For the first that differs.
    """
    needed = dict(tensors_of(parts))
    if set(needed) != set(state):
        missing, foreign = sorted(set(needed) - set(state)), sorted(set(state) - set(needed))
        raise CheckpointError(
            f"the saved tensors are not those of this model: missing {missing[:3]}, "
            f"unexpected {foreign[:3]}; were the adapter settings or the guide changed?"
        )
    for name, tensor in needed.items():
        if tensor.shape != state[name].shape:
            raise CheckpointError(
                f"the saved tensor {name!r} has shape {tuple(state[name].shape)}, this model "
                f"needs {tuple(tensor.shape)}; was it fitted on another network?"
            )
        dtype = state[name].dtype
        cast = name.startswith("base.") and dtype.is_floating_point
        if dtype != tensor.dtype and not (cast and tensor.is_floating_point()):
            raise CheckpointError(
                f"the saved tensor {name!r} holds {dtype}, this model needs {tensor.dtype}; "
                "restore it from a copy"
            )
