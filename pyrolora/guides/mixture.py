"""Symmetric Dirichlet mixture weights: the spread that they give the noise, and their optimum."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence

from pyrolora.seeding import seeded

GRID = (-3.0, 7.0, 101)
"""Lowest and highest log a, and the number of grid points."""
DRAWS = 2048
"""Draws of the weights at each a, for the moments without a closed form."""
ROUNDS = 5
"""How often `optimal_scales` alternates between V and a."""


class SymmetricMixture:
    """Mixture weights π ~ Dirichlet(a 1_N) on a grid of a, with the prior Dirichlet(α₀ 1_N).

    The noise of a layer is ε ‖π‖ z (or ε max π z), so that an objective in the one number a is

        f(a) = KL(a) + loss · E‖π‖² + price · E‖π‖⁻²

    with the loss that noise costs the data, and the price of the means, whose KL falls with noise.

    Parameters
    ----------
    components
        N.
    concentration
        α₀.
    sparse
        Whether the largest weight takes the place of ‖π‖.
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
        """Return E‖π‖² at each a, interpolated linearly on the grid."""
        return self._between(self.squares, a)

    def best(self, loss: Tensor, price: Tensor) -> Tensor:
        """Return the a at the lowest f, in the shape of ``loss``.

        It is the lowest point of a parabola through the best point of the grid and its neighbours.
        """
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


@cache
def symmetric_mixture(components: int, concentration: float, sparse: bool) -> SymmetricMixture:
    """Return the `SymmetricMixture` of these numbers, the same object for every fit.

    Its moments take as long as all the rest of a short fit.
    """
    return SymmetricMixture(components, concentration, sparse)


def optimal_scales(
    H: Tensor,
    mixture: SymmetricMixture,
    *,
    start: Tensor,
    squared_scale: Tensor,
    distance: Tensor,
    kappa: Tensor,
    beta: float,
    cooperation: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return V and a at the optimum of MonteCLoRA's objective, for each of L blocks.

    Each has a closed form given the other,

        V = [ I + ε₀² E‖π‖² H / (β κ) ]⁻¹,    a = argmin f,  with the loss ½ ε₀² tr(V H) / β

    and the two alternate `ROUNDS` times.

    Parameters
    ----------
    H
        (L, r, r): the curvature of the loss that the columns of a block share.
    mixture
        The mixture weights.
    start
        (L,): a to begin with.
    squared_scale
        (L,): ε₀².
    distance
        (L,): the price of the means, ½ ‖M − M₀‖² / ε₀².
    kappa
        (L,): κ, the weight of ½ (tr V − log|V|) in the KL.
    beta, cooperation
        β and λ_c.

    Returns
    -------
    Tensor, Tensor
        V, (L, r, r), and a, (L,).
    """
    eye, a, price = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device), start, beta * kappa
    for _ in range(ROUNDS):
        noise = squared_scale * mixture.squared(a) / price
        V = torch.linalg.inv(eye + noise[:, None, None] * H)
        loss = 0.5 * squared_scale * (V * H).sum((-2, -1)) / beta
        a = mixture.best(loss + cooperation, distance)
    return V, a
