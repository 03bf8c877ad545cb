"""The MonteCLoRA pair as the paper writes it, component by component: the tests' reference."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrolora.distributions import WishartCholesky


class Uncollapsed:
    """One adapted linear layer with N components a column: y ~ N(x (W + s B A)ᵀ, noise²).

    Hierarchical: δ_jk ~ N(0, Σ) in model and guide. Isotropic: δ_jk ~ N(0, I) in the model.
    """

    def __init__(self, W, B, M, scaling, sample_scale, df, noise, hierarchical, alpha0):
        self.W, self.B, self.M = W, B, M
        self.scaling, self.sample_scale, self.df, self.noise = scaling, sample_scale, df, noise
        self.hierarchical, self.alpha0 = hierarchical, alpha0

    def model(self, x: Tensor, y: Tensor) -> None:
        r, columns = self.M.shape
        n = len(self.alpha0)
        weights = pyro.sample("mixture_weights", dist.Dirichlet(self.alpha0))
        tril = pyro.sample("covariance_tril", WishartCholesky(self.df, torch.eye(r) / self.df**0.5))
        law = tril if self.hierarchical else torch.eye(r)
        with pyro.plate("columns", columns, dim=-1), pyro.plate("components", n, dim=-2):
            delta = pyro.sample(
                "components_", dist.MultivariateNormal(torch.zeros(r), scale_tril=law)
            )
        A = self.M + self.sample_scale * torch.einsum("k,kjr->rj", weights, delta)
        mean = x @ (self.W + self.scaling * self.B @ A).T
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, self.noise).to_event(1), obs=y)

    def guide(self, x: Tensor, y: Tensor, alpha: Tensor, scale: Tensor) -> None:
        r, columns = self.M.shape
        pyro.sample("mixture_weights", dist.Dirichlet(alpha))
        tril = pyro.sample(
            "covariance_tril", WishartCholesky(self.df, torch.diag(scale) / self.df**0.5)
        )
        with pyro.plate("columns", columns, dim=-1), pyro.plate("components", len(alpha), dim=-2):
            pyro.sample("components_", dist.MultivariateNormal(torch.zeros(r), scale_tril=tril))
