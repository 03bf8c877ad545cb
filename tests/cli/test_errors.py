"""What a user can mend is one line on standard error, an exit code, and no folder left behind."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from console import done, pyrolora_, refused, saved
from problems import bert, reviews

import pyrolora


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data good and bad, and a run."""
    place = tmp_path_factory.mktemp("place")
    saved(bert(initializer_range=0.3), place / "encoder")
    data = reviews(8)
    data.to_json(place / "train.jsonl")
    contents = {
        "empty.csv": "",
        "nolabel.csv": "text\ngood film\nbad film\n",
        "damaged.json": '[{"text": ',
        "latin.csv": "text,label\ncafé,1\nbar,0\n".encode("latin-1"),
        "missing.csv": "text,label\ngood,1\nbad,\n",
        "notext.csv": "text,label\ngood,1\n,0\n",
        "one.csv": "text,label\ngood film,fine\nbad film,fine\n",
        "unknown.csv": "text,label\ngood film,9\n",
        "negative.csv": "text,label\ngood film,-1\nbad film,1\n",
        "texts.csv": "one,two,label\na,b,1\nc,d,0\n",
        "broken/config.json": "{",
    }
    (place / "broken").mkdir()
    for name, content in contents.items():
        (place / name).write_bytes(content.encode() if isinstance(content, str) else content)
    datasets.DatasetDict(a=data, b=data).save_to_disk(place / "splits")
    done("fit", place / "train.jsonl", "--model", place / "encoder", "--output-dir", place / "run",
         "--epochs", 1)  # fmt: skip
    unfinished = place / "unfinished"
    unfinished.mkdir()
    record = json.loads((place / "run" / "run.json").read_text(encoding="utf-8"))
    del record["result"]
    (unfinished / "run.json").write_text(json.dumps({**record, "command": "pyrolora fit again"}))
    (place / "no-object").mkdir()
    (place / "no-object" / "run.json").write_text("[1]")
    return place


