"""The MonteCLoRA pair as the paper writes it, component by component: the tests' reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyrolora.distributions import WishartCholesky


class Uncollapsed:
    """One adapted linear layer with N components a column: y ~ N(x (W + s B A)ᵀ, noise²).

    Hierarchical: δ_jk ~ N(0, Σ) in model and guide. Isotropic: δ_jk ~ N(0, I) in the model. Each
    pass has ``draws`` draws, in a plate that averages them.
    """

    def __init__(self, W, B, M, scaling, sample_scale, df, noise, hierarchical, alpha0, draws):
        self.W, self.B, self.M = W, B, M
        self.scaling, self.sample_scale, self.df, self.noise = scaling, sample_scale, df, noise
        self.hierarchical, self.alpha0, self.draws = hierarchical, alpha0, draws

    def model(self, x: Tensor, y: Tensor) -> None:
        with self._averaged():
            r, columns = self.M.shape
            n = len(self.alpha0)
            weights = pyro.sample("mixture_weights", dist.Dirichlet(self.alpha0))
            law = WishartCholesky(self.df, torch.eye(r) / self.df**0.5)
            tril = pyro.sample("covariance_tril", law)
            law = tril if self.hierarchical else torch.eye(r)
            with pyro.plate("columns", columns, dim=-1), pyro.plate("components", n, dim=-2):
                delta = pyro.sample(
                    "components_", dist.MultivariateNormal(torch.zeros(r), scale_tril=law)
                )
            noise = torch.einsum("sk,skjr->srj", weights.flatten(0, -2), delta)
            A = self.M + self.sample_scale * noise
            mean = x @ (self.W + self.scaling * self.B @ A).mT
            with pyro.plate("data", len(x)):
                law = dist.Normal(mean.unsqueeze(1), self.noise).to_event(1)
                pyro.sample("y", law, obs=y)

    def guide(self, x: Tensor, y: Tensor, alpha: Tensor, scale: Tensor) -> None:
        with self._averaged():
            r, columns = self.M.shape
            pyro.sample("mixture_weights", dist.Dirichlet(alpha))
            tril = pyro.sample(
                "covariance_tril", WishartCholesky(self.df, torch.diag(scale) / self.df**0.5)
            )
            with (
                pyro.plate("columns", columns, dim=-1),
                pyro.plate("components", len(alpha), dim=-2),
            ):
                law = dist.MultivariateNormal(torch.zeros(r), scale_tril=tril)
                pyro.sample("components_", law)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        with pyro.plate("draws", self.draws, dim=-3), poutine.scale(scale=1 / self.draws):
            yield
