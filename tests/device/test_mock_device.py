"""The device refuses what an accelerator refuses, and tells what one waits for."""

from __future__ import annotations

import mock_device
import pytest
import torch
from problems import bert, tokens
from torch import nn

import pyrolora
from pyrolora.errors import DataError
from pyrolora.model.network import AdaptedNetwork


def test_operands_of_two_devices_are_refused() -> None:
    there, here = torch.ones(3, device="mock"), torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        there + here
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([there, here])
    assert (there + torch.tensor(1.0)).tolist() == [2, 2, 2]  # a number may be the host's


def test_a_generator_belongs_to_its_device() -> None:
    with pytest.raises(RuntimeError, match="generator of mock"):
        torch.randn(2, device="mock", generator=torch.Generator())
    torch.manual_seed(3)
    first = torch.randn(4, device="mock")
    torch.manual_seed(3)
    assert first.tolist() == torch.randn(4, device="mock").tolist()
    assert first.tolist() == torch.randn(4, generator=torch.Generator().manual_seed(3)).tolist()


def test_waits_and_copies_are_counted() -> None:
    x, mask = torch.arange(4.0, device="mock"), torch.tensor([True, False, True, False])
    with mock_device.watched() as events:
        float(x.sum())
        x.cpu()
        x[mask.to("mock")]
        x[torch.tensor([0, 1])]
        x.square()
    assert sum(events.of("wait").values()) == 3
    assert sum(events.of("copy").values()) == 2
    assert {name for _, name, _ in events} >= {"aten::sum", "aten::pow"}
    assert all("test_mock_device.py" in place for place in events.of("wait"))


def test_gradients_and_parameters_stay_on_the_device() -> None:
    layer = nn.Linear(3, 2)
    weight = layer.weight
    layer.to("mock")
    layer(torch.ones(1, 3, device="mock")).sum().backward()
    assert layer.weight is weight
    assert weight.grad is not None
    assert weight.grad.device.type == weight.device.type == "mock"


def test_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that a pass makes on the CPU, and a number that it reads, do not go unseen."""
    posterior = pyrolora.fit(bert(), tokens(8), "map", epochs=1)
    original = AdaptedNetwork.run

    def reads(self: AdaptedNetwork, *args: object, **kwargs: object) -> object:
        result = original(self, *args, **kwargs)
        self.seen = float(result.sum())
        return result

    def mixes(self: AdaptedNetwork, *args: object, **kwargs: object) -> object:
        return original(self, *args, **kwargs) + torch.zeros(1)

    with mock_device.watched() as events:
        posterior.predict(tokens(4))
    before = sum(events.of("wait").values())
    monkeypatch.setattr(AdaptedNetwork, "run", reads)
    with mock_device.watched() as events:
        posterior.predict(tokens(4))
    assert sum(events.of("wait").values()) == before + 1
    monkeypatch.setattr(AdaptedNetwork, "run", mixes)
    with pytest.raises(DataError, match="same device"):
        posterior.predict(tokens(4))
