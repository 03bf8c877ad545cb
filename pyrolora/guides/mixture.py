"""Symmetric Dirichlet mixture weights: which spread they give the noise, and which is best."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence

from pyrolora.seeding import seeded

GRID = (-3.0, 7.0, 101)
"""log a from, to, and how many of them."""
DRAWS = 2048
"""Of the weights at each a, for what has no closed form."""


class SymmetricMixture:
    """π ~ Dirichlet(a 1_N) on a grid of a, against the prior Dirichlet(α₀ 1_N).

    The noise of a layer is ε ‖π‖ z (or ε max π z), so that an objective in the one number a is

        f(a) = KL(a) + loss · E‖π‖² + price · E‖π‖⁻²

    with what the data lose by noise, and the price of the means, which fall with it.

    Parameters
    ----------
    components
        N.
    concentration
        α₀.
    sparse
        Whether the largest weight stands in ‖π‖'s place.
    """

    def __init__(self, components: int, concentration: float, sparse: bool) -> None:
        self.log_grid = torch.linspace(*GRID[:2], int(GRID[2]), dtype=torch.float64)
        laws = Dirichlet(self.log_grid.exp()[:, None].expand(-1, components))
        prior = torch.full_like(laws.concentration, concentration)
        self.kl = kl_divergence(laws, Dirichlet(prior))
        a = self.log_grid.exp()
        with seeded(0):
            weights = laws.sample((DRAWS,))
        squares = weights.amax(-1).square() if sparse else weights.square().sum(-1)
        self.inverse = squares.reciprocal().mean(0)
        self.squares = squares.mean(0) if sparse else (a + 1) / (components * a + 1)

    def squared(self, a: Tensor) -> Tensor:
        """E‖π‖² at each a, between the points of the grid by straight lines."""
        return self._between(self.squares, a)

    def best(self, loss: Tensor, price: Tensor) -> Tensor:
        """The a, in the shape of ``loss``, at the lowest f: of a parabola through three points."""
        kl, squares, inverse = (t.to(loss.device) for t in (self.kl, self.squares, self.inverse))
        f = kl + loss.double()[..., None] * squares + price.double()[..., None] * inverse
        place = f.argmin(-1, keepdim=True).clamp(1, f.shape[-1] - 2)
        left, middle, right = (f.gather(-1, place + k)[..., 0] for k in (-1, 0, 1))
        bend = left - 2 * middle + right
        shift = torch.where(bend > 0, 0.5 * (left - right) / bend, 0.0).clamp(-1, 1)
        log = self.log_grid.to(loss.device)[place[..., 0]] + shift * self._step()
        return log.exp().to(loss.dtype)

    def _between(self, values: Tensor, a: Tensor) -> Tensor:
        values = values.to(a.device)
        position = ((a.double().log() - GRID[0]) / self._step()).clamp(0, GRID[2] - 1)
        low = position.floor().clamp(max=GRID[2] - 2)
        part = position - low
        first = low.long()
        return torch.lerp(values[first], values[first + 1], part).to(a.dtype)

    def _step(self) -> float:
        return (GRID[1] - GRID[0]) / (GRID[2] - 1)
