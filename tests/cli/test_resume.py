"""A fit that was stopped goes on under the same command, to the same result."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from console import done, pyrolora_, refused, saved
from problems import bert, reviews

import pyrolora
from pyrolora.inference import SVITrainer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    saved(bert(hidden_dropout_prob=0.1, initializer_range=0.3), place / "encoder")
    reviews(24).to_json(place / "train.jsonl")
    return place


def command(place: Path, output: Path, epochs: int = 5) -> list[str]:
    return [
        *("fit", str(place / "train.jsonl"), "--model", str(place / "encoder")),
        *("--output-dir", str(output), "--epochs", str(epochs), "--batch-size", "8", "--json"),
    ]


def state(folder: Path) -> dict[str, torch.Tensor]:
    return pyrolora.load(folder).model.own_state()


def assert_same(one: Path, other: Path) -> None:
    first, second = state(one), state(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``interrupt(n)``: control and C before the training step n + 1, once."""
    original = SVITrainer.training_step

    def at(step: int) -> None:
        def interrupted(self: SVITrainer, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == step:
                monkeypatch.setattr(SVITrainer, "training_step", original)
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        monkeypatch.setattr(SVITrainer, "training_step", interrupted)

    return at


def test_an_interrupted_fit_goes_on_to_the_same_result(
    place: Path, tmp_path: Path, interrupt: Any
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done(*command(place, whole))
    interrupt(10)
    result = pyrolora_(*command(place, stopped))
    assert result.code == 130
    assert result.out == ""
    assert "the same command goes on" in result.err
    assert "Traceback" not in result.err
    assert not (stopped / "posterior.json").exists()
    refused(pyrolora_("evaluate", stopped, place / "train.jsonl"), "not finished")

    resumed = done(*command(place, stopped))
    assert resumed.json["resumed_from_step"] == 10
    assert "going on from step 10" in resumed.err
    assert_same(whole, stopped)
    assert not list(stopped.glob("checkpoint-*"))


def test_a_fit_that_was_stopped_before_its_first_checkpoint_begins_anew(
    place: Path, tmp_path: Path, interrupt: Any
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done(*command(place, whole))
    interrupt(1)
    assert pyrolora_(*command(place, stopped)).code == 130
    assert not list(stopped.glob("checkpoint-*"))
    assert done(*command(place, stopped)).json["resumed_from_step"] == 0
    assert_same(whole, stopped)


@pytest.mark.parametrize("left", ["no state", "half a state"])
def test_a_checkpoint_that_was_not_whole_is_passed_over(
    left: str, place: Path, tmp_path: Path, interrupt: Any
) -> None:
    """As a kill during saving leaves it: the Trainer writes its state last."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done(*command(place, whole))
    interrupt(10)
    assert pyrolora_(*command(place, stopped)).code == 130
    checkpoints = sorted(stopped.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert [path.name for path in checkpoints] == ["checkpoint-8", "checkpoint-10"]
    last = checkpoints[-1] / "trainer_state.json"
    content = last.read_bytes()
    last.unlink()
    if left == "half a state":
        last.write_bytes(content[: len(content) // 2])
    assert done(*command(place, stopped)).json["resumed_from_step"] == 8
    assert_same(whole, stopped)


def test_other_settings_do_not_go_on_from_the_checkpoints(
    place: Path, tmp_path: Path, interrupt: Any
) -> None:
    interrupt(10)
    assert pyrolora_(*command(place, tmp_path / "run")).code == 130
    refused(
        pyrolora_(*command(place, tmp_path / "run"), "--learning-rate", 0.5),
        "learning_rate was 0.001, now 0.5",
    )
    assert list((tmp_path / "run").glob("checkpoint-*"))


def test_a_killed_process_goes_on_to_the_same_result(place: Path, tmp_path: Path) -> None:
    """SIGKILL between the first checkpoint and the end, in a process of its own."""
    epochs = 30
    killed = tmp_path / "killed"
    words = [sys.executable, "-m", "pyrolora", *command(place, killed, epochs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
        try:
            deadline = time.monotonic() + 300
            while not list(killed.glob("checkpoint-*/parts.json")):
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "posterior.json").exists(), "the fit was over before it was killed"
    resumed = done(*command(place, killed, epochs))
    assert resumed.json["resumed_from_step"] > 0
    whole = tmp_path / "whole"
    done(*command(place, whole, epochs))
    assert_same(whole, killed)


@pytest.mark.parametrize("member", [0, 1])
def test_an_interrupted_ensemble_goes_on_with_its_members(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: int
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    ensemble = ["--guide", "ensemble", "--set", "guide.members=2"]
    done(*command(place, whole), *ensemble)
    original, begun = SVITrainer.training_step, []

    def interrupted(self: SVITrainer, *args: Any, **kwargs: Any) -> Any:
        begun.append(self.state.global_step)
        if len(begun) == 10 + 15 * member:  # 15 steps a member
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SVITrainer, "training_step", interrupted)
    assert pyrolora_(*command(place, stopped), *ensemble).code == 130
    resumed = done(*command(place, stopped), *ensemble)
    assert "going on with the members" in resumed.err
    assert len(begun) < 2 * 15 + 10, "what was done is not done again"
    assert_same(whole, stopped)
