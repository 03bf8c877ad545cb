"""A fit that meets NaN or infinity stops before the parameters are touched."""

from __future__ import annotations

import functools
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import mlp
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

import pyrolora
from pyrolora import Posterior, guides
from pyrolora.adapters import Wrapper
from pyrolora.errors import NonFiniteError, PyroLoraError

# Pyro's validation announces what pyrolora then stops at.
pytestmark = pytest.mark.filterwarnings("ignore:Encountered (NaN|[+-]?inf):UserWarning")

GOOD_STEPS = 3
N, BATCH = 32, 8


class BreaksForward(nn.Module):
    """A plain network whose output turns to ``value`` after ``calls`` training passes."""

    def __init__(self, calls: int, value: float = torch.nan) -> None:
        super().__init__()
        self.net = mlp()
        self.left = calls
        self.value = value

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.net(inputs)
        if self.training:
            self.left -= 1
        return out * self.value if self.training and self.left < 0 else out


class BreaksBackward(BreaksForward):
    """The same for the gradient: outputs and the loss stay finite."""

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.net(inputs)
        if self.training:
            self.left -= 1
        return _Spoil.apply(out, self.value) if self.training and self.left < 0 else out


class _Spoil(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: float) -> Tensor:
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.value, None


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 4, generator=generator), torch.arange(N) % 3


def run(
    network: nn.Module, folder: Path, guide: Any, steps: int, accumulation: int = 1, **options: Any
) -> Posterior:
    """A fit of ``steps`` optimiser steps at a constant rate."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        per_device_train_batch_size=BATCH // accumulation,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    )
    adapter = pyrolora.AdapterConfig(r=2)
    return pyrolora.fit(
        network,
        data(),
        guide=guide,
        task="classification",
        adapter=adapter,
        training=arguments,
        **options,
    )


GUIDES = {
    "map": guides.MAP(),
    "montec": guides.MonteCLoRA(scale_updates="gradient"),
    "montec by curvature": guides.MonteCLoRA(),
    "montec-all": guides.MonteCLoRA(
        latent="AB",
        covariance="full",
        component_prior="hierarchical",
        learn_sample_scale=True,
        kl_weight=1.0,
    ),
}
BREAKS = {
    "nan loss": (BreaksForward, torch.nan),
    "infinite loss": (BreaksForward, torch.inf),
    "nan gradient": (BreaksBackward, torch.nan),
    "infinite gradient": (BreaksBackward, torch.inf),
}


@functools.cache
def undisturbed(guide: str, steps: int, accumulation: int) -> dict[str, Tensor]:
    """The posterior's tensors after ``steps`` good steps."""
    with tempfile.TemporaryDirectory() as folder:
        posterior = run(BreaksForward(10**6), Path(folder), GUIDES[guide], steps, accumulation)
    return posterior.model.own_state()


STOPS = [
    *((guide, kind, 1) for guide in GUIDES for kind in BREAKS),
    *((guide, kind, 2) for guide in ("map", "montec") for kind in ("nan loss", "nan gradient")),
]


