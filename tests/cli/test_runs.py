"""A run's folder: whose it is, what is in it, and what is removed from it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pyrolora.cli.fitted import fitted
from pyrolora.cli.runs import Run
from pyrolora.errors import ConfigError, NonFiniteError

OPTIONS: dict[str, Any] = {
    "data": "/data/train.csv",
    "columns": {"text": ["title"], "label": None},
    "guide": {"name": "map", "kl_weight": 1.0},
    "epochs": 5.0,
}
COMMAND = "pyrolora fit train.csv --model encoder --output-dir run"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "new" / "run")


def begin(run: Run, options: Any = OPTIONS, *, write: bool = True) -> bool:
    return run.start(options, COMMAND, write=write)


def make(folder: Path, *names: str) -> None:
    """Files, or folders where the name ends in a slash."""
    for name in names:
        path = folder / name
        if name.endswith("/"):
            path.mkdir(parents=True)
            (path / "content").write_text("content")
        else:
            path.write_text("content")


def test_a_run_writes_down_what_was_asked_for(run: Run) -> None:
    assert run.record is None
    assert begin(run) is False
    record = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
    assert record == run.record
    assert record["command"] == COMMAND
    assert record["options"] == OPTIONS
    assert {"python", "pyrolora", "torch", "pyro-ppl", "transformers"} <= set(record["versions"])
    assert "result" not in record
    assert record["directory"] == str(Path.cwd())
    assert run.result is None
    assert run.columns() == OPTIONS["columns"]
    assert [path.name for path in run.folder.iterdir()] == ["run.json"], "a scratch file is left"


def test_the_same_run_is_known_again(run: Run) -> None:
    begin(run)
    before = (run.folder / "run.json").read_bytes()
    assert begin(run) is True
    assert (run.folder / "run.json").read_bytes() == before


def test_options_that_json_writes_otherwise_are_no_other_options(run: Run) -> None:
    options = {**OPTIONS, "adapter": {"target_modules": ("query", "value"), "rank_pattern": {1: 2}}}
    begin(run, options)
    assert begin(run, options) is True


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": 6.0}, ["epochs was 5.0, now 6.0"]),
        ({"data": "other.csv"}, ["data was '/data/train.csv', now 'other.csv'"]),
        ({"guide": {"name": "map", "kl_weight": 0.5}}, ["guide.kl_weight was 1.0, now 0.5"]),
        (
            {"guide": {"name": "montec", "sparse": True}},
            ["guide.name was 'map', now 'montec'", "guide.sparse was None, now True"],
        ),
        ({"columns": {"text": ["body"], "label": None}}, ["columns.text was ['title']"]),
        ({"training": {"optim": "sgd"}}, ["training was None, now {'optim': 'sgd'}"]),
    ],
)
def test_other_settings_are_refused_and_the_difference_named(
    change: dict[str, Any], words: list[str], run: Run
) -> None:
    begin(run)
    before = (run.folder / "run.json").read_bytes()
    with pytest.raises(ConfigError) as caught:
        begin(run, {**OPTIONS, **change})
    for word in (str(run.folder), *words, "--output-dir"):
        assert word in str(caught.value)
    same = set(OPTIONS) - set(change)
    assert not any(f"{name} was" in str(caught.value) for name in same)
    assert (run.folder / "run.json").read_bytes() == before


@pytest.mark.parametrize("name", ["posterior.json", "checkpoint-12/"])
def test_a_fit_without_a_record_is_left_alone(name: str, run: Run) -> None:
    run.folder.mkdir(parents=True)
    make(run.folder, name)
    with pytest.raises(ConfigError, match="holds another fit"):
        begin(run)
    assert [path.name for path in run.folder.iterdir()] == [name.rstrip("/")]


def test_a_file_is_no_folder(run: Run) -> None:
    run.folder.parent.mkdir()
    run.folder.write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        begin(run)
    assert run.folder.read_text() == "mine"


def test_a_folder_with_other_files_can_hold_a_run(run: Run) -> None:
    run.folder.mkdir(parents=True)
    make(run.folder, "notes.txt", "results/")
    assert begin(run) is False
    assert {path.name for path in run.folder.iterdir()} == {"notes.txt", "results", "run.json"}


def test_a_process_that_is_not_to_write_writes_nothing(run: Run) -> None:
    """Of several processes the first writes."""
    assert begin(run, write=False) is False
    assert not run.folder.exists()
    begin(run)
    assert begin(run, write=False) is True


def test_a_fit_without_a_good_state_ends_with_its_own_error(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(request: Any) -> None:
        raise NonFiniteError("the objective is not finite at the start")

    monkeypatch.setattr("pyrolora.fitting.fit_request", failing)
    begin(run)
    request: Any = None
    with pytest.raises(NonFiniteError, match="at the start"):
        fitted(run, request, resume=False, writes=True)


def test_another_version_is_noted_and_no_reason_to_stop(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(run)
    record = json.loads((run.folder / "run.json").read_text(encoding="utf-8"))
    record["versions"]["torch"] = "0.1"
    (run.folder / "run.json").write_text(json.dumps(record))
    assert begin(run) is True
    assert "torch was '0.1', now" in capsys.readouterr().err


def test_a_finished_run_keeps_its_result_and_no_checkpoints(run: Run) -> None:
    begin(run)
    make(run.folder, "posterior.json", "checkpoint-3/", "checkpoint-12/", "notes.txt")
    run.finish({"num_examples": 24, "metrics": {"nll": 0.5, "error_auroc": math.nan}})
    metrics = {"nll": 0.5, "error_auroc": None}  # JSON has no NaN
    assert run.result == {"num_examples": 24, "metrics": metrics}
    record = run.record
    assert record is not None
    assert record["options"] == OPTIONS
    names = {path.name for path in run.folder.iterdir()}
    assert names == {"run.json", "posterior.json", "notes.txt"}
    assert begin(run) is True


@pytest.mark.parametrize("name", ["checkpoint-best/", "checkpoint-notes.txt"])
def test_finishing_leaves_what_is_no_checkpoint_of_the_trainer(name: str, run: Run) -> None:
    begin(run)
    make(run.folder, "checkpoint-3/", name)
    run.finish({})
    assert {path.name for path in run.folder.iterdir()} == {"run.json", name.rstrip("/")}


def test_a_run_that_could_not_begin_leaves_nothing(run: Run) -> None:
    begin(run)
    run.abandon()
    assert not run.folder.exists()
    run.abandon()


def test_a_run_that_failed_after_a_checkpoint_can_go_on(run: Run) -> None:
    begin(run)
    make(run.folder, "checkpoint-3/")
    run.abandon()
    assert begin(run) is True


def test_a_run_that_could_not_begin_leaves_what_was_there_before(run: Run) -> None:
    run.folder.mkdir(parents=True)
    make(run.folder, "notes.txt")
    begin(run)
    run.abandon()
    assert [path.name for path in run.folder.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"3", b"null", b'"run"'])
def test_a_damaged_record_is_said_to_be_damaged(content: bytes, run: Run) -> None:
    begin(run)
    (run.folder / "run.json").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        begin(run)
    for word in ("run.json", "damaged", "choose another folder"):
        assert word in str(caught.value)
    assert (run.folder / "run.json").read_bytes() == content


def test_a_folder_saved_from_python_has_no_columns(run: Run) -> None:
    run.folder.mkdir(parents=True)
    assert run.columns() == {}
