"""The gradient in the frozen weights: a plain backward pass', and nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import batch_of, bert, gpt2, mlp, tokens
from torch import nn

from pyrolora.adapters import attach
from pyrolora.adapters.config import AdapterConfig
from pyrolora.errors import ConfigError
from pyrolora.guides import MAP
from pyrolora.inference import weight_gradients
from pyrolora.model import build
from pyrolora.tasks import task_for


def joint_of(network, task=None, **options):
    config = AdapterConfig(r=2, **options)
    law = task_for(network, task)
    return build(network, attach(network, config), config, MAP(), law, 100)


def state_of(network):
    """Flags, gradients, modes and hooks."""
    return (
        [(n, p.requires_grad, p.grad) for n, p in network.named_parameters()],
        [(n, m.training, len(m._forward_hooks)) for n, m in network.named_modules()],
    )


@pytest.mark.parametrize("make", [bert, gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_networks_own_loss(make, dtype):
    """The loss is a mean over examples, or over the tokens that count."""
    network = make().to(dtype)
    plain, batch = copy.deepcopy(network), batch_of(tokens(6))
    if make is gpt2:
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][0, :5] = -100
    plain(**batch).loss.backward()
    joint = joint_of(network, target_modules="all-linear")
    before = state_of(network)
    found = weight_gradients(joint, batch)
    assert state_of(network) == before
    assert all(parameter.grad is None for parameter in joint.parameters())
    for name, gradient in found.items():
        expected = plain.get_submodule(name).weight.grad
        assert gradient.dtype == dtype
        close = {"atol": 2e-6, "rtol": 1e-4}
        if dtype == torch.bfloat16:
            close = {"atol": 0.05 * float(expected.abs().max()), "rtol": 0.05}
        torch.testing.assert_close(gradient, expected, **close)


def test_a_network_in_training_mode_runs_without_dropout_and_stays_in_it():
    network = bert(hidden_dropout_prob=0.5).train()
    joint = joint_of(network)
    joint.base.train()
    batch = batch_of(tokens(6))
    first, second = (weight_gradients(joint, batch) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert network.training


def test_a_weight_without_part_in_the_output_is_refused_and_nothing_is_left():
    class Half(nn.Sequential):
        def forward(self, x):
            return self[2](self[1](self[0](x)))

    network = Half(*mlp(), nn.Linear(3, 3))
    joint = joint_of(network, "classification")
    before = state_of(network)
    with pytest.raises(ConfigError, match=r"layer '3' has none.*exclude_modules"):
        weight_gradients(joint, {"inputs": torch.randn(5, 4), "labels": torch.zeros(5).long()})
    assert state_of(network) == before


def test_an_error_of_the_network_leaves_nothing_behind():
    network = mlp()
    joint = joint_of(network, "classification")
    before = state_of(network)
    with pytest.raises(RuntimeError, match="shape"):
        weight_gradients(joint, {"inputs": torch.randn(5, 3), "labels": torch.zeros(5).long()})
    assert state_of(network) == before


def test_a_weight_that_two_layers_share_gives_both_the_sum():
    network = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    network[2].weight = network[0].weight
    plain = copy.deepcopy(network)
    batch = {"inputs": torch.randn(5, 4), "labels": torch.arange(5) % 4}
    nn.functional.cross_entropy(plain(batch["inputs"]), batch["labels"]).backward()
    found = weight_gradients(joint_of(network, "classification"), batch)
    assert set(found) == {"0", "2"}
    for gradient in found.values():
        torch.testing.assert_close(gradient, plain[0].weight.grad)