@pytest.mark.parametrize(("guide", "kind", "accumulation"), STOPS)
def test_the_parameters_are_those_of_the_last_good_step(
    guide: str, kind: str, accumulation: int, tmp_path: Path
) -> None:
    """With accumulation the second half of the step is the one that breaks.

    Scales by curvature are those of the last time that they were set, and not the trained ones.
    """
    network, value = BREAKS[kind]
    calls = (GOOD_STEPS + 1) * accumulation - 1
    with pytest.raises(NonFiniteError) as caught:
        run(network(calls, value), tmp_path, GUIDES[guide], 8, accumulation)
    model = caught.value.posterior.model
    got, program = model.own_state(), model.program
    expected = undisturbed(guide, GOOD_STEPS, accumulation)
    assert set(got) == set(expected)
    settled = {f"program.{name}" for name in program.scale_parameters() if program.settles}
    assert bool(settled) == (guide == "montec by curvature")
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor) or name in settled, name
    earlier = undisturbed(guide, GOOD_STEPS - 1, accumulation)
    assert any(not torch.equal(earlier[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("guide", ["map", "montec", "montec by curvature"])
@pytest.mark.parametrize("kind", BREAKS)
def test_the_posterior_of_the_error_predicts_finite_numbers(
    guide: str, kind: str, tmp_path: Path
) -> None:
    network, value = BREAKS[kind]
    with pytest.raises(NonFiniteError) as caught:
        run(network(GOOD_STEPS, value), tmp_path, GUIDES[guide], 8)
    posterior = caught.value.posterior
    prediction = posterior.predict(data(), num_samples=4, seed=0)
    assert torch.isfinite(prediction.draws).all()
    assert torch.isfinite(prediction.log_likelihood).all()
    torch.testing.assert_close(prediction.probs.sum(-1), torch.ones(N))
    assert all(p.grad is None for p in posterior.model.parameters())
    logged = [entry["loss"] for entry in posterior.history if "loss" in entry]
    assert len(logged) == GOOD_STEPS
    assert torch.isfinite(torch.tensor(logged)).all()


def test_the_posterior_of_the_error_can_be_saved_and_detached(tmp_path: Path) -> None:
    network = BreaksForward(GOOD_STEPS)
    with pytest.raises(NonFiniteError) as caught:
        run(network, tmp_path / "run", GUIDES["montec"], 8)
    posterior = caught.value.posterior
    posterior.save(tmp_path / "saved")
    again = pyrolora.load(tmp_path / "saved", BreaksForward(0))
    expected = posterior.predict(data(), num_samples=4, seed=0).draws
    torch.testing.assert_close(again.predict(data(), num_samples=4, seed=0).draws, expected)
    assert posterior.detach() is network
    assert not any(isinstance(module, Wrapper) for module in network.modules())
    assert all(p.requires_grad for p in network.parameters())


def test_the_message_of_a_loss_names_step_site_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError) as caught:
        run(BreaksForward(GOOD_STEPS), tmp_path, GUIDES["montec"], 8)
    message = str(caught.value)
    assert f"before step {GOOD_STEPS + 1}" in message
    assert "not finite at site y" in message
    assert "learning rate (now 0.02)" in message
    assert "error.posterior" in message
    assert isinstance(caught.value, PyroLoraError)


def test_the_message_of_a_gradient_names_step_parameter_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError) as caught:
        run(BreaksBackward(GOOD_STEPS), tmp_path, GUIDES["montec"], 8)
    message = str(caught.value)
    assert f"before step {GOOD_STEPS + 1}" in message
    assert "gradient in 'program." in message
    assert "learning rate (now 0.02)" in message


class Spoil(TrainerCallback):
    """Sets the logarithm of the guide's sample scale after the last good step."""

    def __init__(self, log_scale: float) -> None:
        self.log_scale = log_scale

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == GOOD_STEPS:
            program = kwargs["model"].joint.program
            with torch.no_grad():
                program.get_parameter("sample_scale").fill_(self.log_scale)


def test_the_message_names_the_latent_site_that_breaks(tmp_path: Path) -> None:
    """The square of e^60 is infinite in single precision, and with it the KL of the noise."""
    guide = guides.MonteCLoRA(learn_sample_scale=True)
    with pytest.raises(NonFiniteError, match=f"step {GOOD_STEPS + 1}.*site.*kl/noise"):
        run(mlp(), tmp_path, guide, 8, callbacks=[Spoil(60.0)])


def test_a_scale_that_overflows_is_a_non_finite_objective_too(tmp_path: Path) -> None:
    """e^200 is infinite: Pyro's validation of the guide's law meets it before the objective."""
    guide = guides.MonteCLoRA(learn_sample_scale=True)
    with pytest.raises(NonFiniteError, match=f"step {GOOD_STEPS + 1}.*noise"):
        run(mlp(), tmp_path, guide, 8, callbacks=[Spoil(200.0)])


def test_the_very_first_step_can_break(tmp_path: Path) -> None:
    """There was no step to go back to: the error has no posterior, and the network is bare."""
    for network in (BreaksForward(0), BreaksBackward(0)):
        with pytest.raises(NonFiniteError, match=r"before step 1, .* with r=2") as caught:
            run(network, tmp_path, GUIDES["map"], 8)
        assert caught.value.posterior is None
        assert not any(isinstance(module, Wrapper) for module in network.modules())


@pytest.mark.parametrize("steps", [8, GOOD_STEPS])
@pytest.mark.parametrize("log_scale", [60.0, 200.0, torch.nan])
def test_parameters_at_which_nothing_is_finite_are_not_good(
    log_scale: float, steps: int, tmp_path: Path
) -> None:
    """The posterior is that before the step which broke them, also if it was the last one."""
    expected: dict[str, Tensor] = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == GOOD_STEPS - 1:
                expected.update(kwargs["model"].joint.own_state())

    guide = guides.MonteCLoRA(learn_sample_scale=True)
    with pytest.raises(NonFiniteError) as caught:
        run(mlp(), tmp_path, guide, steps, callbacks=[Keep(), Spoil(log_scale)])
    words = f"the last good step, {GOOD_STEPS - 1} .*; those of step {GOOD_STEPS} give no finite"
    assert re.search(words, str(caught.value))
    got = caught.value.posterior.model.own_state()
    assert expected
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    assert torch.isfinite(caught.value.posterior.predict(data(), num_samples=4, seed=0).draws).all()
