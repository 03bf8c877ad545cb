"""Starts of the means of the factors, by name: at random, or from the weight or its gradient.

A random A comes with B at zero, which leaves the function unchanged. The other starts A₀, B₀ are
those of PEFT 0.21, which takes s B₀ A₀ off the weight; here the bank takes it off the update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pyrolora.adapters.config import INITIALIZERS, RANDOM_STARTS
from pyrolora.adapters.kinds import is_quantised, oriented
from pyrolora.adapters.targets import LayerSpec
from pyrolora.adapters.wrapper import unwrapped
from pyrolora.errors import ConfigError
from pyrolora.matrices import decomposing

Pair = tuple[Tensor, Tensor]
"""A₀ (r, in) and B₀ (out, r)."""

Start = Mapping[str, Pair]
"""Layer -> A₀ and B₀."""

REMEDY = "load or make the network anew, or start from 'kaiming'"
STABLE_GAMMA = 16
"""γ of LoRA-GA, as in its paper and in PEFT."""


def kaiming(rank: int, columns: int, fan_in: int) -> Tensor:
    """Draw A as PEFT does by default: uniform on ±1/sqrt(in); for a lookup on ±1."""
    A = nn.init.kaiming_uniform_(torch.empty(rank, columns), a=math.sqrt(5))
    return A if fan_in == columns else A * (columns / fan_in) ** 0.5


def gaussian(rank: int, columns: int, fan_in: int) -> Tensor:
    """Draw A as PEFT's ``"gaussian"`` does: with standard deviation 1/r."""
    return torch.randn(rank, columns) / rank


def lora_ga(layer: nn.Module, gradient: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """Start from the singular vectors of the gradient G = U S Vᵀ, (out, in), of the weight.

        A₀ = (v_1 .. v_r)ᵀ,   B₀ = (σ_r+1 u_r+1 .. σ_2r u_2r) · m^¼ / √γ

    The first step on B then is along the r strongest directions of G, that on A along the next r.
    The singular values in B₀ are PEFT's, the paper has none; and so is m, the first size of the
    weight as the layer stores it: out, but in of a ``Conv1D``.

    References
    ----------
    S. Wang, L. Yu, J. Li (2024), "LoRA-GA: Low-Rank Adaptation with Gradient Approximation",
    NeurIPS, arXiv 2407.05000.
    """
    r, least = spec.rank, min(gradient.shape)
    if 2 * r > least:
        raise ConfigError(
            f"init_lora_weights='lora-ga' takes 2 r = {2 * r} singular vectors of a gradient, and "
            f"that of layer {spec.name!r} has {least} (in {spec.in_features}, out "
            f"{spec.out_features}); choose r <= {least // 2}, give this layer its own rank with "
            "rank_pattern, or leave it out with exclude_modules"
        )
    if not gradient.isfinite().all() or not gradient.any():
        state = "is zero" if gradient.isfinite().all() else "is not finite"
        raise ConfigError(
            f"init_lora_weights='lora-ga' needs a gradient, and that of layer {spec.name!r} on the "
            f"first batch {state}; take a larger batch_size, leave the layer out with "
            "exclude_modules, or start from 'kaiming'"
        )
    U, S, V = torch.svd_lowrank(gradient, q=min(4 * r, least), niter=4)
    scale = layer.get_parameter("weight").shape[0] ** 0.25 / STABLE_GAMMA**0.5
    return V[:, :r].T, U[:, r : 2 * r] * S[r : 2 * r] * scale


def pissa(layer: nn.Module, weight: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """Start from the r largest singular values of W = U S Vᵀ, (out, in).

        A₀ = (S_r / s)^½ V_rᵀ,   B₀ = U_r (S_r / s)^½

    References
    ----------
    F. Meng, Z. Wang, M. Zhang (2024), "PiSSA: Principal Singular Values and Singular Vectors
    Adaptation of Large Language Models", NeurIPS, arXiv 2404.02948.
    """
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    root = (S[: spec.rank] / spec.scaling).sqrt()
    return root[:, None] * Vh[: spec.rank], U[:, : spec.rank] * root


def olora(layer: nn.Module, weight: Tensor, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """Start from W = Q R, (out, in): A₀ the first r rows of R, B₀ the first r columns of Q.

    References
    ----------
    K. Büyükakyüz (2024), "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models",
    arXiv 2406.01775.
    """
    Q, R = torch.linalg.qr(weight)
    return R[: spec.rank], Q[:, : spec.rank]


_RANDOM: dict[str, Callable[[int, int, int], Tensor]] = {"kaiming": kaiming, "gaussian": gaussian}
_FROM_GRADIENT = {"lora-ga": lora_ga}
_FROM_WEIGHT = {"pissa": pissa, "olora": olora}
assert tuple(_RANDOM) == RANDOM_STARTS
assert (*_RANDOM, *_FROM_GRADIENT, *_FROM_WEIGHT) == INITIALIZERS


def initial_factor(name: str, rank: int, columns: int, fan_in: int | None = None) -> Tensor:
    """Draw one A, (rank, columns), by a name in `RANDOM_STARTS`.

    Each product sums ``fan_in`` of the columns; None: all.
    """
    return _RANDOM[name](rank, columns, columns if fan_in is None else fan_in)


def start_of(
    layers: Mapping[str, nn.Module],
    specs: Sequence[LayerSpec],
    name: str,
    gradients: Callable[[Callable[[str, Tensor], Pair]], Mapping[str, Pair]],
) -> Start | None:
    """Return the start that weights or gradients give, in float32; None where it is random.

    Parameters
    ----------
    layers
        The adapted layers, wrapped or not, by name.
    specs
        The shapes of their adapters.
    name
        ``init_lora_weights``.
    gradients
        Returns layer -> what its argument, a function, makes of the layer's name and the gradient
        of its weight, in the weight's shape; called where needed.

    Raises
    ------
    ConfigError
        For a weight that cannot be read, a rank that is too high, a gradient of zero.
    NonFiniteError
        For a weight with NaN or infinity.
    """
    if name in RANDOM_STARTS:
        return None
    bases = {spec.name: unwrapped(layers[spec.name]) for spec in specs}
    weights = {n: frozen_weight(n, base) for n, base in bases.items()}
    make = {**_FROM_GRADIENT, **_FROM_WEIGHT}[name]
    shapes = {spec.name: spec for spec in specs}

    def started(layer: str, matrix: Tensor) -> Pair:
        base = bases[layer]
        matrix = oriented(base, matrix.detach()).float()
        checked = () if name in _FROM_GRADIENT else (matrix,)  # of gradients `make` says more
        with decomposing(f"the matrix of {name!r} in layer {layer!r}", *checked, remedy=REMEDY):
            A, B = make(base, matrix, shapes[layer])
        return A.clone(), B.clone()  # not views, which keep all of the decomposition

    if name in _FROM_GRADIENT:
        return gradients(started)
    return {layer: started(layer, weights[layer]) for layer in shapes}


def frozen_weight(name: str, layer: nn.Module) -> nn.Parameter:
    """Return the weight of a linear layer; raise `ConfigError` if it cannot be read."""
    weight = layer._parameters.get("weight")
    if type(weight) is not nn.Parameter or is_quantised(weight.dtype):
        kind = "none of its own" if weight is None else f"a {type(weight).__name__}, {weight.dtype}"
        raise ConfigError(
            f"a start from weights or gradients needs plain ones, and the weight of layer {name!r} "
            f"is {kind}; load the network unquantised, or choose init_lora_weights='kaiming'"
        )
    return weight
