"""A fit or a load that fails, at whatever stage, leaves the network as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import bert, reviews, tokenizer
from torch import nn
from transformers import TrainerCallback

import pyrolora
from pyrolora import AdapterConfig, Posterior
from pyrolora.attaching import attached
from pyrolora.errors import NonFiniteError


class Broken(Exception):
    """What the stage raises."""


def breaks(*_: Any, **__: Any) -> Any:
    raise Broken


class Break(TrainerCallback):
    """Raises in the middle of training."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise Broken


def look(network: nn.Module) -> dict[str, Any]:
    """Everything of a network that a fit may touch."""
    return {
        "modules": [(name, id(module)) for name, module in network.named_modules()],
        "modes": [module.training for module in network.modules()],
        "gradients": [p.requires_grad for p in network.parameters()],
        "devices": [p.device for p in network.parameters()],
        "weights": [p.detach().clone() for p in network.parameters()],
    }


def assert_unchanged(network: nn.Module, before: dict[str, Any]) -> None:
    after = look(network)
    weights = zip(after.pop("weights"), before.pop("weights"), strict=True)
    assert after == before
    assert all(torch.equal(new, old) for new, old in weights)


def network_of_mixed_modes() -> nn.Module:
    network = bert(initializer_range=0.3).train()
    network.classifier.eval()
    next(network.parameters()).requires_grad_(False)
    return network


OPTIONS: dict[str, Any] = {
    "tokenizer": tokenizer(),
    "adapter": AdapterConfig(r=2),
    "epochs": 2,
    "batch_size": 8,
    "seed": 0,
}
FIT = {
    "the layers are wrapped": "pyrolora.fitting.fresh.attach",
    "a first joint model": "pyrolora.fitting.fresh.build",
    "layers that are not called": "pyrolora.model.JointModel.uncalled",
    "the start of the factors": "pyrolora.fitting.fresh.start_of",
    "ranks that move": "pyrolora.fitting.fresh.check_allocation",
    "the first pass": "pyrolora.fitting.fresh.check_first_pass",
    "the digests": "fit.describe_base",
    "the run": "fit.Run",
    "the posterior": "pyrolora.posterior.Posterior.__init__",
    "the inference": "pyrolora.guides.MeanField.infer",
    "the scores at the end": "pyrolora.inference.Run.conclude",
}


def break_at(monkeypatch: pytest.MonkeyPatch, target: str, function: Any = breaks) -> None:
    """Have ``target`` raise; the module ``fit`` is hidden behind its function."""
    if target.startswith("fit."):
        monkeypatch.setattr(sys.modules["pyrolora.fitting.fit"], target[4:], function)
    else:
        monkeypatch.setattr(target, function)


@pytest.mark.parametrize("stage", FIT)
def test_a_fit_that_fails_leaves_the_network_as_it_was(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = network_of_mixed_modes()
    before = look(network)
    break_at(monkeypatch, FIT[stage])
    with pytest.raises(Broken):
        pyrolora.fit(network, reviews(16), "meanfield", eval_data=reviews(6, 1), **OPTIONS)
    assert_unchanged(network, before)


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
def test_so_does_one_that_is_interrupted_while_it_trains(error: type[BaseException]) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise error

    network = network_of_mixed_modes()
    before = look(network)
    with pytest.raises(error):
        pyrolora.fit(network, reviews(16), "meanfield", callbacks=Stop(), **OPTIONS)
    assert_unchanged(network, before)


def test_the_copy_of_a_full_fine_tuning_is_all_that_trains() -> None:
    network = network_of_mixed_modes()
    before = look(network)
    with pytest.raises(Broken):
        pyrolora.fit(
            network, reviews(16), "full", callbacks=Break(), tokenizer=tokenizer(), epochs=1
        )
    assert_unchanged(network, before)


def fitted() -> Posterior:
    return pyrolora.fit(bert(initializer_range=0.3), reviews(16), "meanfield", **OPTIONS)


EARLIER = {
    "the joint model": "pyrolora.fitting.earlier.build",
    "its means": "pyrolora.model.JointModel.adopt",
    "the first pass": "pyrolora.fitting.earlier.check_first_pass",
    "the run": "fit.Run",
    "the inference": "pyrolora.guides.MeanField.infer",
}


@pytest.mark.parametrize("stage", EARLIER)
@pytest.mark.parametrize("origin", ["given", "prior", "prior on a copy"])
def test_an_earlier_posterior_and_its_network_stay(
    origin: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fitted()
    network = bert(initializer_range=0.3) if origin == "prior on a copy" else first.base
    before, expected = look(network), first.predict(reviews(4), 2, seed=0).draws
    break_at(monkeypatch, EARLIER[stage])
    options = {} if origin == "given" else {"prior": first, "epochs": 1}
    model = first if origin == "given" else network
    with pytest.raises(Broken):
        pyrolora.fit(model, reviews(16, 1), guide="meanfield", **options)
    assert_unchanged(network, before)
    assert torch.equal(first.predict(reviews(4), 2, seed=0).draws, expected)


LOAD = {
    "the recognition of the network": "check_base",
    "its layers": "_check_layers",
    "the joint model": "build",
    "the values": "_check_values",
}


@pytest.mark.parametrize("stage", LOAD)
def test_a_load_that_fails_leaves_the_network_as_it_was(
    stage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fitted().save(tmp_path)
    network = network_of_mixed_modes()
    before = look(network)
    monkeypatch.setattr(f"pyrolora.loading.{LOAD[stage]}", breaks)
    with pytest.raises(pyrolora.PyroLoraError, match="Broken"):
        pyrolora.load(tmp_path, network)
    assert_unchanged(network, before)


@pytest.mark.parametrize("stage", ["own_new_weights", "Attachment", "build", "_check_values"])
def test_an_adapter_that_is_not_read_leaves_the_network_as_it_was(
    stage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fitted().to_peft(tmp_path)
    network = network_of_mixed_modes()
    before = look(network)
    monkeypatch.setattr(f"pyrolora.loading.{stage}", breaks)
    with pytest.raises(Broken):
        pyrolora.from_peft(tmp_path, network)
    assert_unchanged(network, before)


# The context manager itself -----------------------------------------------------------------------


def attachment_of(network: nn.Module) -> Callable[[], Any]:
    return lambda: pyrolora.adapters.attach(network, AdapterConfig(r=2))


def test_what_works_stays_attached() -> None:
    network = bert()
    with attached(network, attachment_of(network)) as attachment:
        network.train()
    assert attachment.attached
    assert network.training
    assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("usable", [True, False])
def test_an_error_with_a_usable_posterior_leaves_the_adapters_on(usable: bool) -> None:
    network, error = bert(), NonFiniteError("the loss is nan")
    error.posterior = "usable" if usable else None
    with (
        pytest.raises(NonFiniteError),
        attached(network, attachment_of(network)) as attachment,
    ):
        raise error
    assert attachment.attached is usable


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_the_network_comes_back_to_its_device() -> None:
    network = network_of_mixed_modes()
    before = look(network)
    with pytest.raises(Broken):
        pyrolora.fit(network, reviews(16), "meanfield", callbacks=Break(), **OPTIONS)
    assert_unchanged(network, before)