@pytest.fixture
def place(original: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(original)
    return original


TRAIN = ("train.jsonl", "--model", "encoder", "--epochs", "1")
FITS: dict[str, tuple[tuple[Any, ...], tuple[str, ...]]] = {
    "no such file": (("gone.jsonl", *TRAIN[1:]), ("no file 'gone.jsonl'",)),
    "no such data set": (("gone", *TRAIN[1:]), ("'gone' is no file or folder",)),
    "an ending that is none": (("encoder/vocab.bin", *TRAIN[1:]), ("encoder/vocab.bin",)),
    "an empty file": (("empty.csv", *TRAIN[1:]), ("empty.csv",)),
    "a damaged file": (("damaged.json", *TRAIN[1:]), ("damaged.json is not readable as json",)),
    "a file in Latin-1": (("latin.csv", *TRAIN[1:]), ("latin.csv", "UTF-8")),
    "a folder that is no data": (("encoder", *TRAIN[1:]), ("save_to_disk",)),
    "no label": (("nolabel.csv", *TRAIN[1:]), ("no labels", "--label")),
    "a missing label": (("missing.csv", *TRAIN[1:]), ("no label", "example 1")),
    "one class": (("one.csv", *TRAIN[1:]), ("two classes", "'fine'")),
    "a label below zero": (("negative.csv", *TRAIN[1:]), (">= 0", "-1")),
    "texts that could be either": (("texts.csv", *TRAIN[1:]), ("'one'", "'two'")),
    "no such text column": ((*TRAIN, "--text", "body"), ("no column 'body'", "'text'")),
    "no such label column": ((*TRAIN, "--label", "mood"), ("no column 'mood'",)),
    "three text columns": ((*TRAIN, *("--text", "text") * 3), ("--text",)),
    "one text column twice": ((*TRAIN, *("--text", "text") * 2), ("--text",)),
    "a split of a file": ((*TRAIN, "--split", "train"), ("no splits",)),
    "no such split": (("splits", *TRAIN[1:], "--split", "c"), ("no split 'c'", "'a', 'b'")),
    "no split for training": (("splits", *TRAIN[1:]), ("no split 'train'",)),
    "evaluation data that is not there": ((*TRAIN, "--eval-data", "gone.csv"), ("gone.csv",)),
    "evaluation data without labels": ((*TRAIN, "--eval-data", "nolabel.csv"), ("no labels",)),
    "evaluation data of other classes": ((*TRAIN, "--eval-data", "unknown.csv"), ("9",)),
    "no such model": (("train.jsonl", "--model", "gone"), ("cannot load the model 'gone'",)),
    "a damaged model": (("train.jsonl", "--model", "broken"), ("cannot load the model", "broken")),
    "no model": (("train.jsonl",), ("--model",)),
    "a model that is a file": (("train.jsonl", "--model", "train.jsonl"), ("cannot load",)),
    "no such guide": ((*TRAIN, "--guide", "vae"), ("'vae'", "montec")),
    "no such likelihood": ((*TRAIN, "--task", "poisson"), ("'poisson'", "regression")),
    "no such option": ((*TRAIN, "--warp", "9"), ("--warp",)),
    "epochs in words": ((*TRAIN, "--epochs", "many"), ("--epochs",)),
    "no epochs": ((*TRAIN, "--epochs", "0"), ("epochs must be", "0")),
    "epochs without end": ((*TRAIN, "--epochs", "inf"), ("epochs must be", "inf")),
    "a learning rate below zero": ((*TRAIN, "--learning-rate", "-1"), ("learning_rate", "-1")),
    "a batch of nothing": ((*TRAIN, "--batch-size", "0"), ("batch_size", "0")),
    "a seed that is too large": ((*TRAIN, "--seed", str(2**32)), ("--seed",)),
    "a text that is the label": ((*TRAIN, "--text", "text", "--label", "text"), ("'text'",)),
    "no such evaluation split": (
        (*TRAIN, "--eval-data", "splits", "--eval-split", "c"),
        ("no split 'c'",),
    ),
    "evaluation data without the usual splits": ((*TRAIN, "--eval-data", "splits"), ("--split",)),
    "a seed below zero": ((*TRAIN, "--seed", "-1"), ("--seed",)),
    "a setting that is none": ((*TRAIN, "--set", "r=4"), ("PART.OPTION=VALUE",)),
    "no such option of the guide": ((*TRAIN, "--set", "guide.warp=9"), ("warp", "kl_weight")),
    "no such option of the adapter": (
        (*TRAIN, "--set", "adapter.rank=9"),
        ("adapter.rank", "lora"),
    ),
    "no such option of the Trainer": ((*TRAIN, "--set", "training.warp=9"), ("training.warp",)),
    "an option of another name": ((*TRAIN, "--set", "training.seed=9"), ("use --seed",)),
    "a guide's option out of range": ((*TRAIN, "--set", "guide.kl_weight=-1"), ("kl_weight",)),
    "a guide's option in words": ((*TRAIN, "--set", "guide.kl_warmup=soon"), ("kl_warmup",)),
    "an adapter's option in words": (
        (*TRAIN, "--set", "adapter.lora_dropout=high"),
        ("lora_dropout",),
    ),
    "targets that are no names": ((*TRAIN, "--set", "adapter.target_modules=3"), ("target_mod",)),
    "targets that are not there": ((*TRAIN, "--set", "adapter.target_modules=x"), ("'x'",)),
    "a scheduler that is none": ((*TRAIN, "--set", "training.lr_scheduler_type=x"), ("x",)),
    "an optimiser that is none": ((*TRAIN, "--set", "training.optim=x"), ("x",)),
    "weight decay in words": ((*TRAIN, "--set", "training.weight_decay=heavy"), ("weight_decay",)),
    "steps in words": ((*TRAIN, "--set", "training.max_steps=x"), ("max_steps",)),
    "accumulation over nothing": (
        (*TRAIN, "--set", "training.gradient_accumulation_steps=0"),
        ("gradient_accumulation_steps",),
    ),
    "evaluation without data": ((*TRAIN, "--set", "training.eval_strategy=epoch"), ("eval_data",)),
    "what cannot be combined": (
        (*TRAIN, "--set", "training.label_smoothing_factor=0.1"),
        ("label_smoothing_factor",),
    ),
}


@pytest.mark.parametrize("case", FITS)
def test_a_fit_that_cannot_begin_leaves_no_folder(case: str, place: Path, tmp_path: Path) -> None:
    arguments, words = FITS[case]
    out = tmp_path / "new" / "run"
    refused(pyrolora_("fit", *arguments, "--output-dir", out), *words)
    assert not out.exists()


OTHERS: dict[str, tuple[tuple[Any, ...], tuple[str, ...]]] = {
    "an unknown command": (("train",), ("'train'",)),
    "no output folder": (("fit", *TRAIN), ("--output-dir",)),
    "an output folder that is a file": (
        ("fit", *TRAIN, "--output-dir", "train.jsonl"),
        ("train.jsonl is a file",),
    ),
    "a record that is no object": (
        ("fit", *TRAIN, "--output-dir", "no-object"),
        ("run.json is damaged",),
    ),
    "no such run": (("evaluate", "gone", "train.jsonl"), ("no folder 'gone'",)),
    "a folder that is no run": (("evaluate", "encoder", "train.jsonl"), ("posterior.json",)),
    "an unfinished run": (
        ("evaluate", "unfinished", "train.jsonl"),
        ("not finished", "pyrolora fit again"),
    ),
    "an unfinished run to export": (("export", "unfinished", "new"), ("not finished",)),
    "a run whose record is no object": (
        ("evaluate", "no-object", "train.jsonl"),
        ("run.json is damaged",),
    ),
    "another model": (
        ("evaluate", "run", "train.jsonl", "--model", "gone"),
        ("cannot load", "'gone'"),
    ),
    "evaluation without labels": (("evaluate", "run", "nolabel.csv"), ("no labels", "--label")),
    "evaluation with a class too many": (("evaluate", "run", "unknown.csv"), ("9",)),
    "evaluation of an unknown column": (
        ("evaluate", "run", "train.jsonl", "--label", "mood"),
        ("no column 'mood'",),
    ),
    "evaluation of an unknown file": (("evaluate", "run", "gone.csv"), ("gone.csv",)),
    "fewer draws than none": (
        ("evaluate", "run", "train.jsonl", "--num-samples", "-1"),
        ("num_samples", "-1"),
    ),
    "fewer draws than none to predict": (
        ("predict", "run", "train.jsonl", "--num-samples", "-1"),
        ("num_samples", "-1"),
    ),
    "a batch of nothing": (
        ("predict", "run", "train.jsonl", "--batch-size", "0"),
        ("batch_size", "0"),
    ),
    "a seed that is too large": (
        ("predict", "run", "train.jsonl", "--seed", str(2**70)),
        ("seed",),
    ),
    "prediction without the text": (("predict", "run", "texts.csv"), ("'one'", "'two'")),
    "prediction of an unknown column": (
        ("predict", "run", "train.jsonl", "--text", "body"),
        ("no column 'body'",),
    ),
    "prediction of missing texts": (("predict", "run", "missing.parquet"), ("missing values",)),
    "prediction of splits of other names": (
        ("predict", "run", "splits"),
        ("['a', 'b']", "--split"),
    ),
    "prediction to a file of another kind": (
        ("predict", "run", "train.jsonl", "--output", "new.xlsx"),
        ("new.xlsx", ".parquet"),
    ),
    "prediction to a folder that is not there": (
        ("predict", "run", "train.jsonl", "--output", "gone/new.csv"),
        ("no folder gone",),
    ),
    "an export to what exists": (("export", "run", "encoder"), ("encoder exists",)),
    "draws to what exists": (
        ("export", "run", "train.jsonl", "--to", "arviz"),
        ("train.jsonl exists",),
    ),
    "an export of another kind": (("export", "run", "new", "--to", "onnx"), ("onnx",)),
    "no draws to export": (
        ("export", "run", "new.nc", "--to", "arviz", "--num-samples", "0"),
        ("num_samples", "0"),
    ),
    "a demo into a file": (("demo", "--output-dir", "train.jsonl"), ("is a file",)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_mistakes_are_one_line_and_change_no_file(case: str, place: Path) -> None:
    if case == "prediction of missing texts":
        datasets.Dataset.from_dict({"text": ["good", None]}).to_parquet("missing.parquet")
    arguments, words = OTHERS[case]
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    folders = {path for path in place.rglob("*") if path.is_dir()}
    result = pyrolora_(*arguments)
    refused(result, *words)
    assert result.out == ""
    after = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
    assert after == before
    assert {path for path in place.rglob("*") if path.is_dir()} == folders


def test_a_damaged_posterior(place: Path, tmp_path: Path) -> None:
    shutil.copytree("run", tmp_path / "run")
    file = next((tmp_path / "run").glob("adapters-*"))
    file.write_bytes(file.read_bytes()[:100])
    refused(pyrolora_("predict", tmp_path / "run", "train.jsonl"), file.name, "SHA-256")


def test_a_disk_that_cannot_be_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyrolora.cli.runs.Run.start", full)
    out = tmp_path / "run"
    refused(pyrolora_("fit", *TRAIN, "--output-dir", out), "No space left", code=1)


def test_an_interrupt_outside_of_a_fit(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pyrolora.cli.posteriors.load", interrupted)
    refused(pyrolora_("evaluate", "run", "train.jsonl"), "interrupted", code=130)


def test_an_error_of_the_library_itself_shows_where_if_that_is_asked_for(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no user can mend is one line too, and a traceback for a bug report."""

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(sys.modules["pyrolora.cli.fit"], "fingerprint", broken)
    command = ["fit", *TRAIN, "--output-dir", tmp_path / "run"]
    refused(pyrolora_(*command), "RuntimeError: a bug", "PYROLORA_DEBUG=1", code=1)
    monkeypatch.setenv("PYROLORA_DEBUG", "1")
    with pytest.raises(RuntimeError, match="a bug"):
        pyrolora_(*command)


def test_a_fit_that_fails_leaves_no_folder(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the reason, before the first checkpoint."""

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("pyrolora.inference.SVITrainer.training_step", broken)
    out = tmp_path / "run"
    refused(pyrolora_("fit", *TRAIN, "--output-dir", out), "a bug", code=1)
    assert not out.exists()


@pytest.mark.filterwarnings("ignore:Encountered (NaN|[+-]?inf):UserWarning")
@pytest.mark.parametrize("guide", ["map", "montec"])
def test_a_fit_that_is_not_finite_keeps_its_last_good_state(
    guide: str, place: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = pyrolora_(
        *("fit", "train.jsonl", "--model", "encoder", "--output-dir", out, "--guide", guide),
        *("--learning-rate", "1e30", "--batch-size", "2", "--epochs", "3"),
        *("--set", "training.max_grad_norm=1e30"),
    )
    refused(result, "training stopped before step", str(out / "last_good"), code=3)
    assert result.out == ""
    posterior = pyrolora.load(out / "last_good")
    assert all(torch.isfinite(tensor).all() for tensor in posterior.model.own_state().values())
    done("evaluate", out / "last_good", "train.jsonl", "--num-samples", 0)
    refused(pyrolora_("evaluate", out, "train.jsonl"), "not finite", str(out / "last_good"))


# What others wrote, and secrets ---------------------------------------------------------------


def test_a_run_keeps_no_token_and_its_command_goes_on_matching(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ("fit", *TRAIN, "--output-dir", out, "--set")
    done(*command, "training.hub_token=hf_mine")
    assert not any(b"hf_mine" in file.read_bytes() for file in out.rglob("*") if file.is_file())
    assert json.loads((out / "run.json").read_text())["options"]["training"] == {
        "hub_token": "<hidden>"
    }
    again = pyrolora_(*command, "training.hub_token=hf_mine")
    assert "finished" in again.err


def test_an_error_has_no_effect_on_the_terminal(place: Path) -> None:
    result = pyrolora_("evaluate", "run", "train.jsonl", "--text", "\x1b[31m\u202ebody")
    refused(result, r"\x1b[31m\u202ebody")
    assert "\x1b" not in result.err


def test_a_record_that_was_planted(place: Path, tmp_path: Path) -> None:
    shutil.copytree("run", tmp_path / "run")
    for record in ({"options": []}, {"options": {"columns": {"text": [1]}}}, {"result": 3}):
        (tmp_path / "run" / "run.json").write_text(json.dumps(record))
        refused(pyrolora_("evaluate", tmp_path / "run", "train.jsonl"), "no record of a run")
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "run" / "run.json").symlink_to("/dev/zero")
    refused(pyrolora_("evaluate", tmp_path / "run", "train.jsonl"), "device")


def test_an_export_writes_through_no_link(place: Path, tmp_path: Path) -> None:
    (tmp_path / "posterior.nc").symlink_to(tmp_path / "victim")
    refused(pyrolora_("export", "run", tmp_path / "posterior.nc", "--to", "arviz"), "exists")
    assert not (tmp_path / "victim").exists()
