"""SIGTERM, and control and C, end a fit after a step that is saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import arguments, bert, tokens
from transformers import TrainerCallback

import pyrolora
from pyrolora import AdapterConfig, guides
from pyrolora.inference import last_checkpoint
from pyrolora.inference.stopping import TERMINATED, Stop, stopping

HANDLED = (signal.SIGTERM, signal.SIGINT)


class Signal(TrainerCallback):
    """Sends this process a signal within step ``step``, once or more often."""

    def __init__(self, number: int, step: int, times: int = 1) -> None:
        self.number, self.step, self.times = number, step, times

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            for _ in range(self.times):
                signal.raise_signal(self.number)


def fitted(
    folder: Path, network: Any = None, callback: Any = (), guide: Any = None, **changes: Any
) -> Any:
    options = {"save_strategy": "steps", "save_steps": 100, **changes}
    args = arguments(folder, **options)
    args.resume_from_checkpoint = "auto"
    network = bert(hidden_dropout_prob=0.1) if network is None else network
    adapter = AdapterConfig(r=2)
    options = {"training": args, "callbacks": callback, "adapter": adapter}
    return pyrolora.fit(network, tokens(16), guide, **options)


@pytest.fixture(autouse=True)
def _interrupts() -> Iterator[None]:
    """Control and C interrupts, also where this process runs in the background and ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return fitted(tmp_path_factory.mktemp("whole")).model.own_state()


@pytest.mark.parametrize("number", HANDLED)
@pytest.mark.parametrize("step", [2, 4])  # 4 is the last of an epoch
def test_a_signal_saves_the_step_and_the_same_call_goes_on(
    number: int, step: int, whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    network, handlers = bert(hidden_dropout_prob=0.1), [signal.getsignal(n) for n in HANDLED]
    modules = [id(module) for module in network.modules()]
    said = f"step {step} is saved in {tmp_path}.*'auto' goes on"
    if number == signal.SIGTERM:
        with pytest.warns(UserWarning, match=f"SIGTERM: {said}"), pytest.raises(SystemExit) as end:
            fitted(tmp_path, network, Signal(number, step))
        assert end.value.code == TERMINATED == 143
    else:
        with pytest.raises(KeyboardInterrupt, match=said):
            fitted(tmp_path, network, Signal(number, step))
    assert last_checkpoint(tmp_path) == tmp_path / f"checkpoint-{step}"
    assert [id(module) for module in network.modules()] == modules
    assert [signal.getsignal(n) for n in HANDLED] == handlers
    again = fitted(tmp_path).model.own_state()
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_the_second_control_and_c_acts_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match="at once"):
        fitted(tmp_path, callback=Signal(signal.SIGINT, 2, times=2))
    assert last_checkpoint(tmp_path) is None


class SignalAtTheEnd(TrainerCallback):
    """Sends this process a signal after the last step of each of its trainings."""

    def __init__(self, number: int) -> None:
        self.number, self.trainings = number, 0

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainings += 1
        signal.raise_signal(self.number)


@pytest.mark.parametrize("guide", [guides.MAP(), guides.Ensemble(members=2)], ids=lambda g: g.name)
def test_a_signal_after_the_last_step_is_obeyed(guide: Any, tmp_path: Path) -> None:
    end = SignalAtTheEnd(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"are done.*'auto' goes on"):
        fitted(tmp_path, callback=end, guide=guide)
    assert end.trainings == 1  # no further member is trained
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(fitted(tmp_path, guide=guide).history) > 0


def test_sigterm_after_the_last_step_is_obeyed(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"SIGTERM.*are done"), pytest.raises(SystemExit) as caught:
        fitted(tmp_path, callback=SignalAtTheEnd(signal.SIGTERM))
    assert caught.value.code == TERMINATED


@pytest.mark.filterwarnings("error")
def test_warnings_as_errors_keep_the_exit_status(capfd: pytest.CaptureFixture[str]) -> None:
    stop = Stop(saves=True)
    stop(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        stop.obey("step 2 is saved")
    assert caught.value.code == TERMINATED
    assert "SIGTERM: step 2 is saved; resume_from_checkpoint='auto'" in capfd.readouterr().err


def test_without_checkpoints_control_and_c_acts_at_once(tmp_path: Path) -> None:
    seen = []

    class Note(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(state.global_step)

    callbacks = [Note(), Signal(signal.SIGINT, 2)]
    with pytest.raises(KeyboardInterrupt):
        pyrolora.fit(bert(), tokens(16), training=arguments(tmp_path), callbacks=callbacks)
    assert seen == [1]


def test_a_handler_of_the_program_stays(tmp_path: Path) -> None:
    got: list[int] = []
    usual = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        with stopping(arguments(tmp_path, save_strategy="steps")) as stop:
            signal.raise_signal(signal.SIGTERM)
        assert got == [signal.SIGTERM]
        assert not stop.is_asked
    finally:
        signal.signal(signal.SIGTERM, usual)


def test_a_stop_that_was_not_asked_for_does_nothing() -> None:
    Stop(saves=True).obey("step 3 is saved")
