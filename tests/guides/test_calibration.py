"""Calibration by simulation: of data drawn from the model, the truth is one more posterior draw.

Truths are drawn from the prior and data from the likelihood. Among L draws of a right posterior
the truth then has every rank 0..L equally often, whatever function of it is ranked; of a posterior
too narrow it lies outside too often. An adapted network that falls apart into parts with data of
their own makes as many simulations as it has parts, in one inference.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pytest
import torch
from linear import GaussianOutputs, Layer, layer, svi
from problems import ABSOLUTE, absolute
from pyro import poutine
from scipy import stats
from torch import Tensor, nn

from pyrolora import AdapterConfig
from pyrolora.adapters import attach
from pyrolora.guides import MeanField, MonteCLoRA
from pyrolora.inference.mcmc import nuts
from pyrolora.model import build

pytestmark = pytest.mark.slow

DRAWS = 31
CELLS = 16
THRESHOLD = 1e-3


def p_value(draws: Tensor, truth: Tensor) -> float:
    """Test by chi-square that ranks of ``truth`` (N,) among ``draws`` (DRAWS, N) are uniform."""
    ranks = (draws < truth).sum(0)
    counts = (ranks * CELLS // (DRAWS + 1)).bincount(minlength=CELLS)
    return float(stats.chisquare(counts.numpy()).pvalue)


def narrower(draws: Tensor) -> Tensor:
    """The draws of a posterior whose scale is half of what it should be: with 128 ranks the test
    finds that always (in 1,500 simulations), a scale 1.5 times too small in four cases of five."""
    return draws.mean(0) + (draws - draws.mean(0)) / 2


def test_meanfield_is_calibrated_where_the_posterior_factorises():
    """XᵀX and BᵀB diagonal: every entry of A is a simulation of its own."""
    prior_scale, columns, outputs = 0.8, 128, 4
    guide = absolute(MeanField, kl_weight=1.0, prior_scale=prior_scale)
    problem = layer(guide, n=columns, inputs=columns, outputs=outputs)
    bank = problem.joint.program.bank
    ranks = nn.init.orthogonal_(torch.empty(2, outputs)) * torch.tensor([[0.4], [1.2]])
    bank.assign("B_loc", ranks.flatten())
    bank.get_parameter("B_loc").requires_grad_(False)
    inputs = nn.init.orthogonal_(torch.empty(columns, columns)) * (0.3 + torch.rand(columns))
    truth, labels = simulated(problem.joint, inputs)
    problem = Layer(problem.joint, inputs, labels)
    H = problem.quadratic("A")[0]
    assert (H - H.diag().diag()).abs().max() < 1e-4 * H.diag().min()

    svi(problem, steps=600, rate=0.1, draws=8)
    draws = problem.joint.program.draw(DRAWS)["A"]
    assert p_value(draws, truth["A"]) > THRESHOLD
    assert p_value(narrower(draws), truth["A"]) < THRESHOLD


class Parallel(nn.Module):
    """Layers side by side on the same inputs, (n, parts * outputs)."""

    def __init__(self, parts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(inputs, outputs, bias=False) for _ in range(parts))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


def simulated(joint, inputs: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The sites of one draw of the joint model, and its data."""
    with torch.no_grad():
        trace = poutine.trace(joint).get_trace({"inputs": inputs})
    sites = {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"}
    return sites, sites["y"]


FUNCTIONS: dict[str, Callable[[dict[str, Tensor], Tensor], Tensor]] = {
    "an entry of A": lambda sites, A: A[..., 0],
    "norm of A": lambda sites, A: A.norm(dim=-1),
    "mixture weights": lambda sites, A: sites["mixture_weights"].norm(dim=-1),
    "covariance": lambda sites, A: sites["covariance_tril"][..., 0, 0],
}


def test_nuts_is_calibrated_on_the_hierarchical_model():
    """MonteCLoRA of rank 1 with everything latent: π, Σ and the noise of 128 layers at once."""
    parts, inputs, thinning = 128, 2, 6
    network = Parallel(parts, inputs, 1)
    config = AdapterConfig(r=1, lora_alpha=1.0)
    guide = MonteCLoRA(
        component_prior="hierarchical", sample_scale=1.0, num_components=2, **ABSOLUTE
    )
    attachment = attach(network, config)
    joint = build(network, attachment, config, guide, GaussianOutputs(), 4)
    joint.program.bank.assign("B_loc", torch.ones(parts))
    X = torch.randn(4, inputs)
    truth, labels = simulated(joint, X)
    pyro.enable_validation(False)  # half of the time of a step
    found, _ = nuts(
        joint,
        {"inputs": X, "labels": labels},
        chains=1,
        num_samples=DRAWS * thinning,
        warmup_steps=120,
        max_tree_depth=5,
    )
    draws = {name: values[0, ::thinning] for name, values in found.items()}

    def entries(sites: dict[str, Tensor]) -> Tensor:
        factors = joint.program.factors({n: sites[n] for n in found})
        return factors.A.detach().unflatten(-1, (parts, inputs))

    values = {
        name: (function(draws, entries(draws)), function(truth, entries(truth)))
        for name, function in FUNCTIONS.items()
    }
    p = {name: p_value(*value) for name, value in values.items()}
    assert min(p.values()) > THRESHOLD, p
    drawn, true = values["an entry of A"]
    assert p_value(narrower(drawn), true) < THRESHOLD
