"""``pyrolora report``: the page that Python writes, from files, and what is wrong as one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from console import done, pyrolora_, refused, saved
from problems import bert, reviews

import pyrolora
from pyrolora.report import Report, report_on

FIT = ("--epochs", 2, "--batch-size", 8, "--learning-rate", 0.01, "--seed", 3)
OPTIONS = ("--num-samples", 4, "--seed", 7)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, a fit, and a fit to data with columns of other names."""
    place = tmp_path_factory.mktemp("place")
    saved(bert(initializer_range=0.3).bert, place / "encoder")
    reviews(24).to_json(place / "train.jsonl")
    reviews(10, seed=1).to_json(place / "test.jsonl")
    reviews(6, seed=2).remove_columns("label").to_json(place / "outside.jsonl")
    renamed = reviews(24).rename_columns({"text": "body", "label": "mood"})
    renamed.add_column("id", [f"row {i}" for i in range(24)]).to_csv(place / "renamed.csv")
    model = ("--model", place / "encoder", *FIT)
    done("fit", place / "train.jsonl", "--output-dir", place / "run", *model)
    columns = ("--text", "body", "--label", "mood")
    done("fit", place / "renamed.csv", "--output-dir", place / "other", *columns, *model)
    return place


@pytest.fixture(scope="module")
def expected(place: Path) -> Report:
    """What Python makes of the same."""
    data, outside = reviews(10, seed=1), reviews(6, seed=2).remove_columns("label")
    posterior = pyrolora.load(place / "run")
    return report_on(posterior, data, outside=outside, num_samples=4, seed=7)


def test_the_page_is_that_of_python(place: Path, tmp_path: Path, expected: Report) -> None:
    file = tmp_path / "page.html"
    command = ("report", place / "run", place / "test.jsonl", "--output", file, *OPTIONS)
    result = done(*command, "--outside", place / "outside.jsonl", "--json")
    assert file.read_text(encoding="utf-8") == expected.html
    assert result.json["run"] == str(place / "run")
    assert result.json["path"] == str(file)
    assert [one["name"] for one in result.json["warnings"]] == [f.name for f in expected.findings]
    assert "few_examples" in {one["name"] for one in result.json["warnings"]}


def test_without_labels_and_without_a_name(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page is ``report.html`` here; warnings are printed, a line each."""
    monkeypatch.chdir(tmp_path)
    result = done("report", place / "run", place / "outside.jsonl", *OPTIONS)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "none, hence no metrics" in page
    assert "the report is in report.html" in result.err
    lines = result.out.splitlines()
    assert any(line.startswith("There are few examples. With 6 examples") for line in lines)


def test_columns_are_those_of_the_fit(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    done("report", place / "other", place / "renamed.csv", "--output", file, *OPTIONS)
    page = file.read_text(encoding="utf-8")
    assert "Confident errors" in page
    assert reviews(24)["text"][0] in page
    unlabelled = reviews(5).rename_column("text", "body").remove_columns("label")
    unlabelled.to_json(tmp_path / "new.jsonl")
    done("report", place / "other", tmp_path / "new.jsonl", "--output", file, *OPTIONS)
    assert "Confident errors" not in file.read_text(encoding="utf-8")


def test_columns_can_be_given(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    columns = ("--text", "body", "--label", "mood")
    done("report", place / "run", place / "renamed.csv", "--output", file, *columns, *OPTIONS)
    assert "Confident errors" in file.read_text(encoding="utf-8")
    wrong = pyrolora_("report", place / "run", place / "test.jsonl", "--label", "mood")
    refused(wrong, "no column 'mood'")


def test_a_place_that_cannot_be_written_is_refused(place: Path, tmp_path: Path) -> None:
    command = ("report", place / "run", place / "test.jsonl", "--output")
    refused(pyrolora_(*command, tmp_path), "is a folder", "report.html")
    refused(pyrolora_(*command, tmp_path / "missing" / "page.html"), "there is no folder")
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_fit_is_refused(place: Path, tmp_path: Path) -> None:
    command = ("report", tmp_path / "none", place / "test.jsonl", "--output", tmp_path / "x.html")
    refused(pyrolora_(*command), "there is no folder", "pass the folder of a fit")


def test_the_help_teaches() -> None:
    text = done("report", "--help").out
    for words in ("pyrolora report run test.jsonl", "--outside", "no network"):
        assert words in text
    assert "report" in done("--help").out
