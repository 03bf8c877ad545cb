"""Training-free Bayesianization: the largest isotropic noise that an adapter's loss tolerates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyrolora import defaults
from pyrolora.adapters import AdapterBank, FlatFactors
from pyrolora.checks import positive, true_or_false, whole_number
from pyrolora.errors import ConfigError
from pyrolora.guides.engines import Fit
from pyrolora.guides.factor_program import FactorProgram
from pyrolora.guides.map import MAP
from pyrolora.guides.options import Guide, require
from pyrolora.guides.plates import flat
from pyrolora.guides.program import Sites
from pyrolora.guides.supports import Supports

Anchor = Literal["training", "validation"]
SCALES = (1e-6, 10.0)
"""The smallest and the largest σ that the search tries."""
FIRST = 1e-2
NEAR, AIM = 0.95, 0.975
"""Shares of the tolerance: the rise at which the search stops, and the one that it aims at."""
SMALLEST_DIRECTION = 1e-3
"""Smallest singular value of B that counts, relative to the largest: below it a direction is
rounding in half precision, which noise on A of the reciprocal size would blow up."""


@dataclass(frozen=True, kw_only=True)
class TFB(Guide):
    """Low-rank isotropic noise around plain LoRA, as large as its loss allows; nothing is trained.

    With B = U diag(d) Vᵀ the adapter is B' A', B' = U diag(d) and A' = Vᵀ A, and

        guide  A'_ij ~ N(M'_ij, (σ / d_i)²)

    so that s B A x has the noise s σ ‖x‖ N(0, I) in the span of B, the same in every direction of
    U. In the coordinates of A itself, where B and the means stay as they are,

        A = M + σ (BᵀB)^(−½) Z,   Z_ij ~ N(0, 1),

    with the pseudo-inverse. One σ for all layers is the largest with

        loss(σ) − loss(0) <= tolerance (· loss(0), where it is ``relative``),

    where the loss is −log p(y|θ) per observation, a mean over the anchor set and over draws. All σ
    share the same Z, half of them the negatives of the others, so that the rise is smooth and free
    of odd terms. To leading order it is quadratic: the search steps by that law and, where it does
    not hold, by bisection of log σ.

    The paper bounds |loss(σ) − loss(0)|; here a loss that falls, as it does on held-out data of an
    overfitted adapter, is no reason for less noise. (The authors' code takes the negative logarithm
    of the mean of the draws' probabilities, by the adapter's own answers for labels.) Relative to
    a training loss that is nearly zero, a tolerance leaves next to no noise: then give it in nats,
    or held-out data.

    Parameters
    ----------
    tolerance
        The rise of the loss that is allowed.
    relative
        Whether ``tolerance`` is a share of the mean adapter's loss, which then has to be above
        zero (that of a regression need not be); else nats per observation (an example, or a token).
    anchor
        The data of the loss: ``"training"``, or ``"validation"``, the ``eval_data``.
    draws
        S, an even number.
    steps
        Maximum number of σ to try, usually three or four; each takes S passes over the anchor set.

    References
    ----------
    H. Shi et al. (2025), "Training-Free Bayesianization for Low-Rank Adapters of Large Language
    Models", NeurIPS, arXiv 2412.05723.
    """

    name = "tfb"
    latent: ClassVar[str] = "A"

    tolerance: float = defaults.TFB_TOLERANCE
    relative: bool = True
    anchor: Anchor = "training"
    draws: int = defaults.TFB_DRAWS
    steps: int = defaults.TFB_STEPS

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("tolerance", self.tolerance)
        true_or_false("relative", self.relative)
        whole_number("draws", self.draws, at_least=2)
        require(self.draws % 2 == 0, "draws", "even: half are the negatives", self.draws)
        whole_number("steps", self.steps, at_least=1)

    @property
    def supports(self) -> Supports:
        return Supports(rank_allocation=True, post_hoc="computed", independent_layers=True)

    def build(self, bank: AdapterBank) -> TFBProgram:
        return TFBProgram(bank, self)

    @torch.no_grad()
    def infer(self, fit: Fit) -> None:
        held_out = self.anchor == "validation"
        if held_out and not fit.can_validate:
            raise ConfigError(
                "anchor='validation' asks for the loss of held-out data, and there are none; pass "
                "eval_data=, or use TFB(anchor='training')"
            )
        with torch.enable_grad():
            fit.joint.adopt(fit.point(MAP()))
        fit.joint.align()
        program: TFBProgram = fit.program
        half = program.draw(self.draws // 2)["noise"]
        noise = {"noise": torch.cat([half, -half])}
        loss = fit.loss(program.mean(), held_out=held_out)
        tolerance = self._nats(loss)

        def rise(scale: float) -> float:
            program.scale.fill_(scale)
            return fit.loss(program.factors(noise), held_out=held_out) - loss

        scale = largest_scale(rise, tolerance, self.steps)
        program.scale.fill_(scale)
        _warn_of_bounds(scale, tolerance)
        fit.log(noise_scale=scale, anchor_loss=loss, tolerated=tolerance)

    def _nats(self, loss: float) -> float:
        """Return the tolerance in nats per observation."""
        if not self.relative:
            return self.tolerance
        if not loss > 0:
            raise ConfigError(
                f"the mean adapter's loss on the {self.anchor} data is {loss:.4g}, and a share of "
                "it bounds nothing; give the tolerance in nats, with TFB(tolerance=..., "
                "relative=False)"
            )
        return self.tolerance * loss


def largest_scale(rise: Callable[[float], float], tolerance: float, steps: int) -> float:
    """Return the largest σ within `SCALES` that was tried with rise(σ) <= ``tolerance``.

    At most ``steps`` values are tried; 0.0 if all are above the tolerance, as a rise that is not a
    number is.
    """
    low, high, scale = 0.0, math.inf, FIRST
    for _ in range(steps):
        risen = rise(scale)
        if risen <= tolerance:
            low = scale
        else:
            high = scale
        if NEAR * tolerance <= risen <= tolerance or low == SCALES[1] or high == SCALES[0]:
            break
        guess = SCALES[1] if risen <= 0 else scale * (AIM * tolerance / risen) ** 0.5
        scale = min(max(guess, SCALES[0]), SCALES[1])
        if not low < scale < high:  # or the guess is not a number
            scale = (max(low, SCALES[0]) * min(high, SCALES[1])) ** 0.5
    return low


def _warn_of_bounds(scale: float, tolerance: float) -> None:
    if scale == SCALES[1]:
        warnings.warn(
            f"the noise of 'tfb' ends at the upper bound of its search, σ = {scale:g}: the loss "
            f"bears it, with a rise of less than {tolerance:.3g} nats, and says nothing of its "
            "size. B is zero, or the adapters do next to nothing: train them for longer, or "
            "choose another guide",
            stacklevel=2,
        )
    elif scale == 0:
        warnings.warn(
            "the noise of 'tfb' is zero, and the posterior is a point: every σ that was tried "
            f"raised the loss by more than {tolerance:.3g} nats; allow a higher tolerance, give it "
            "in nats with relative=False, more steps, or held-out data with anchor='validation'",
            stacklevel=2,
        )


class TFBProgram(FactorProgram):
    """A program with the site ``noise``: Z, all entries of A, flat.

    It has the same law in model and guide, so that there is no KL. Buffer: σ, ``scale``.
    """

    scale: Tensor

    options: TFB

    def __init__(self, bank: AdapterBank, options: TFB) -> None:
        super().__init__(bank, options)
        self.sites = ("noise",)
        self.register_buffer("scale", torch.zeros(()))
        self.confine("scale", constraints.nonnegative)

    def prior(self, site: str) -> dist.TorchDistribution:
        return self.law(site)

    def law(self, site: str) -> dist.TorchDistribution:
        total = self.bank.layout("A").total
        return dist.Normal(torch.zeros_like(self.scale), 1.0).expand([total]).to_event(1)

    def rank_entries(self, rows: Tensor) -> dict[str, Tensor]:
        return {}  # σ is searched after training

    def factors(self, sites: Sites) -> FlatFactors:
        roots = self.scale * self.roots()
        delta = self.bank.layout("A").transform(roots, flat(sites["noise"]))
        return self.bank.shifted("A", delta)

    @torch.no_grad()
    def roots(self) -> Tensor:
        """Return (BᵀB)^(−½) of every layer, (L, r, r), in the order of A's blocks.

        They are pseudo-inverses, without the directions that B does not have.
        """
        layout = self.bank.layout("A")
        B = self.bank.layouts["B"].matrices(self.bank.means().B)
        grams = self.scale.new_zeros(len(layout), layout.rank, layout.rank, dtype=torch.double)
        for gram, block in zip(grams, layout.blocks, strict=True):
            rows = B[block.layer].double()
            gram[: block.rank, : block.rank] = rows @ rows.mT
        squares, V = torch.linalg.eigh(grams)
        d = squares.clamp(min=0).sqrt()
        there = d > SMALLEST_DIRECTION * d.amax(-1, keepdim=True)
        inverse = torch.where(there, 1 / d, 0.0)
        return (V * inverse.unsqueeze(-2) @ V.mT).to(self.scale)
