"""``pyrolora --import``: the guides and tasks of another package, from a shell."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
from console import done, pyrolora_, refused, saved
from problems import bert, reviews

from pyrolora.guides import registry as guides
from pyrolora.tasks import registry as tasks

MODULE = """
from dataclasses import dataclass
from counting import Counts
from pyrolora.guides import MeanField, register
from pyrolora.tasks import register as register_task

@dataclass(frozen=True, kw_only=True)
class Own(MeanField):
    name = "own"

register(Own)
register_task(Counts)
"""
NAME = "a_package_of_hers"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / f"{NAME}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    saved(bert(1), tmp_path / "encoder")
    reviews(8).to_json("train.jsonl")
    return tmp_path


def afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what was registered, as a new process does."""
    house = {"montec": guides.guide_class("montec")}, {"regression": tasks.task_class("regression")}
    for registry, known in zip((guides, tasks), house, strict=True):
        monkeypatch.setattr(registry, "_REGISTRY", dict(known))
    sys.modules.pop(NAME, None)


def test_a_guide_and_a_task_of_another_package_go_through_the_commands(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    afresh(monkeypatch)
    options = ("--model", "encoder", "--guide", "own", "--task", "counts", "--epochs", 1)
    unknown = pyrolora_("--import", "nowhere", "fit", "train.jsonl", *options)
    refused(unknown, "cannot import 'nowhere'", "PYTHONPATH")
    told = done("--import", NAME, "fit", "train.jsonl", *options, "--output-dir", "run")
    assert f"--import {NAME} evaluate run" in told.out
    command = json.loads((place / "run" / "run.json").read_text())["command"]
    assert shlex.split(command)[:4] == ["pyrolora", "--import", NAME, "fit"]
    afresh(monkeypatch)
    refused(pyrolora_("evaluate", "run", "train.jsonl"), "'own'", "--import MODULE")
    scores = done("--import", NAME, "evaluate", "run", "train.jsonl", "--json").json
    assert scores["mean_deviance"] > 0
    assert "own" in pyrolora_("--import", NAME, "fit", "--help").out
