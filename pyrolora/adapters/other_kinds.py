"""Convolutions and embeddings: linear maps of patches and of tokens, adapted where they are named.

Each is ``W x + b`` with W (out, in) for rows x that `rows_of` makes of its input: the patch under a
kernel, or the unit vector of a token, whose product with A is a column of it. Sizes are PEFT's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
OTHER_TITLES = "nn.Embedding, nn.Conv1d and nn.Conv2d"


def is_other(module: nn.Module) -> bool:
    """Return whether a module, without wrapper, is a convolution or embedding that has adapters."""
    return isinstance(module, (*CONVOLUTIONS, nn.Embedding)) and refusal(module) is None


def is_embedding(module: nn.Module) -> bool:
    """Return whether a module, without wrapper, looks rows up by their number."""
    return isinstance(module, nn.Embedding)


def refusal(module: nn.Module) -> str | None:
    """Return why a convolution or an embedding has no adapter, or None."""
    kinds = (*CONVOLUTIONS, nn.Embedding)
    if type(module).forward not in [kind.forward for kind in kinds] and not _is_scaled(module):
        return "computes its output in a way of its own"
    if "weight" not in module._parameters:
        return "has a weight that is made anew for each call"
    if isinstance(module, nn.Embedding):
        return None if module.max_norm is None else "rescales its rows (max_norm)"
    assert isinstance(module, nn.modules.conv._ConvNd)
    if module.groups > 1:
        return "has groups of channels, and W + s B A would mix them"
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return f"pads by {module.padding_mode!r}, {module.padding!r}, which PEFT's adapter does not"
    if max(module.dilation) > 1:
        return "has a dilation, which PEFT's adapter has not"
    return None


def _is_scaled(module: nn.Module) -> bool:
    """Return whether a module is an embedding of transformers' times its ``embed_scale``.

    One with other parameters replaces some of its rows.
    """
    named = type(module).__name__.endswith("ScaledWordEmbedding") and hasattr(module, "embed_scale")
    return named and isinstance(module, nn.Embedding) and set(module._parameters) == {"weight"}


def size_of(layer: nn.Module) -> tuple[int, int]:
    """Return the sizes (in, out) of the matrix."""
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    weight = layer.get_parameter("weight")
    return weight[0].numel(), len(weight)


def turned(layer: nn.Module, matrix: Tensor) -> Tensor:
    """Turn the layer's weight, or a tensor of its shape, to (out, in), or a matrix back."""
    if isinstance(layer, nn.Embedding):
        return matrix.T
    return (
        matrix.flatten(1) if matrix.dim() > 2 else matrix.view(layer.get_parameter("weight").shape)
    )


def rows_of(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the patches of a convolution's input, (b, positions, in); any other input as it is."""
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return x
    size, pad, step = layer.kernel_size, layer.padding, layer.stride
    assert not isinstance(pad, str)
    if isinstance(layer, nn.Conv1d):  # a picture of one row
        x, size, pad, step = x.unsqueeze(-2), (1, *size), (0, *pad), (1, *step)
    return F.unfold(x, size, padding=pad, stride=step).mT


def folded(layer: nn.Module, update: Tensor, like: Tensor) -> Tensor:
    """Return the update of each position, (b, positions, out), in the shape of the output.

    An embedding that is scaled has its update scaled, too: W + s B A are its rows.
    """
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return update * getattr(layer, "embed_scale", 1.0)
    return update.mT.reshape(like.shape)


def looked_up(layer: nn.Embedding, numbers: Tensor, A: Tensor) -> Tensor:
    """Return the columns of A (r, in), or of each of S draws' A for its block of numbers, (..., r).

    The column of padding takes no gradient, as in the embedding, and as in PEFT.
    """
    if A.dim() == 2:
        return F.embedding(numbers, A.mT, padding_idx=layer.padding_idx)
    blocks = numbers.chunk(len(A))
    return torch.cat([looked_up(layer, n, a) for n, a in zip(blocks, A, strict=True)])
