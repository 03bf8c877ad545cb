"""Random noise on the weight of an adapted layer, redrawn from a seed and never stored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from pyrolora.adapters.kinds import TITLES, computes_plainly, is_dense, oriented
from pyrolora.checks import positive
from pyrolora.errors import BindingError, ConfigError

# Numbers of one chunk of W + E. On the CPU 4 MiB of float32: small beside the activations of a
# training step, it fits a cache; smaller chunks do not draw faster and mean thinner products. On an
# accelerator each chunk is some kernels more: 256 MiB hold the widest layer of 7 billion parameters
# whole. Another size is other noise, as it is on another kind of device.
CHUNK = 2**20
CHUNK_ACCELERATOR = 2**26


@dataclass(frozen=True)
class WeightNoise:
    """The perturbation E of one layer's weight, which computes x (W + E)ᵀ + b, plus s B A x.

    E is drawn anew for every seed, an independent Gaussian per output row as large as that row of
    the adapted weight::

        E[i, :] ~ N(0, σ² ‖(W + s B A)[i, :]‖² / in · I),   so E‖E[i, :]‖² = σ² ‖(W + s B A)[i, :]‖²

    and no gradient flows through the norm. E is a function of seed, stream, the weight's shape and
    the device, drawn in float32 (float64 for a product in float64) and in chunks of rows: forward
    draws a chunk, multiplies by W + E and drops it, backward draws it again. W itself is only read.
    (Li et al., "Low-Rank Adaptation over a Flat Loss Landscape", ICML 2025, arXiv 2409.14396.)

    The sum is rounded once, to the dtype of the product. In float32 that is nothing. On the grid of
    bfloat16 (spacing: 2⁻⁸ to 2⁻⁷ of an entry) the realised perturbation of a bfloat16 W keeps its
    mean of zero; of the law's variance it has 100 % at σ = 0.05, 101 % at 0.02, 108 % at 0.005,
    68 % at 0.001 and 8 % at 0.0001. What fades are thus the first steps of a schedule that rises
    from zero, where E counts for least. (Of a float32 W under autocast the sum is rounded in place
    of W.)

    Parameters
    ----------
    seeds
        One for all rows of the input, or one per draw: the rows then lie in ``len(seeds)`` equal
        blocks, draws outermost.
    scale
        σ, relative to a weight row's norm. At 0 nothing is drawn.
    stream
        The number of the layer: layers that share a seed get independent noise.
    std
        The standard deviations of the rows, (out,) or (S, out), where they were computed for many
        layers `at_once`; None: `frozen` computes them.
    """

    seeds: tuple[int, ...]
    scale: float
    stream: int
    std: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ConfigError("weight noise needs at least one seed, got none")
        positive("the scale of weight noise", self.scale, or_zero=True)

    def frozen(self, layer: nn.Module, x: Tensor, A: Tensor, sB: Tensor) -> Noisy | None:
        """Return a linear layer with W + E in place of W; None at scale 0, where E is zero.

        The gradient is that for x alone, as W and b are frozen. The layer is read, not called: its
        hooks do not run. Autocast counts as in the layer: the product runs in its dtype,
        `product_dtype`.

        Parameters
        ----------
        layer
            A layer of one of the `kinds`, with or without a bias.
        x
            Rows of inputs, in the dtype that the layer takes.
        A, sB
            (r, in) or (S, r, in), and the scaled transpose s Bᵀ, (r, out) or (S, r, out), for the
            norms.

        Raises
        ------
        ConfigError
            When the layer has no plain weight (it is quantised, parametrised, or elsewhere), or
            computes something else.
        BindingError
            When rows, seeds and factors do not have the same number of draws.
        """
        weight = _plain_weight(layer)
        if self.scale == 0:
            return None
        std = self.std if self.std is not None else _stds([self], [weight], [A], [sB])[0]
        std = self._per_draw(std, rows=x.shape[:-1].numel())
        return Noisy(weight, getattr(layer, "bias", None), std, self)

    def added_to(self, weight: Tensor, A: Tensor, sB: Tensor) -> Tensor:
        """Return W + E for a plain weight (out, in), and one setting of factors for the norms."""
        if len(self.seeds) > 1:
            raise BindingError("the noise of several draws makes several weights; draw one by one")
        if self.scale == 0:
            return weight
        std = _stds([self], [weight], [A], [sB])[0]
        return torch.cat([c.clone() for _, _, c in self._chunks(weight, std[None], weight.dtype)])

    def _per_draw(self, std: Tensor, rows: int) -> Tensor:
        """Expand (out,) or (S, out) to (S, out), for the S draws of the seeds or of the factors."""
        draws = {n for n in (len(self.seeds), *std.shape[:-1]) if n > 1} or {1}
        if len(draws) > 1 or rows % max(draws):
            raise BindingError(
                "weight noise and factors must have the same number of draws, which divides the "
                f"rows of the layer's input: got {len(self.seeds)} seed(s), standard deviations "
                f"{tuple(std.shape)} and {rows} rows; let every module keep the batch outermost"
            )
        return std.expand(draws.pop(), -1)

    def _chunks(
        self, weight: Tensor, std: Tensor, dtype: torch.dtype
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """Iterate over W + E for std (S, out): draw, output rows, these rows in ``dtype``.

        Use a chunk before asking for the next one, which is written over it.
        """
        step = _rows_at_once(weight)
        parts = weight.split(step)
        std = std.to(torch.promote_types(dtype, torch.float32)).unsqueeze(-1)
        buffer = std.new_empty(parts[0].shape)
        for draw, std_of_draw in enumerate(std):
            seed, start = self.seeds[draw % len(self.seeds)], 0
            for index, (part, scale) in enumerate(zip(parts, std_of_draw.split(step), strict=True)):
                generator = _generator(weight.device, seed, self.stream, index)
                noise = buffer[: len(part)].normal_(generator=generator)
                yield draw, slice(start, start + len(part)), noise.mul_(scale).add_(part).to(dtype)
                start += len(part)


@dataclass(frozen=True)
class Noisy:
    """A layer x (W + E)ᵀ + b that keeps W by reference, and the rows' std of E (S, out)."""

    weight: Tensor
    bias: Tensor | None
    std: Tensor
    noise: WeightNoise

    def forward(self, rows: Tensor) -> Tensor:
        inputs = self._by_draw(rows)
        result = rows.new_empty(len(rows), len(self.weight))
        blocks = self._by_draw(result)
        for draw, part, chunk in self.noise._chunks(self.weight, self.std, rows.dtype):
            out = blocks[draw, :, part]
            if self.bias is None:
                torch.mm(inputs[draw], chunk.T, out=out)
            else:
                torch.addmm(self.bias[part].to(rows.dtype), inputs[draw], chunk.T, out=out)
        return result

    def backward(self, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise ConfigError(
                "weight noise has no second derivative; differentiate a posterior without it"
            )
        blocks = self._by_draw(grad)
        result = grad.new_empty(len(grad), self.weight.shape[1])
        inputs = self._by_draw(result)
        # In place: autocast, under which backward may be called, leaves this product alone. In 16
        # bits every chunk rounds the sum again: an error of 0.5 % for 16 chunks, 0.2 % for one.
        for draw, part, chunk in self.noise._chunks(self.weight, self.std, grad.dtype):
            first = part.start == 0
            inputs[draw].addmm_(blocks[draw, :, part], chunk, beta=0 if first else 1)
        return result

    def _by_draw(self, rows: Tensor) -> Tensor:
        """View (S * m, k) as (S, m, k)."""
        return rows.view(len(self.std), len(rows) // len(self.std), rows.shape[-1])


def at_once(
    noises: Sequence[WeightNoise],
    layers: Sequence[nn.Module],
    A: Sequence[Tensor],
    sB: Sequence[Tensor],
) -> list[WeightNoise]:
    """Return the noises with the standard deviations of their rows, in few kernels for all layers.

    The layers have to be `readable`; A and sB are theirs, as in `WeightNoise.frozen`.
    """
    weights = [_plain_weight(layer) for layer in layers]
    stds = _stds(noises, weights, A, sB)
    return [replace(noise, std=std) for noise, std in zip(noises, stds, strict=True)]


def readable(layer: nn.Module) -> bool:
    """Return whether the weight of a layer is there to be read before the layer is called.

    It is not where it is gathered for the call from several processes, or brought from elsewhere.
    """
    weight = layer._parameters.get("weight")
    here = weight is not None and not weight.is_meta and is_dense(weight)
    return here and computes_plainly(layer)


@torch.no_grad()
def _stds(
    noises: Sequence[WeightNoise],
    weights: Sequence[Tensor],
    A: Sequence[Tensor],
    sB: Sequence[Tensor],
) -> list[Tensor]:
    """Return σ ‖(W + s B A)[i, :]‖ / √in for each layer, (out,) or (S, out)."""
    pairs = zip(noises, weights, strict=True)
    stds = row_norms(weights, A, sB)
    torch._foreach_mul_(stds, [noise.scale / W.shape[1] ** 0.5 for noise, W in pairs])
    return stds


@torch.no_grad()
def row_norms(weights: Sequence[Tensor], A: Sequence[Tensor], sB: Sequence[Tensor]) -> list[Tensor]:
    """Return ‖(W + s B A)[i, :]‖ of each layer in float32, (out,) or (S, out).

    The weights are (out, in), and factors are as in `WeightNoise.frozen`. It is computed from
    ‖W_i‖² + 2 s W_i · (BA)_i + s² ‖(BA)_i‖², whose products are of rank r, so that neither B A nor
    a float32 copy of W is ever whole in memory. On small layers the number of kernels is the price:
    what is no product with a weight runs once for all layers, in three times the memory of B.
    """
    frozen: list[Tensor] = []
    crossed: list[Tensor] = []
    updates: list[Tensor] = []
    rights: list[Tensor] = []
    with torch.autocast(weights[0].device.type, enabled=False):
        for weight, left, right in zip(weights, A, sB, strict=True):
            left, step = left.float(), _rows_at_once(weight)
            gram = left @ left.mT
            for W, b in zip(weight.split(step), right.float().split(step, dim=-1), strict=True):
                W = W.float()
                frozen.append(torch.linalg.vector_norm(W, dim=1))
                crossed.append(left @ W.mT)
                updates.append(gram @ b)
                rights.append(b)
    torch._foreach_mul_(frozen, frozen)
    torch._foreach_add_(updates, crossed, alpha=2)
    torch._foreach_mul_(updates, rights)
    squares = [update.sum(-2) for update in updates]
    torch._foreach_add_(squares, frozen)
    torch._foreach_clamp_min_(squares, 0.0)
    torch._foreach_sqrt_(squares)
    counts = [-(-len(weight) // _rows_at_once(weight)) for weight in weights]
    return [_joined([squares.pop(0) for _ in range(count)]) for count in counts]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _rows_at_once(weight: Tensor) -> int:
    numbers = CHUNK if weight.device.type == "cpu" else CHUNK_ACCELERATOR
    return max(1, numbers // weight.shape[1])


def _generator(device: torch.device, *key: int) -> torch.Generator:
    """Return a generator for a key; neighbouring keys are as unlike as distant ones."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer multiplies x."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def _plain_weight(layer: nn.Module) -> Tensor:
    """Return W (out, in) of a layer that computes x Wᵀ + b from it; refuse other layers."""
    name, weight = type(layer).__name__, layer._parameters.get("weight")
    if weight is None or weight.is_meta:
        raise ConfigError(
            f"weight noise needs the weight of the layer, and this {name} has none in memory (it "
            "is parametrised, quantised or offloaded); load the base whole and plain, or choose "
            "a guide without weight noise"
        )
    if not is_dense(weight):
        kind = "" if type(weight) is nn.Parameter else f"a {type(weight).__name__} of "
        raise ConfigError(
            "weight noise needs a floating-point weight of 16 bits or more, got "
            f"{kind}{weight.dtype} (a quantised base); load the base in bfloat16, or choose a "
            "guide without weight noise"
        )
    if not computes_plainly(layer):
        raise ConfigError(
            f"weight noise knows {TITLES}, and {name} computes its output in a way of "
            "its own; leave such layers out with exclude_modules, or choose a guide "
            "without weight noise"
        )
    return oriented(layer, weight)
