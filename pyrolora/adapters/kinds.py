"""Kinds of linear layers: where each keeps its sizes, and which way round its weight lies.

To adapt another class of linear layers, add an entry to `KINDS`; nothing else in the package asks
for the class of one. It has to compute ``W x + b`` over the last dimension of its only input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pyrolora.adapters.other_kinds import is_other, size_of, turned
from pyrolora.adapters.wrapper import unwrapped


@dataclass(frozen=True)
class LinearKind:
    """A class of modules that compute ``W x + b``.

    Attributes
    ----------
    module
        The class.
    title
        Its name in messages.
    inputs, outputs
        The attributes that hold the two sizes.
    transposed
        Whether the weight is stored as (in, out) rather than (out, in).
    """

    module: type[nn.Module]
    title: str
    inputs: str = "in_features"
    outputs: str = "out_features"
    transposed: bool = False


KINDS = (
    LinearKind(nn.Linear, "nn.Linear"),
    LinearKind(Conv1D, "transformers' Conv1D", inputs="nx", outputs="nf", transposed=True),
)
TITLES = " and ".join(kind.title for kind in KINDS)
"""The kinds by name, for messages."""

_QUANTISED = LinearKind(nn.Module, "a quantised layer")
_FORWARDS = tuple(kind.module.forward for kind in KINDS)
_TRANSPOSED = tuple(kind.module for kind in KINDS if kind.transposed)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module, without wrapper, is a linear layer; quantised ones count."""
    return _kind_of(module) is not None or is_quantised_layer(module)


def features(module: nn.Module) -> tuple[int, int]:
    """Return the sizes (in, out) of a layer that has adapters, wrapped or not."""
    module = unwrapped(module)
    if is_other(module):
        return size_of(module)
    kind = _kind_of(module) or _QUANTISED
    return int(getattr(module, kind.inputs)), int(getattr(module, kind.outputs))


def is_transposed(module: nn.Module) -> bool:
    """Return whether a linear layer, without wrapper, stores its weight as (in, out)."""
    return isinstance(module, _TRANSPOSED)


def oriented(layer: nn.Module, matrix: Tensor) -> Tensor:
    """Turn a matrix from the way in which ``layer`` stores its weight to (out, in), or back."""
    if is_other(layer):
        return turned(layer, matrix)
    return matrix.T if is_transposed(layer) else matrix


def computes_plainly(layer: nn.Module) -> bool:
    """Return whether the class of ``layer`` computes its output as its kind does.

    Subclasses may override ``forward``, as those of quantised layers do.
    """
    return type(layer).forward in _FORWARDS


def is_quantised(dtype: torch.dtype) -> bool:
    """Return whether numbers of this dtype need scales that are kept elsewhere; float8 does."""
    return not dtype.is_floating_point or dtype.itemsize < 2


def is_dense(weight: Tensor) -> bool:
    """Return whether the numbers of a tensor are the weight itself.

    They are not in a quantised tensor, nor in a subclass of tensors with arithmetic of its own.
    """
    return type(weight) in (Tensor, nn.Parameter) and not is_quantised(weight.dtype)


def is_quantised_layer(module: nn.Module) -> bool:
    """Return whether a module is a linear layer that multiplies with quantised weights."""
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return (
        hasattr(module, "in_features")
        and not computes_plainly(module)
        and any(is_quantised(tensor.dtype) for tensor in tensors)
    )


def _kind_of(module: nn.Module) -> LinearKind | None:
    return next((kind for kind in KINDS if isinstance(module, kind.module)), None)
