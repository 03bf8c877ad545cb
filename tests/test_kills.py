"""The harness of kills: that it kills where it says, and a short run of it over all settings."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SETTINGS = ["montec", "rank allocation", "swag", "ensemble", "laplace", "nuts", "flat+montec"]


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("faults")
    for name in ("faults", "fuzz", "fuzz_mutations"):
        sys.modules.pop(name, None)


def test_events_are_those_in_the_folder_and_the_last_one_is_deadly(
    faults: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(number))
    events = faults.Events(tmp_path / "run", 3)
    events("open", (str(tmp_path / "run" / "a"), "w", os.O_WRONLY))
    events("open", (str(tmp_path / "run" / "a"), "r", os.O_RDONLY))
    events("open", (str(tmp_path / "elsewhere"), "w", os.O_WRONLY))
    events("os.rename", (str(tmp_path / "run" / "a"), str(tmp_path / "run" / "b"), -1, -1))
    assert (events.count, sent) == (2, [])
    (tmp_path / "run").mkdir()
    events.in_halves(torch.save)(torch.zeros(99), tmp_path / "run" / "c")
    assert (events.count, sent) == (4, [signal.SIGKILL])
    with pytest.raises(RuntimeError):  # it is half a file at that moment
        torch.load(tmp_path / "run" / "c", weights_only=True)


def test_a_difference_is_told(faults: Any) -> None:
    whole = {"tensors": {"a": torch.ones(2)}, "history": [{"loss": 1.0}], "files": ["posterior"]}
    assert faults.difference(dict(whole), whole) is None
    for name, value in (
        ("tensors", {"a": torch.tensor([1.0, 1.0000001])}),
        ("tensors", {}),
        ("history", [{"loss": 1.0000001}]),
        ("files", ["posterior", "checkpoint"]),
    ):
        assert "other" in faults.difference({**whole, name: value}, whole)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["command", "call"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_kills_lose_nothing(setting: str, way: str, faults: Any) -> None:
    """In processes of their own, which are copies of a process with one thread."""
    words = ["--events", "30", "--moments", "3", "--only", setting, "--ways", way]
    command = [sys.executable, str(BENCHMARKS / "faults.py"), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert ": 0 failures" in done.stdout
    assert set(SETTINGS) == set(faults.SETTINGS)
