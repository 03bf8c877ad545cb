"""``pyrolora compare`` and ``evaluate --outside``: what they print is what Python gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from console import done, pyrolora_, refused, saved
from problems import bert, reviews

import pyrolora

FIT = ("--epochs", 2, "--batch-size", 8, "--learning-rate", 0.01, "--seed", 3)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    saved(bert(initializer_range=0.3).bert, place / "encoder")
    for name, rows in (("train", reviews(24)), ("test", reviews(10, seed=1))):
        rows.to_json(place / f"{name}.jsonl")
    reviews(7, seed=2).remove_columns("label").to_json(place / "other.jsonl")
    for guide in ("map", "montec"):
        done("fit", place / "train.jsonl", "--model", place / "encoder", "--guide", guide,
             "--output-dir", place / guide, *FIT)  # fmt: skip
    return place


def test_compare_gives_the_table_of_python(place: Path) -> None:
    command = ["compare", place / "test.jsonl", place / "map", place / "montec",
               "--outside", place / "other.jsonl", "--num-samples", 3, "--seed", 7]  # fmt: skip
    posteriors = {name: pyrolora.load(place / name) for name in ("map", "montec")}
    other = reviews(7, seed=2).remove_columns("label")
    table = pyrolora.compare(posteriors, reviews(10, seed=1), 3, outside=other, seed=7)
    found = done(*command, "--json").json["posteriors"]
    assert list(found) == ["map", "montec"]
    for name, row in found.items():
        assert row == pytest.approx(table.loc[name].to_dict())
    assert "ood_auroc" in found["map"]
    shown = done(*command).out
    assert "montec" in shown
    assert f"{table.loc['montec', 'nll']:.3f}" in shown


def test_evaluate_scores_other_data_too(place: Path) -> None:
    command = ["evaluate", place / "montec", place / "test.jsonl", "--num-samples", 3]
    assert "ood_auroc" not in done(*command, "--json").json
    found = done(*command, "--outside", place / "other.jsonl", "--seed", 7, "--json").json
    other = reviews(7, seed=2).remove_columns("label")
    expected = pyrolora.load(place / "montec").evaluate(
        reviews(10, seed=1), 3, outside=other, seed=7
    )
    assert found["ood_auroc"] == pytest.approx(expected["ood_auroc"])


def test_runs_of_one_name_are_told_apart_by_their_paths(place: Path, tmp_path: Path) -> None:
    (tmp_path / "map").symlink_to(place / "map")
    command = ["compare", place / "test.jsonl", place / "map", tmp_path / "map", "--json"]
    names = list(done(*command, "--num-samples", 0).json["posteriors"])
    assert names in ([str(place / "map"), str(tmp_path / "map")], ["map"])
    refused(pyrolora_("compare", place / "test.jsonl", place / "map", place / "map"), "named twice")
    refused(pyrolora_("compare", place / "test.jsonl", place / "none"), "there is no folder")
