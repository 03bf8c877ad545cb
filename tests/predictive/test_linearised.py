"""Linearised draws against exact linearity, finite differences and laplace-torch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from problems import SIZES, bert, mlp, reviews, tokenizer
from torch import nn
from transformers import BertConfig, BertForMultipleChoice

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.adapters import FlatFactors, attach
from pyrolora.distributions import KroneckerNormal
from pyrolora.guides import MAP
from pyrolora.inference import kfac
from pyrolora.model import build
from pyrolora.predictive import linearised as module
from pyrolora.predictive.linearised import linearised
from pyrolora.tasks import task_for

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def joint_of(network, task=None, **config):
    """A joint model in double precision, its B away from zero."""
    options = AdapterConfig(**{"r": 2, "target_modules": "all-linear", **config})
    law = task_for(network, task)
    joint = build(network.double(), attach(network, options), options, MAP(), law, 1).double()
    bank = joint.program.bank
    bank.assign("B_loc", 0.5 * torch.randn_like(bank.B_loc))
    return joint


def mean_of(joint):
    factors = joint.program.bank.means()
    return FlatFactors(factors.A.detach(), factors.B.detach())


def around(mean, draws, scale=0.3):
    """Draws of both factors."""
    shifts = (scale * torch.randn(draws, len(t), dtype=t.dtype) for t in (mean.A, mean.B))
    return FlatFactors(*(t + shift for t, shift in zip((mean.A, mean.B), shifts, strict=True)))


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def network_and_batch(kind):
    if kind == "regression":
        return joint_of(mlp(outputs=1), kind, rank_pattern={"2": 1}), {"inputs": numbers(5, 4)}
    if kind == "classification":
        return joint_of(mlp(), kind, rank_pattern={"2": 1}), {"inputs": numbers(5, 4)}
    shape = (5, 6) if kind == "bert" else (5, 3, 6)
    ids = torch.randint(4, 16, shape)
    mask = torch.ones_like(ids)
    mask[0, ..., 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if kind == "bert":
        return joint_of(bert(num_labels=3, initializer_range=0.3)), batch
    torch.manual_seed(0)
    config = BertConfig(
        **SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3
    )
    network = BertForMultipleChoice(config).eval()
    return joint_of(network, modules_to_save=["classifier"]), batch


KINDS = ["regression", "classification", "bert", "choices"]


@pytest.mark.parametrize("factor", ["A", "B"])
def test_it_is_the_network_itself_where_that_is_linear(factor):
    """f = (W + s B A) x, with draws of one factor alone."""
    joint = joint_of(nn.Sequential(nn.Linear(4, 3)), "classification", lora_alpha=3.0)
    mean, batch = mean_of(joint), {"inputs": numbers(6, 4)}
    draws = replace(mean, **{factor: getattr(around(mean, 7), factor)})
    with torch.no_grad():
        expected = joint.network(batch, draws)
        mean_output = joint.network(batch, mean)
    found = linearised(joint, batch, mean, draws, rows=100)
    assert found.shape == (7, 6, 3)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (found - mean_output).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_from_the_mean_is_the_directional_derivative(kind):
    """Central differences with step h are wrong by O(h²), here < 1e-6, and by rounding, 1e-9."""
    joint, batch = network_and_batch(kind)
    mean = mean_of(joint)
    draws = around(mean, 3)
    with torch.no_grad():
        output = joint.network(batch, mean)
        h = 1e-7
        ahead, behind = (
            joint.network(
                batch,
                FlatFactors(
                    mean.A + sign * h * (draws.A - mean.A), mean.B + sign * h * (draws.B - mean.B)
                ),
            )
            for sign in (1, -1)
        )
    found = linearised(joint, batch, mean, draws, rows=100)
    assert found.shape == (3, *output.shape)
    slope = (ahead - behind) / (2 * h)
    torch.testing.assert_close(found - output, slope, rtol=1e-6, atol=1e-6)
    assert slope.abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_mean_it_is_the_network(kind):
    joint, batch = network_and_batch(kind)
    mean = mean_of(joint)
    draws = FlatFactors(mean.A.expand(2, -1), mean.B.expand(2, -1))
    expected = joint.network(batch, mean).detach()
    found = linearised(joint, batch, mean, draws, rows=100)
    torch.testing.assert_close(found, expected.expand_as(found), **CLOSE)


@pytest.mark.parametrize(
    ("rows", "entries", "sizes"),
    [(100, 2**26, [5]), (2, 2**26, [2, 2, 1]), (100, 3, [3, 2]), (100, 0, [1] * 5)],
    ids=["whole", "rows", "memory", "one"],
)
def test_chunks_of_bounded_size_give_the_same(monkeypatch, rows, entries, sizes):
    """``entries``: of the Jacobian, in multiples of the number of factor entries."""
    joint, batch = network_and_batch("classification")
    mean = mean_of(joint)
    draws = around(mean, 3)
    expected = linearised(joint, batch, mean, draws, rows=100)
    seen, run = [], joint.run

    def counted(chunk, binding):
        seen.append(len(chunk["inputs"]))
        return run(chunk, binding)

    monkeypatch.setattr(joint, "run", counted)
    total = mean.A.numel() + mean.B.numel()
    monkeypatch.setattr(module, "JACOBIAN_ENTRIES", entries if entries > 5 else entries * total)
    torch.testing.assert_close(linearised(joint, batch, mean, draws, rows), expected, **CLOSE)
    assert seen == sizes


def test_dropout_is_off_and_it_works_without_gradients():
    network = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3))
    joint = joint_of(network, "classification", lora_dropout=0.5)
    batch, mean = {"inputs": numbers(5, 4)}, mean_of(joint)
    draws = around(mean, 3)
    expected = linearised(joint.eval(), batch, mean, draws, rows=100)
    joint.train()
    with torch.no_grad():
        found = linearised(joint, batch, mean, draws, rows=100)
    assert joint.training
    torch.testing.assert_close(found, expected, **CLOSE)
    assert all(p.grad is None for p in joint.parameters())


# Laplace's predictive ----------------------------------------------------------------------------


def low_rank(outputs, task):
    """An adapted network whose own weights are 0, so that it is its adapters, with s = 1; and the
    same function as plain linear layers."""
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    pattern = {"2": min(2, outputs)}
    joint = joint_of(network, task, rank_pattern=pattern, lora_alpha=2.0, alpha_pattern=pattern)
    layers = []
    for name in ("0", "2"):
        for weight in joint.program.bank.matrices(mean_of(joint))[name]:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
            layer.weight.data.copy_(weight)
            layers.append(layer)
    return joint, nn.Sequential(*layers[:2], nn.Tanh(), *layers[2:])


def order_of(joint):
    """Where the entries of A, B, A, B (each row by row) of the plain layers lie in A and Bᵀ."""
    bank = joint.program.bank
    total = bank.layouts["A"].total
    index = FlatFactors(torch.arange(total), torch.arange(total, total + bank.layouts["B"].total))
    found = bank.matrices(index)
    return torch.cat([matrix.flatten() for name in ("0", "2") for matrix in found[name]])


def posterior(joint, batches, precision):
    """The Gaussian of A and Bᵀ together that Laplace's method gives."""
    layout, curvature = joint.program.bank.layout("AB"), kfac(joint, batches)
    eigen = [curvature[block.name].eigen() for block in layout.blocks]
    scale = torch.cat([(e.values + precision).rsqrt().flatten() for e in eigen])
    counts = [group.count for group in layout.groups]
    rows, columns = [], []
    for count in counts:
        run, eigen = eigen[:count], eigen[count:]
        rows.append(torch.stack([e.U for e in run]))
        columns.append(torch.stack([e.V for e in run]))
    mean = mean_of(joint)
    return KroneckerNormal(torch.cat([mean.A, mean.B]), scale, rows, columns, layout.groups)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_jacobian_and_predictive_covariance_are_those_of_laplace_torch(task):
    import laplace

    outputs = 3 if task == "classification" else 1
    joint, explicit = low_rank(outputs, task)
    x = numbers(11, 4)
    y = torch.arange(11) % 3 if task == "classification" else numbers(11, 1)
    peer = laplace.Laplace(
        explicit, task, subset_of_weights="all", hessian_structure="kron", prior_precision=0.7
    )
    data = torch.utils.data.TensorDataset(x, y)
    peer.fit(torch.utils.data.DataLoader(data, batch_size=11))
    test = {"inputs": numbers(4, 4)}
    their_jacobian, their_output = peer.backend.jacobians(test["inputs"])
    covariance = peer.functional_variance(their_jacobian)

    # Draws one unit from the mean along each coordinate: the Jacobian, column by column.
    mean, order = mean_of(joint), order_of(joint)
    sizes = [len(mean.A), len(mean.B)]
    units = torch.eye(sum(sizes), dtype=torch.float64)[order]
    steps = FlatFactors(
        *(m + u for m, u in zip((mean.A, mean.B), units.split(sizes, dim=1), strict=True))
    )
    found = linearised(joint, test, mean, steps, rows=100)
    found = found.reshape(-1, 4, outputs) - their_output.reshape(4, outputs)
    torch.testing.assert_close(found.permute(1, 2, 0), their_jacobian, **CLOSE)

    # Draws from the posterior, whose noise scale is 1 on both sides.
    law = posterior(joint, [{"inputs": x, "labels": y}], 0.7)
    n = 20_000
    draws = FlatFactors(*law.sample((n,)).split(sizes, dim=1))
    outcome = linearised(joint, test, mean, draws, rows=100).reshape(n, 4, outputs)
    deviation = outcome - their_output.reshape(4, outputs)
    empirical = torch.einsum("sbi,sbj->bij", deviation, deviation) / n
    sd = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    tolerance = 5 * math.sqrt(2 / n) * sd[:, :, None] * sd[:, None, :]
    assert ((empirical - covariance).abs() <= tolerance).all()


def test_inference_mode_changes_nothing():
    posterior = pyrolora.fit(
        bert(), reviews(12), guide="laplace", tokenizer=tokenizer(), epochs=1, seed=0
    )
    expected = posterior.predict(reviews(5), 3, seed=0).draws
    with torch.inference_mode():
        torch.testing.assert_close(posterior.predict(reviews(5), 3, seed=0).draws, expected)
    assert expected.std(0).min() > 0
