"""``pyrolora acquire``: the lines are the examples that Python chooses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from console import done, pyrolora_, refused, saved
from problems import bert, reviews

import pyrolora


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    saved(bert(initializer_range=0.3).bert, place / "encoder")
    reviews(24).to_json(place / "train.jsonl")
    reviews(12, seed=1).to_json(place / "pool.jsonl")
    done("fit", place / "train.jsonl", "--model", place / "encoder", "--output-dir", place / "run",
         "--epochs", 1, "--seed", 3)  # fmt: skip
    return place


@pytest.mark.parametrize("by", ["epistemic", "batchbald"])
def test_the_lines_are_the_examples_of_python(place: Path, tmp_path: Path, by: str) -> None:
    command = ["acquire", place / "run", place / "pool.jsonl", "--count", 3, "--by", by,
               "--num-samples", 8, "--seed", 7]  # fmt: skip
    rows = [json.loads(line) for line in done(*command).out.splitlines()]
    pool = reviews(12, seed=1)
    expected = pyrolora.load(place / "run").acquire(pool, 3, by, 8, seed=7)
    assert [row["row"] for row in rows] == expected
    assert [row["text"] for row in rows] == [pool[i]["text"] for i in expected]
    assert done(*command, "--output", tmp_path / "out.jsonl").out == ""
    assert len((tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()) == 3


def test_what_cannot_be_acquired_is_refused(place: Path, tmp_path: Path) -> None:
    command = ["acquire", place / "run", place / "pool.jsonl"]
    refused(pyrolora_(*command, "-k", 13), "the pool has 12 examples")
    refused(pyrolora_(*command, "-k", 3, "--by", "bald"), "by must be one of")
    refused(pyrolora_(*command, "-k", 3, "--output", tmp_path / "x.csv"), "name it .jsonl")
