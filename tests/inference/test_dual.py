"""The dual form of the linearised posterior: against closed forms and dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from guides.linear import Layer, layer
from problems import bert, bert_choice, mlp
from torch import Tensor

from pyrolora import AdapterConfig
from pyrolora.adapters import attach
from pyrolora.errors import DataError
from pyrolora.guides import MAP
from pyrolora.inference import dual as module
from pyrolora.inference import jacobian
from pyrolora.inference.dual import Dual, check_size
from pyrolora.model import JointModel, build
from pyrolora.tasks import task_for

DRAWS = 4000


def of_layer(problem: Layer, factor: str, draws: int = 1) -> Dual:
    """The dual form with its prior around zero."""
    zero = torch.zeros_like(problem.mean(factor)).float()
    return Dual(problem.joint, lambda: [problem.batch], zero, factor, draws)


def exact_evidence(problem: Layer, factor: str, precision: float) -> float:
    """log ∫ N(θ; 0, I/λ) p(y|θ) dθ, with −log p(y|θ) = ½ θᵀ H θ − hᵀ θ + constant."""
    H, h = problem.quadratic(factor)
    at_zero = problem.log_likelihood(factor, torch.zeros_like(h), torch.zeros_like(H))
    posterior = H + precision * torch.eye(len(h), dtype=torch.float64)
    gain = h @ torch.linalg.solve(posterior, h) - torch.logdet(posterior / precision)
    return float(at_zero + 0.5 * gain)


# A linear layer, Gaussian noise ------------------------------------------------------------------


@pytest.mark.parametrize("factor", ["A", "B"])
def test_the_evidence_of_a_linear_gaussian_layer_is_exact(factor):
    problem = layer(MAP())
    found = of_layer(problem, factor)
    for precision in (0.1, 1.0, 10.0):
        expected = exact_evidence(problem, factor, precision)
        assert found.mode(precision).log_evidence == pytest.approx(expected, rel=1e-5)


def test_the_best_precision_is_that_of_a_grid():
    problem = layer(MAP(), n=40)
    best = of_layer(problem, "A").best_precision()
    grid = [best * 10 ** (step / 10) for step in range(-20, 21)]
    values = [exact_evidence(problem, "A", λ) for λ in grid]
    assert values.index(max(values)) == 20
    assert min(values) < max(values) - 1


@pytest.mark.parametrize("factor", ["A", "B"])
def test_draws_have_the_exact_mean_and_covariance(factor):
    """An entry of a covariance of n draws has standard error at most sqrt(2 v_i v_j / n)."""
    problem = layer(MAP())
    exact = problem.posterior(factor, problem.prior(factor, 0.6))
    found = of_layer(problem, factor, DRAWS).deviations(0.6**-2).double() + problem.mean(factor)
    sd = exact.covariance.diagonal().sqrt()
    tolerance = 5 * math.sqrt(2 / DRAWS) * sd[:, None] * sd[None, :]
    assert ((found.T.cov() - exact.covariance).abs() <= tolerance).all()
    assert ((found.mean(0) - exact.mean).abs() <= 5 * sd / math.sqrt(DRAWS)).all()
    assert (sd < 0.5 * 0.6).any(), "the data say something"


# Networks ----------------------------------------------------------------------------------------


def problem_of(kind: str) -> tuple[JointModel, dict[str, Tensor]]:
    """A joint model with B away from zero, and a batch of examples."""
    batch: dict[str, Tensor]
    if kind in ("classes", "allocated"):
        network, batch = mlp(), {"inputs": torch.randn(7, 4), "labels": torch.arange(7) % 3}
        law = task_for(network, "classification")
    elif kind == "sure":
        network, batch = mlp(), {"inputs": torch.randn(7, 4), "labels": torch.arange(7) % 3}
        with torch.no_grad():
            network.get_submodule("2").weight.mul_(200)
        law = task_for(network, "classification")
    else:
        network = bert(3, initializer_range=0.3) if kind == "bert" else bert_choice()
        shape = (5, 6) if kind == "bert" else (5, 3, 6)
        ids = torch.randint(4, 16, shape)
        mask = torch.ones_like(ids)
        mask[0, ..., 4:] = 0
        batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(5) % 2}
        if kind == "choices":
            batch["choice_mask"] = torch.ones(5, 3, dtype=torch.bool)
            batch["choice_mask"][1, 2] = False
        law = task_for(network)
    config = AdapterConfig(
        r=2,
        target_modules="all-linear",
        modules_to_save=["classifier"] if kind in ("bert", "choices") else None,
        rank_allocation="alora" if kind == "allocated" else "uniform",
    )
    joint = build(network, attach(network, config), config, MAP(), law, 7)
    bank = joint.program.bank
    if kind == "allocated":
        idle = bank.mask().clone()
        idle[0, 1] = False
        bank.activate(idle)
    B = 0.5 * torch.randn_like(bank.get_parameter("B_loc"))
    bank.assign("B_loc", bank.kept("B", B))
    return joint, batch


def flat_output(joint: JointModel, batch: dict[str, Tensor], theta: Tensor) -> Tensor:
    output = joint.network(batch, joint.program.bank.replaced("AB", theta))
    return output.reshape(len(output), -1)


@pytest.mark.parametrize("kind", ["classes", "allocated", "bert", "choices"])
@pytest.mark.parametrize("size", [2**30, 1], ids=["one slab", "a layer a slab"])
def test_the_kernel_is_that_of_the_dense_jacobian(kind, size, monkeypatch):
    monkeypatch.setattr(jacobian, "SLAB_BYTES", size)
    joint, batch = problem_of(kind)
    theta = joint.program.bank.latent_part("AB", joint.program.bank.means()).detach()
    dense = torch.autograd.functional.jacobian(lambda t: flat_output(joint, batch, t), theta)
    halves = [{n: t[:3] for n, t in batch.items()}, {n: t[3:] for n, t in batch.items()}]
    found = Dual(joint, lambda: halves, torch.zeros_like(theta), "AB", 2)
    basis = torch.cat([part.basis for part in found.parts])
    assert basis.shape[-1] == 2, "three outputs, of which only differences count"
    rows = torch.einsum("nok,nop->nkp", basis, dense.double()).flatten(0, 1)
    for actual, expected in (
        (found.K, rows @ rows.T),
        (found.Jz, rows @ found.z.double().T),
        (found.start, -rows @ theta.double()),
    ):
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=1e-4 * float(expected.abs().max())
        )
    assert (found._only is None) == (size == 1)


def test_mode_and_covariance_are_those_of_the_dense_linearised_model():
    joint, batch = problem_of("classes")
    bank, precision = joint.program.bank, 3.0
    theta = bank.latent_part("AB", bank.means()).detach()
    dense = torch.autograd.functional.jacobian(lambda t: flat_output(joint, batch, t), theta)
    J, output = dense.double(), flat_output(joint, batch, theta).detach().double()
    mean = theta.double()
    for _ in range(100):  # Newton's method on θ itself, damped
        logits = output + J @ (mean - theta)
        p = logits.softmax(-1)
        slope = torch.nn.functional.one_hot(batch["labels"], 3) - p
        H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        gauss_newton = torch.einsum("nop,noq,nqr->pr", J, H, J)
        posterior = gauss_newton + precision * torch.eye(len(theta), dtype=torch.float64)
        gradient = torch.einsum("nop,no->p", J, slope) - precision * mean
        mean = mean + 0.5 * torch.linalg.solve(posterior, gradient)
    found = Dual(joint, lambda: [batch], torch.zeros_like(theta), "AB", DRAWS)
    mode = found.mode(precision)
    logits = output + J @ (mean - theta)
    log_likelihood = logits.log_softmax(-1).gather(1, batch["labels"][:, None]).sum()
    expected = log_likelihood - 0.5 * precision * mean @ mean
    expected -= 0.5 * torch.logdet(posterior / precision)
    assert mode.log_evidence == pytest.approx(float(expected), rel=1e-4)
    basis = torch.cat([part.basis for part in found.parts])
    rows = torch.einsum("nok,nop->nkp", basis, J).flatten(0, 1)
    torch.testing.assert_close(rows.T @ mode.alpha / precision, mean, rtol=1e-3, atol=1e-4)

    weighted = (mode.root.mT @ rows.unflatten(0, mode.root.shape[:2])).flatten(0, 1)
    inner = torch.eye(len(rows)).double() * precision + weighted @ weighted.T
    covariance = -weighted.T @ torch.linalg.solve(inner, weighted)
    covariance.diagonal().add_(1)
    torch.testing.assert_close(
        covariance / precision, torch.linalg.inv(posterior), rtol=1e-4, atol=1e-5
    )
    draws = found.deviations(precision).double() + theta
    sd = torch.linalg.inv(posterior).diagonal().sqrt()
    assert ((draws.mean(0) - mean).abs() <= 5 * sd / math.sqrt(DRAWS)).all()
    tolerance = 6 * math.sqrt(2 / DRAWS) * sd[:, None] * sd[None, :]
    assert ((draws.T.cov() - torch.linalg.inv(posterior)).abs() <= tolerance).all()


def test_the_evidence_of_a_regression_is_the_density_of_its_labels():
    """y ~ N(f(θ̄) + J (θ₀ − θ̄), σ² I + J Jᵀ / λ), whatever the network."""
    network, x, y = mlp(outputs=1), torch.randn(9, 4), torch.randn(9)
    config = AdapterConfig(r=1, target_modules="all-linear")
    law = task_for(network, "regression")
    law.start(y)
    joint = build(network, attach(network, config), config, MAP(), law, 9)
    bank, batch = joint.program.bank, {"inputs": x, "labels": y}
    bank.assign("B_loc", 0.5 * torch.randn_like(bank.get_parameter("B_loc")))
    theta = bank.latent_part("AB", bank.means()).detach()
    J = torch.autograd.functional.jacobian(lambda t: flat_output(joint, batch, t)[:, 0], theta)
    J, centre = J.double(), 0.3 * torch.randn_like(theta)
    found = Dual(joint, lambda: [batch], centre, "AB", 1)
    mean = flat_output(joint, batch, theta)[:, 0].detach() + J @ (centre - theta).double()
    for precision in (0.1, 10.0):
        covariance = law.noise().detach() ** 2 * torch.eye(9) + J @ J.T / precision
        expected = torch.distributions.MultivariateNormal(mean, covariance).log_prob(y)
        assert found.mode(precision).log_evidence == pytest.approx(float(expected), rel=1e-4)


def test_of_a_sure_network_the_directions_and_the_best_precision_are_found():
    """At its outputs the Hessian is zero but for rounding."""
    joint, batch = problem_of("sure")
    bank = joint.program.bank
    theta = bank.latent_part("AB", bank.means()).detach()
    assert flat_output(joint, batch, theta).softmax(-1).max(-1).values.median() > 1 - 1e-6
    found = Dual(joint, lambda: [batch], torch.zeros_like(theta), "AB", 1)
    assert found.k == 2
    best = found.best_precision()
    values = [found.mode(best * 10 ** (step / 10)).log_evidence for step in range(-20, 21, 5)]
    assert values.index(max(values)) == 4


def test_equal_examples_leave_a_kernel_without_negative_eigenvalues():
    joint, batch = problem_of("classes")
    same = {name: tensor[:1].expand(7, *tensor.shape[1:]) for name, tensor in batch.items()}
    theta = joint.program.bank.latent_part("AB", joint.program.bank.means()).detach()
    found = Dual(joint, lambda: [same], torch.zeros_like(theta), "AB", 1)
    values = torch.linalg.eigvalsh(found.K)
    assert (values[:12] < 1e-12 * values[-1]).all(), "two directions, seven times"
    one = found.mode(1e-9 * float(values[-1]))
    assert math.isfinite(one.log_evidence)
    assert torch.isfinite(found.deviations(1e-9 * float(values[-1]))).all()


# What is refused ---------------------------------------------------------------------------------


def test_too_many_rows_are_refused(monkeypatch):
    monkeypatch.setattr(module, "MOST_ROWS", 12)
    check_size(12)
    joint, batch = problem_of("classes")
    theta = joint.program.bank.latent_part("AB", joint.program.bank.means()).detach()
    with pytest.raises(DataError, match=r"7 x 2 here.*fit on 6 examples, or choose curvature="):
        Dual(joint, lambda: [batch], theta, "AB", 1)
