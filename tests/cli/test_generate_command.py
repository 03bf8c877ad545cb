"""``pyrolora generate``: prompts in, JSON lines out, as Python gives them; and choices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from console import done, pyrolora_, refused, saved
from problems import bert, llama, reviews

import pyrolora
from pyrolora.predictive import Entailment

PROMPTS = ["the film", "good", "the book is not"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    saved(llama(initializer_range=0.4), place / "decoder")
    reviews(24).remove_columns("label").to_json(place / "train.jsonl")
    (place / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    done("fit", place / "train.jsonl", "--model", place / "decoder", "--output-dir", place / "run",
         "--epochs", 1, "--seed", 3, "--set", "guide.init_covariance=1.0")  # fmt: skip
    return place


def generated(place: Path, *more: object) -> list[dict]:
    out = done("generate", place / "run", place / "prompts.txt", "--seed", 7, *more).out
    return [json.loads(line) for line in out.splitlines()]


def test_every_line_has_its_prompt_and_the_continuations_of_python(place: Path) -> None:
    rows = generated(place, "--num-samples", 3, "--max-new-tokens", 5, "--num-beams", 2,
                     "--num-return-sequences", 2)  # fmt: skip
    found = pyrolora.load(place / "run").generate(
        PROMPTS, 3, seed=7, max_new_tokens=5, num_beams=2, num_return_sequences=2
    )
    table = found.to_pandas()
    assert [row["text"] for row in rows] == PROMPTS
    for i, row in enumerate(rows):
        own = table[table["prompt"] == i]
        assert [c["text"] for c in row["continuations"]] == own["text"].tolist()
        assert [c["draw"] for c in row["continuations"]] == [0, 0, 1, 1, 2, 2]
        nll = [c["nll"] for c in row["continuations"]]
        assert nll == pytest.approx(own["nll"].tolist(), rel=1e-4)
        assert row["agreement"] == pytest.approx(float(found.agreement[i]))
        assert "tokens" not in row["continuations"][0]


def test_sampled_tokens_come_with_their_uncertainty(place: Path, tmp_path: Path) -> None:
    options = ("--num-samples", 2, "--max-new-tokens", 4, "--do-sample", "--temperature", 0.7,
               "--top-p", 0.9, "--tokens")  # fmt: skip
    out = done("generate", place / "run", place / "prompts.txt", "--seed", 7, *options,
               "--output", tmp_path / "out.jsonl").out  # fmt: skip
    assert out == ""
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows == generated(place, *options)
    found = pyrolora.load(place / "run").generate(
        PROMPTS, 2, seed=7, max_new_tokens=4, do_sample=True, temperature=0.7, top_p=0.9
    )
    tokens = rows[2]["continuations"][1]["tokens"]
    assert [t["token"] for t in tokens] == found.tokens[2][1]
    own = found.epistemic[2, 1][found.mask[2, 1]].tolist()
    assert [t["epistemic"] for t in tokens] == pytest.approx(own, rel=1e-3, abs=1e-6)


def test_meanings_and_scores_of_answers_are_those_of_python(place: Path, tmp_path: Path) -> None:
    judge = bert(3)
    judge.config.id2label = {0: "contradiction", 1: "neutral", 2: "entailment"}
    saved(judge, tmp_path / "nli")
    data = [{"text": text, "gold": ["good", "the film"]} for text in PROMPTS]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, data)), encoding="utf-8")
    command = ["generate", place / "run", tmp_path / "asked.jsonl", "--draws", "0,1,2",
               "--seed", 7, "--max-new-tokens", 1, "--entailment", tmp_path / "nli",
               "--correct", "gold"]  # fmt: skip
    refused(pyrolora_(*command), "add --output")
    shown = done(*command, "--output", tmp_path / "out.jsonl").out
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    posterior = pyrolora.load(place / "run")
    found = posterior.generate(PROMPTS, draws=[0, 1, 2], seed=7, max_new_tokens=1)
    semantic = found.semantic_entropy(Entailment(str(tmp_path / "nli")))
    for i, row in enumerate(map(json.loads, lines)):
        assert row["semantic_entropy"] == pytest.approx(float(semantic.entropy[i]), abs=1e-6)
        parts = row["semantic_aleatoric"] + row["semantic_epistemic"]
        assert parts == pytest.approx(row["semantic_entropy"], abs=1e-6)
        assert [c["meaning"] for c in row["continuations"]] == semantic.clusters[i].tolist()
    scores = posterior.evaluate_generation(
        data, "gold", draws=[0, 1, 2], max_new_tokens=1, seed=7,
        same=Entailment(str(tmp_path / "nli")),
    )  # fmt: skip
    assert f"{scores.accuracy:.3f} ±" in shown
    assert "semantic" in shown
    refused(
        pyrolora_(*command[:-1], "none", "--output", tmp_path / "x.jsonl"), "'none' is no column"
    )


def test_one_draw_agrees_with_nobody(place: Path) -> None:
    assert [row["agreement"] for row in generated(place, "--num-samples", 0)] == [None] * 3


def test_evaluate_scores_choices(place: Path) -> None:
    rows = [
        {"question": "the film is", "choices": ["good", "not bad"], "label": 1},
        {"question": "the book", "choices": ["is dull", "good", "bad"], "label": 0},
    ]
    (place / "choices.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    expected = pyrolora.load(place / "run").evaluate(rows, 3, seed=7)
    for more in ((), ("--text", "question")):
        found = done("evaluate", place / "run", place / "choices.jsonl", "--num-samples", 3,
                     "--seed", 7, "--json", *more).json  # fmt: skip
        for name in ("nll", "brier", "accuracy"):
            assert found[name] == pytest.approx(expected[name])


def test_what_cannot_be_generated_is_refused(place: Path, tmp_path: Path) -> None:
    command = ["generate", place / "run", place / "prompts.txt"]
    refused(pyrolora_(*command, "--temperature", 0.5), "add --do-sample")
    refused(pyrolora_(*command, "--output", tmp_path / "out.csv"), "name it .jsonl")
    refused(pyrolora_(*command, "--output", tmp_path / "no" / "out.jsonl"), "there is no folder")
    (tmp_path / "bad.jsonl").write_text('{"text": "the film"}\n{"text": ""}\n', encoding="utf-8")
    refused(pyrolora_("generate", place / "run", tmp_path / "bad.jsonl"), "empty prompts")
    (tmp_path / "clash.jsonl").write_text('{"text": "the film", "agreement": 1}', encoding="utf-8")
    refused(pyrolora_("generate", place / "run", tmp_path / "clash.jsonl"), "['agreement']")


def test_continuations_are_of_the_draws_of_these_numbers(place: Path) -> None:
    rows = generated(place, "--draws", "4,1", "--max-new-tokens", 3)
    found = pyrolora.load(place / "run").generate(PROMPTS, draws=[4, 1], seed=7, max_new_tokens=3)
    texts = [[c["text"] for c in row["continuations"]] for row in rows]
    assert texts == found.texts
    assert [[c["draw"] for c in row["continuations"]] for row in rows] == [[4, 1]] * 3
