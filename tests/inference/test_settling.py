"""Scales where the objective has its optimum: known answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import mlp
from torch import Tensor, nn
from torch.distributions import Dirichlet, kl_divergence

import pyrolora
from pyrolora import guides
from pyrolora.guides import Curvature
from pyrolora.guides.mixture import SymmetricMixture

MONTEC = guides.MonteCLoRA(
    scale_updates="curvature", units="fan_in", sample_scale=1.6, prior_mean="learned", kl_weight=1.0
)
MEANFIELD = guides.MeanField(
    scale_updates="curvature", units="fan_in", prior_scale=1.0, prior_mean="learned", kl_weight=1.0
)
ADAPTER = pyrolora.AdapterConfig(r=1, target_modules=["0"])


def linear(n: int, width: int, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    X = torch.randn(n, width)
    y = X @ torch.randn(width) / width**0.5 + 0.3 * torch.randn(n)
    return nn.Sequential(nn.Linear(width, 1)), (X, y)


def fitted(n: int, width: int, guide: Any, **options: Any) -> tuple[Any, Tensor]:
    """The posterior of A given B, and the sum of squared gradients of each entry, over σ²."""
    network, data = linear(n, width)
    posterior = pyrolora.fit(
        network, data, guide, task="regression", adapter=ADAPTER, seed=1, **options
    )
    program = posterior.model.program
    B = float(program.bank.get_parameter("B_loc").detach())
    noise = float(posterior.model.task.param("noise_scale").detach())
    scaling = program.bank.specs["0"].scaling
    return posterior, (scaling * B / noise) ** 2 * data[0].square().sum(0)


@pytest.mark.parametrize("width", [16, 1024])
@pytest.mark.parametrize("n", [20, 200, 2000])
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_mean_field_has_the_deviations_of_the_optimum(n: int, width: int, beta: float) -> None:
    posterior, curvature = fitted(n, width, replace(MEANFIELD, kl_weight=beta))
    exact = (curvature / beta + width).rsqrt()  # the prior's variance is 1/in
    ratio = posterior.model.program.param("A_scale") / exact
    assert abs(float(ratio.median()) - 1) < 0.15
    assert float(((ratio - 1).abs() < 0.3).float().mean()) > 0.9


@pytest.mark.parametrize("width", [16, 1024])
@pytest.mark.parametrize("n", [20, 200, 2000])
def test_montec_has_the_optimum_of_its_objective(n: int, width: int) -> None:
    posterior, curvature = fitted(n, width, MONTEC)
    program = posterior.model.program
    best_v, best_alpha = optimum(
        float(curvature.sum()), width, program.df, float(program._epsilon) ** 2
    )
    v = float(program.param("scale_diag").detach().square())
    gain = spread(program.param("concentration")[0].detach())
    assert v * gain == pytest.approx(best_v * spread(best_alpha), rel=0.1)


def spread(alpha: Tensor) -> float:
    """E‖π‖²."""
    total = alpha.sum()
    return float((alpha * (alpha + 1)).sum() / (total * (total + 1)))


def optimum(H: float, columns: int, df: float, epsilon: float) -> tuple[float, Tensor]:
    """v and α, all four free, at the lowest −ELBO, by its gradient in their logarithms."""
    logs = torch.tensor([-0.5, 0.1, -0.1, 0.2, 0.05], dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([logs], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        v, alpha = logs[0].exp(), logs[1:].exp()
        total = alpha.sum()
        squared = (alpha * (alpha + 1)).sum() / (total * (total + 1))
        kl = kl_divergence(Dirichlet(alpha), Dirichlet(torch.ones(4, dtype=torch.float64)))
        value = 0.5 * epsilon * squared * v * H + 0.5 * (columns + df) * (v - v.log()) + kl
        value.backward()
        return value.detach()

    search.step(loss)
    best = logs.detach().exp()
    return float(best[0]), best[1:]


def test_a_full_covariance_and_several_blocks_have_their_optimum() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    posterior = pyrolora.fit(
        network,
        (torch.randn(8, 6), torch.randint(0, 4, (8,))),
        replace(MONTEC, covariance="full"),
        task="classification",
        adapter=pyrolora.AdapterConfig(r=3, target_modules=["0", "2"]),
        epochs=1,
    )
    program = posterior.model.program
    root = torch.randn(2, 3, 7)
    program.settle(Curvature(torch.zeros(0), 40 * root @ root.mT), 0.5)
    V = program.param("scale_tril") @ program.param("scale_tril").mT
    for number, block in enumerate(program.layout.blocks):
        noise = float(program._epsilon[number]) ** 2 * spread(
            program.param("concentration")[number]
        )
        kappa = block.columns + program.df
        H = 40 * root[number] @ root[number].T
        wanted = torch.linalg.inv(torch.eye(3) + noise / (0.5 * kappa) * H)
        torch.testing.assert_close(V[number], wanted, rtol=0.05, atol=1e-4)


def test_the_best_symmetric_weights_are_those_of_a_fine_search() -> None:
    table = SymmetricMixture(4, 1.0, sparse=False)
    logs = torch.linspace(-3, 7, 100_001, dtype=torch.float64)
    a = logs.exp()
    kl = kl_divergence(Dirichlet(a[:, None].expand(-1, 4)), Dirichlet(torch.ones(1, 4).double()))
    for loss in (0.0, 3.0, 50.0):
        f = kl + loss * (a + 1) / (4 * a + 1)
        found = float(table.best(torch.tensor([loss]), torch.zeros(1))[0])
        assert found == pytest.approx(float(a[f.argmin()]), rel=0.03)


def test_fits_share_the_moments_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take as long as the rest of a short fit."""
    options = {"task": "classification", "epochs": 1, "adapter": ADAPTER}
    data = torch.randn(8, 4), torch.randint(0, 3, (8,))
    pyrolora.fit(mlp(), data, MONTEC, **options)
    monkeypatch.setattr(SymmetricMixture, "__init__", None)
    again = pyrolora.fit(mlp(), data, MONTEC, **options)
    assert again.history


