"""``pyrolora calibrate``: the temperature goes into the run's folder."""

from __future__ import annotations

import pytest
from console import done, saved
from problems import bert, reviews

import pyrolora


def test_the_temperature_is_that_of_python_and_is_kept(tmp_path):
    saved(bert(initializer_range=0.3).bert, tmp_path / "encoder")
    for name, seed in (("train", 0), ("held_out", 1)):
        reviews(16, seed=seed).to_json(tmp_path / f"{name}.jsonl")
    done("fit", tmp_path / "train.jsonl", "--model", tmp_path / "encoder", "--epochs", 6,
         "--output-dir", tmp_path / "run", "--seed", 3, "--learning-rate", 0.02,
         "--batch-size", 4)  # fmt: skip
    command = ["calibrate", tmp_path / "run", tmp_path / "held_out.jsonl", "--num-samples", 3]
    found = done(*command, "--seed", 7, "--json").json
    loaded = pyrolora.load(tmp_path / "run")
    assert loaded.temperature == found["temperature"]
    expected = loaded.calibrate(reviews(16, seed=1), 3, seed=7)
    assert found["temperature"] == pytest.approx(expected.temperature)
    assert found["nll_before"] == pytest.approx(expected.nll_before)
    shown = done(*command)
    assert "Temperature" in shown.out
    assert "trained on these data" not in shown.err
    seen = done("calibrate", tmp_path / "run", tmp_path / "train.jsonl", "--num-samples", 3)
    assert "the fit was trained on these data" in seen.err
    assert (tmp_path / "run" / "run.json").exists()
