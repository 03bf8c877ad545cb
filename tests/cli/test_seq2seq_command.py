"""Texts that a decoder writes, from a JSONL file, in the command line."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from console import done, pyrolora_, refused
from problems import summaries, t5, writer_tokenizer

import pyrolora


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pairs")
    t5().save_pretrained(place / "base")
    writer_tokenizer().save_pretrained(place / "base")
    summaries().to_json(place / "train.jsonl")
    done("fit", place / "train.jsonl", "--model", place / "base", "--output-dir", place / "run",
         "--epochs", 1)  # fmt: skip
    return place


def test_a_run_predicts_evaluates_and_writes(place: Path) -> None:
    run, data = place / "run", place / "train.jsonl"
    posterior = pyrolora.load(run)
    assert posterior.task.name == "text2text-generation"
    lines = done("predict", run, data, "--draws", "0,1", "--json").out.splitlines()
    rows = [json.loads(line) for line in lines]
    expected = posterior.predict(summaries(), draws=[0, 1]).to_pandas()
    assert [row["summary"] for row in rows] == summaries()["summary"][:]
    assert [row["nll"] for row in rows] == pytest.approx(expected["nll"].tolist(), rel=1e-4)
    found = done("evaluate", run, data, "--draws", "0,1", "--json").json
    assert found["perplexity"] == pytest.approx(
        posterior.evaluate(summaries(), draws=[0, 1])["perplexity"], rel=1e-4
    )
    options = ("--draws", "1,0", "--max-new-tokens", 3, "--num-beams", 2)
    written = [json.loads(line) for line in done("generate", run, data, *options).out.splitlines()]
    made = posterior.generate(
        summaries()["document"][:], draws=[1, 0], max_new_tokens=3, num_beams=2
    )
    assert [[c["text"] for c in row["continuations"]] for row in written] == made.texts


def test_the_direction_of_a_translation_is_text_and_label(place: Path, tmp_path: Path) -> None:
    rows = [{"en": row["document"], "de": row["summary"]} for row in summaries(6)]
    datasets.Dataset.from_list([{"translation": row} for row in rows]).to_json(tmp_path / "t.jsonl")
    data, run = tmp_path / "t.jsonl", tmp_path / "run"
    fit = ("fit", data, "--model", place / "base", "--output-dir", run, "--task", "translation",
           "--epochs", 1, "--set", "adapter.r=2")  # fmt: skip
    refused(pyrolora_(*fit), "no direction", "--text translation.en --label translation.de")
    done(*fit, "--text", "translation.en", "--label", "translation.de")
    posterior = pyrolora.load(run)
    lines = done("predict", run, data, "--draws", "0", "--json").out.splitlines()
    pairs = ([row["en"] for row in rows], [row["de"] for row in rows])
    expected = posterior.predict(pairs, draws=[0]).to_pandas()["nll"].tolist()
    assert [json.loads(line)["nll"] for line in lines] == pytest.approx(expected, rel=1e-4)
    written = done("generate", run, data, "--draws", "0", "--max-new-tokens", 2).out.splitlines()
    made = posterior.generate(pairs[0], draws=[0], max_new_tokens=2)
    assert [json.loads(line)["continuations"][0]["text"] for line in written] == [
        texts[0] for texts in made.texts or []
    ]