# The data decide ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "guide",
    [MONTEC, MEANFIELD, guides.MonteCLoRA(), guides.MeanField()],
    ids=["montec", "meanfield", "montec by default", "meanfield by default"],
)
def test_widths_are_not_those_of_the_schedule(guide: Any) -> None:
    """Twice the steps, and half the rate with them. The noise of the function, s B A x, in units of
    the data's: that of A alone goes with B, which a longer training makes another one."""
    widths = []
    for epochs, rate in ((60, 2e-2), (120, 2e-2), (120, 1e-2)):
        posterior, _ = fitted(200, 16, guide, epochs=epochs, learning_rate=rate, batch_size=60)
        widths.append(relative_deviation(posterior))
    assert max(widths) / min(widths) < 1.1


def relative_deviation(posterior: Any) -> float:
    """The median deviation of an entry of s B A, in units of the noise of the regression."""
    program = posterior.model.program
    noise = float(posterior.model.task.param("noise_scale").detach())
    slope = program.bank.specs["0"].scaling * float(program.bank.get_parameter("B_loc").detach())
    return deviation(posterior) * abs(slope) / noise


def deviation(posterior: Any) -> float:
    """The median deviation of an entry of A."""
    program = posterior.model.program
    torch.manual_seed(0)
    return float(program.factors(program.draw(400)).A.detach().std(0).median())


def test_four_times_the_data_halve_them() -> None:
    deviations = []
    for n in (500, 2000):
        posterior, _ = fitted(n, 16, MEANFIELD, epochs=40 * 500 // n, learning_rate=1e-2)
        deviations.append(relative_deviation(posterior))
    assert deviations[0] / deviations[1] == pytest.approx(2, rel=0.1)


def test_without_a_word_from_the_data_the_prior_stays() -> None:
    """B is zero, so that the data say nothing of A: the widths are the prior's."""
    network, data = linear(100, 16)
    plain = pyrolora.fit(
        network,
        data,
        "map",
        task="regression",
        adapter=ADAPTER,
        epochs=1,
        learning_rate=1e-12,
    )
    posterior = pyrolora.fit(plain, data, MEANFIELD)
    assert deviation(posterior) == pytest.approx(16**-0.5, rel=0.1)


@pytest.mark.parametrize("width", [64, 384, 2048, 8192])
def test_the_noise_of_a_product_is_the_same_at_every_width(width: int) -> None:
    network = nn.Sequential(nn.Linear(width, 4))
    data = (torch.randn(8, width), torch.randint(0, 4, (8,)))
    torch.manual_seed(0)
    for guide in (MONTEC, MEANFIELD):
        posterior = pyrolora.fit(
            network,
            data,
            guide,
            task="classification",
            adapter=pyrolora.AdapterConfig(r=4, target_modules=["0"]),
            epochs=1,
        )
        program = posterior.model.program
        x = torch.ones(width)
        torch.manual_seed(1)
        A = program.factors(program.draw(300)).A.detach().unflatten(-1, (4, width))
        noise = (A @ x).std(0).square().mean().sqrt()
        assert float(noise) == pytest.approx(1.0, rel=0.25)


@pytest.mark.parametrize("guide", [guides.MonteCLoRA(), guides.MeanField()], ids=["montec", "mean"])
def test_means_that_no_law_has_are_an_error_of_the_fit(guide: Any) -> None:
    """The draws that a curvature is made of cannot be drawn, before the second step."""
    network, data = linear(200, 16)
    with pytest.raises(
        pyrolora.errors.NonFiniteError, match=r"before step 2: .* no optimal scales .*Lower the l"
    ):
        pyrolora.fit(
            network, data, guide, task="regression", adapter=ADAPTER, epochs=1, learning_rate=1e38
        )


def test_what_has_no_closed_optimum_is_refused() -> None:
    for options in (
        {"learn_sample_scale": True},
        {"component_prior": "hierarchical", "prior_mean": "zero"},
    ):
        with pytest.raises(pyrolora.PyroLoraError, match="no closed optimum"):
            guides.MonteCLoRA(scale_updates="curvature", **options)
    with pytest.raises(pyrolora.PyroLoraError, match="no closed optimum"):
        guides.LowRank(scale_updates="curvature")
    network, data = linear(20, 16)
    first = pyrolora.fit(network, data, MEANFIELD, task="regression", adapter=ADAPTER)
    with pytest.raises(pyrolora.PyroLoraError, match="after an earlier posterior"):
        pyrolora.fit(network, data, prior=first)
