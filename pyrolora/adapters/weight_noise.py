"""Random noise on the weight of an adapted layer, redrawn from a seed: it is never stored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyrolora.errors import BindingError, ConfigError, positive

# Numbers of one chunk of noise: 2 MiB of bf16, 4 of float32. That is small beside the activations
# of a training step and fits a processor's cache. Smaller chunks do not draw faster and mean more
# and thinner matrix products; a layer of 4096 x 4096 has 16 chunks. Another size is other noise.
CHUNK = 2**20


@dataclass(frozen=True)
class WeightNoise:
    """The perturbation E of one layer's weight: it then computes x (W + s B A + E)ᵀ + b.

    E is drawn anew for every seed, an independent Gaussian per output row as large as that row::

        E[i, :] ~ N(0, σ² ‖(W + s B A)[i, :]‖² / in · I),   so E‖E[i, :]‖² = σ² ‖(W + s B A)[i, :]‖²

    and no gradient flows through the norm. E is a function of seed, stream, the weight's shape, the
    dtype and the device, drawn in chunks of rows: forward draws a chunk, multiplies by it and drops
    it, backward draws it again. W itself is only read. (Li et al., "Low-Rank Adaptation over a Flat
    Loss Landscape", ICML 2025, arXiv 2409.14396.)

    Parameters
    ----------
    seeds
        One for all rows of the input, or one a draw: the rows then lie in ``len(seeds)`` equal
        blocks, draws outermost.
    scale
        σ, relative to a weight row's norm. At 0 nothing is drawn.
    stream
        Which layer: layers that share a seed get independent noise.
    """

    seeds: tuple[int, ...]
    scale: float
    stream: int

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ConfigError("weight noise needs at least one seed, got none")
        positive("the scale of weight noise", self.scale, or_zero=True)

    def add_to(self, out: Tensor, x: Tensor, weight: Tensor, A: Tensor, sB: Tensor) -> Tensor:
        """``out + x Eᵀ`` for x (..., in) and out (..., out), computed in the dtype of ``out``.

        ``weight`` is W (out, in), or a view of that shape; ``A`` is (r, in) or (S, r, in) and
        ``sB``, the scaled transpose s Bᵀ, (r, out) or (S, r, out).

        Raises
        ------
        ConfigError
            The weight is quantised: its rows' norms cannot be read from it.
        BindingError
            The rows, the seeds and the factors do not have the same number of draws.
        """
        _refuse_quantised(weight)
        if self.scale == 0:
            return out
        std = row_norms(weight, A, sB) * (self.scale / weight.shape[1] ** 0.5)
        std = self._per_draw(std, rows=x.shape[:-1].numel())
        return _AddNoise.apply(out, x.to(out.dtype), std, self)

    def _per_draw(self, std: Tensor, rows: int) -> Tensor:
        """(S, out) of (out,) or (S, out), where S is the draws of the seeds or of the factors."""
        draws = {n for n in (len(self.seeds), *std.shape[:-1]) if n > 1} or {1}
        if len(draws) > 1 or rows % max(draws):
            raise BindingError(
                "weight noise and factors must have the same number of draws, which divides the "
                f"rows of the layer's input: got {len(self.seeds)} seed(s), standard deviations "
                f"{tuple(std.shape)} and {rows} rows; let every module keep the batch outermost"
            )
        return std.expand(draws.pop(), -1)

    def _chunks(self, std: Tensor, like: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
        """All of E for std (S, out) and like (S, m, in): (draw, output rows, their rows of E)."""
        size = like.shape[-1]
        step = max(1, CHUNK // size)
        buffer = like.new_empty(min(step, std.shape[1]), size)
        for draw, std_of_draw in enumerate(std.to(like.dtype).unsqueeze(-1)):
            seed = self.seeds[draw % len(self.seeds)]
            for index, part in enumerate(std_of_draw.split(step)):
                generator = _generator(like.device, seed, self.stream, index)
                noise = buffer[: len(part)].normal_(generator=generator)
                yield draw, slice(index * step, index * step + len(part)), noise.mul_(part)


class _AddNoise(torch.autograd.Function):
    """out + x Eᵀ, of which only the rows' standard deviations are kept for backward."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, std: Tensor, noise: WeightNoise) -> Tensor:
        ctx.save_for_backward(std)
        ctx.noise, ctx.shape = noise, x.shape
        inputs = x.reshape(len(std), -1, x.shape[-1])
        result = out.clone(memory_format=torch.contiguous_format)
        blocks = result.view(len(std), -1, out.shape[-1])
        for draw, rows, chunk in noise._chunks(std, inputs):
            blocks[draw, :, rows].addmm_(inputs[draw], chunk.mT)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        if not ctx.needs_input_grad[1]:
            return grad, None, None, None
        (std,) = ctx.saved_tensors
        blocks = grad.reshape(len(std), -1, grad.shape[-1])
        grad_x = grad.new_zeros(len(std), blocks.shape[1], ctx.shape[-1])
        # In place, as in forward: autocast leaves these products alone.
        for draw, rows, chunk in ctx.noise._chunks(std, grad_x):
            grad_x[draw].addmm_(blocks[draw, :, rows], chunk)
        return grad, grad_x.view(ctx.shape), None, None


@torch.no_grad()
def row_norms(weight: Tensor, A: Tensor, sB: Tensor) -> Tensor:
    """‖(W + s B A)[i, :]‖ in float32, (out,) or (S, out), for arguments as in `add_to`.

    From ‖W_i‖² + 2 s W_i · (BA)_i + s² ‖(BA)_i‖², whose products are of rank r, so that neither
    B A nor a float32 copy of W is ever whole in memory.
    """
    A, sB = A.float(), sB.float()
    step = max(1, CHUNK // weight.shape[1])
    squares = []
    with torch.autocast(weight.device.type, enabled=False):
        gram = A @ A.mT
        for W, b in zip(weight.split(step), sB.split(step, dim=-1), strict=True):
            W = W.float()
            own = torch.linalg.vector_norm(W, dim=1).square()
            squares.append(own + (b * (2 * (A @ W.mT) + gram @ b)).sum(-2))
    return torch.cat(squares, dim=-1).clamp_min(0).sqrt()


def _generator(device: torch.device, *key: int) -> torch.Generator:
    """A generator of its own for every key; neighbouring keys are as unlike as distant ones."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def _refuse_quantised(weight: Tensor) -> None:
    """Float8 counts, too: its numbers are the weights only up to scales kept elsewhere."""
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise ConfigError(
            f"weight noise needs a floating-point weight of 16 bits or more, got {weight.dtype} "
            "(a quantised base); load the base in bfloat16, or choose a guide that works on "
            "quantised layers: 'montec', 'map'"
        )
