"""Kinds of linear layers: each computes with its weight as `kinds` says that it lies."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from pyrolora.adapters import AdapterConfig, FlatFactors, attach, bind
from pyrolora.adapters.kinds import (
    KINDS,
    LinearKind,
    computes_plainly,
    features,
    is_linear,
    oriented,
)
from pyrolora.adapters.modules import linear_layers
from pyrolora.guides import MAP
from pyrolora.model import build
from pyrolora.tasks import task_for

LAYERS = {nn.Linear: lambda: nn.Linear(3, 5), Conv1D: lambda: Conv1D(5, 3)}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.title)
def test_a_kind_has_the_sizes_and_the_orientation_of_its_class(kind: LinearKind) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[kind.module](), torch.randn(2, 3)
    assert is_linear(layer)
    assert computes_plainly(layer)
    assert features(layer) == (3, 5)
    weight = oriented(layer, layer.weight)
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias))
    assert torch.equal(oriented(layer, weight), layer.weight)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.title)
def test_an_adapter_adds_its_update_to_a_layer_of_each_kind(kind: LinearKind) -> None:
    """The walk of someone who adds a kind: found, wrapped, run, against s B A x by hand."""
    torch.manual_seed(0)
    network = nn.Sequential(LAYERS[kind.module](), nn.ReLU())
    assert [*linear_layers(network)] == ["0"]
    config = AdapterConfig(r=2, target_modules="all-linear")
    x = torch.randn(4, 3)
    plain = network[0](x).detach()
    attachment = attach(network, config)
    joint = build(network, attachment, config, MAP(), task_for(network, "classification"), 1)
    bank = joint.program.bank
    flat = FlatFactors(torch.randn(bank.layouts["A"].total), torch.randn(bank.layouts["B"].total))
    A, B = bank.matrices(flat)["0"]
    with torch.no_grad(), bind(joint.binding(flat)):
        adapted = network[0](x)
    torch.testing.assert_close(adapted, plain + bank.specs["0"].scaling * x @ A.T @ B.T)


def test_subclasses_that_compute_in_another_way_are_not_read() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    assert is_linear(Scaled(3, 5))
    assert not computes_plainly(Scaled(3, 5))
