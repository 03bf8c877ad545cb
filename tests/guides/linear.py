"""One adapted linear layer with Gaussian noise: everything about it is known in closed form.

    y_i = (W + s B A) x_i + σ e_i,   e_i ~ N(0, I)

Given B it is a linear regression in A, and given A one in Bᵀ. With θ the entries of the latent
factor, row by row as in the bank, −log p(y|θ) = ½ θᵀ H θ − hᵀ θ + constant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.ops.stats import effective_sample_size
from pyro.optim import PyroLRScheduler
from torch import Tensor, nn

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.adapters import attach
from pyrolora.guides import MAP, Guide, averaged
from pyrolora.inference import NamedELBO
from pyrolora.model import JointGuide, JointModel, build
from pyrolora.posterior import Posterior
from pyrolora.tasks import Task

NOISE = 0.7


class GaussianOutputs(Task):
    """y ~ N(f, σ² I) on several outputs, with σ known."""

    name = "gaussian"
    linearisable = True

    @classmethod
    def matches(cls, network):
        return False

    def law(self, output, batch):
        return dist.Normal(output, NOISE).to_event(1)

    def targets(self, batch):
        return batch.get("labels")

    def curvature(self, output, batch) -> Iterator[Tensor]:
        for unit in torch.eye(output.shape[-1]) / NOISE:
            yield unit.expand_as(output)

    def check_labels(self, labels, network):
        assert labels.dim() == 2

    def check_output(self, output, labels):
        assert output.shape[1:] == labels.shape[1:]


@dataclass(frozen=True)
class Gaussian:
    """N(mean, precision⁻¹), in double precision."""

    mean: Tensor
    precision: Tensor

    @property
    def covariance(self) -> Tensor:
        return torch.linalg.inv(self.precision)


@dataclass(frozen=True)
class Layer:
    """The joint model of a guide on one adapted layer, and all of its data."""

    joint: JointModel
    inputs: Tensor
    labels: Tensor

    @property
    def batch(self) -> dict[str, Tensor]:
        return {"inputs": self.inputs, "labels": self.labels}

    def fit(self, guide: Guide) -> Posterior:
        """The posterior that ``guide`` adds to the means as they are."""
        given = Posterior(self.joint, MAP())
        return pyrolora.fit(given, (self.inputs, self.labels), guide=guide)

    def mean(self, factor: str) -> Tensor:
        """The mean of that factor's entries, flat."""
        return self.joint.program.bank.get_parameter(f"{factor}_loc").detach().double()

    def quadratic(self, factor: str) -> tuple[Tensor, Tensor]:
        """H and h for the entries of ``factor``."""
        bank = self.joint.program.bank
        A, B = (t.detach().double() for t in bank.matrices(bank.means())["0"])
        s, X = bank.specs["0"].scaling, self.inputs.double()
        residual = self.labels.double() - X @ self.joint.attachment.layers["0"].weight.double().T
        if factor == "A":
            H = torch.kron(s**2 * B.T @ B, X.T @ X)
            h = s * B.T @ residual.T @ X
        else:
            H = torch.kron(s**2 * A @ X.T @ X @ A.T, torch.eye(len(B), dtype=torch.float64))
            h = s * A @ X.T @ residual
        return (H / NOISE**2).detach(), (h.flatten() / NOISE**2).detach()

    def prior(self, factor: str, scale: float) -> Gaussian:
        """N(0, scale² I)."""
        mean = torch.zeros_like(self.mean(factor))
        return Gaussian(mean, torch.eye(len(mean), dtype=torch.float64) / scale**2)

    def posterior(self, factor: str, prior: Gaussian, power: float = 1.0) -> Gaussian:
        """∝ prior(θ) p(y|θ)^power."""
        H, h = self.quadratic(factor)
        precision = prior.precision + power * H
        mean = torch.linalg.solve(precision, prior.precision @ prior.mean + power * h)
        return Gaussian(mean, precision)

    def log_likelihood(self, factor: str, mean: Tensor, covariance: Tensor) -> Tensor:
        """E log p(y|θ), in nats, for θ of that mean and covariance."""
        H, h = self.quadratic(factor)
        at_zero = torch.zeros_like(mean)
        bank = self.joint.program.bank
        with torch.no_grad():
            output = self.joint.network(self.batch, bank.replaced(factor, at_zero.float()))
            constant = self.joint.task.log_prob(output, self.batch).sum()
        return constant + h @ mean - 0.5 * (mean @ H @ mean + (H * covariance).sum())


def layer(guide: Guide, n: int = 12, inputs: int = 3, outputs: int = 4, rank: int = 2) -> Layer:
    """A layer with random weights, means and data; the cosine of two ranks' means is near 0.5."""
    network = nn.Sequential(nn.Linear(inputs, outputs, bias=False))
    config = AdapterConfig(r=rank, lora_alpha=1.5 * rank)
    joint = build(network, attach(network, config), config, guide, GaussianOutputs(), n)
    bank = joint.program.bank
    for factor, columns in (("A", inputs), ("B", outputs)):
        ranks = nn.init.orthogonal_(torch.empty(rank, columns))
        bank.assign(f"{factor}_loc", (0.75 * ranks + 0.25 * ranks.sum(0)).flatten())
    return Layer(joint, torch.randn(n, inputs), torch.randn(n, outputs))


def svi(problem: Layer, steps: int, rate: float = 0.05, draws: int = 32) -> None:
    """Pyro's own SVI on what is not frozen; Adam's rate falls to a thousandth.

    A step averages the bound over ``draws`` draws, in one pass.
    """
    joint, posterior = problem.joint, JointGuide(problem.joint.program)

    def model(batch):
        with averaged("draws", draws):
            joint(batch)

    def guide(batch):
        with averaged("draws", draws):
            posterior()

    # A shorter memory than Adam's own: the gradients of the first steps are far larger.
    adam = {"optimizer": torch.optim.Adam, "optim_args": {"lr": rate, "betas": (0.9, 0.99)}}
    schedule = PyroLRScheduler(
        torch.optim.lr_scheduler.ExponentialLR, {**adam, "gamma": 1e-3 ** (1 / steps)}
    )
    inference = SVI(model, guide, schedule, NamedELBO())
    for _ in range(steps):
        inference.step(problem.batch)
        schedule.step()


def standard_errors(chains: Tensor, expected: Tensor) -> Tensor:
    """How many standard errors the mean of (chains, draws, k) is away from ``expected`` (k,).

    The error of the mean comes from the effective sample size.
    """
    total = chains.shape[0] * chains.shape[1]
    size = effective_sample_size(chains, 0, 1).clamp(min=1, max=total)
    error = chains.flatten(0, 1).std(0) / size.sqrt()
    return (chains.mean((0, 1)) - expected).abs() / error


def products(chains: Tensor, mean: Tensor) -> Tensor:
    """(chains, draws, k²): what has the covariance, row by row, for its mean."""
    deviation = chains - mean
    return (deviation.unsqueeze(-1) * deviation.unsqueeze(-2)).flatten(-2)
