"""Every task from the command line: a model's folder and a file of rows are all that is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from console import done, pyrolora_, refused
from problems import (
    bert,
    bert_mlm,
    chat_tokenizer,
    letter_tokenizer,
    llama,
    mask_tokenizer,
    questions,
    reviews,
    squad,
    summaries,
    t5,
    tagged,
    tokenizer,
    writer_tokenizer,
)

import pyrolora

REVIEWS = list(reviews(12))


def encoder() -> Any:
    return bert(initializer_range=0.3).bert


@dataclass(frozen=True)
class Case:
    """A network and rows that are one task; the columns of its table; what a metric is called."""

    task: str
    network: Callable[[], Any]
    words: Callable[[], Any]
    rows: list[dict[str, Any]]
    columns: set[str]
    metric: str
    more: tuple[str, ...] = ()


def chat(row: dict[str, Any]) -> dict[str, Any]:
    turns = (("user", "is it good"), ("assistant", row["text"]))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def labels(row: dict[str, Any]) -> list[str]:
    return [word for word in ("good", "a") if word in row["text"].split()]


TEXT_TABLE = {"num_tokens", "nll", "entropy", "aleatoric", "epistemic"}
TEXTS = ("--set", "texts.max_length=64")
CASES = {
    "several labels": Case(
        "multi-label-classification",
        encoder,
        tokenizer,
        [{"text": row["text"], "labels": labels(row)} for row in REVIEWS],
        {"prob_good", "prob_a", "predicted", "epistemic"},
        "micro_f1",
    ),
    "tags": Case(
        "token-classification",
        encoder,
        tokenizer,
        list(tagged(12)),
        {"example", "position", "prob_0", "predicted", "epistemic"},
        "accuracy",
    ),
    "hidden words": Case(
        "fill-mask",
        bert_mlm,
        mask_tokenizer,
        [{"text": row["text"]} for row in REVIEWS],
        TEXT_TABLE,
        "perplexity",
    ),
    "summaries": Case(
        "text2text-generation", t5, writer_tokenizer, list(summaries(12)), TEXT_TABLE, "perplexity"
    ),
    "chats": Case(
        "text-generation",
        lambda: llama(vocab_size=300, max_position_embeddings=128),
        chat_tokenizer,
        [chat(row) for row in REVIEWS],
        TEXT_TABLE,
        "perplexity",
        TEXTS,
    ),
    "completions": Case(
        "text-generation",
        lambda: llama(vocab_size=300, max_position_embeddings=128),
        chat_tokenizer,
        [{"prompt": "it is", "completion": f" {row['text']}"} for row in REVIEWS],
        TEXT_TABLE,
        "perplexity",
        TEXTS,
    ),
    "letters": Case(
        "letter-choice",
        lambda: llama(vocab_size=64),
        letter_tokenizer,
        list(questions(12)),
        {"prob_0", "predicted", "epistemic"},
        "accuracy",
        ("--choices", "letters"),
    ),
    "answers": Case(
        "question-answering",
        encoder,
        tokenizer,
        list(squad(8)),
        {"predicted", "probability", "start", "end", "epistemic"},
        "f1",
    ),
    "preferences": Case(
        "reward-modelling",
        encoder,
        tokenizer,
        [{"chosen": f"good {row['text']}", "rejected": row["text"]} for row in REVIEWS],
        {"prob_chosen", "reward_chosen", "reward_chosen_sd", "epistemic"},
        "accuracy",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_folder_and_a_file_are_enough(case: str, tmp_path: Path) -> None:
    one = CASES[case]
    one.network().save_pretrained(tmp_path / "model")
    one.words().save_pretrained(tmp_path / "model")
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in one.rows), encoding="utf-8")
    done("fit", data, "--model", tmp_path / "model", "--output-dir", run, "--epochs", 1,
         "--set", "adapter.r=1", "--eval-data", data, *one.more)  # fmt: skip
    posterior = pyrolora.load(run)
    assert posterior.task.name == one.task
    if posterior.task.as_text() is None:
        refused(pyrolora_("generate", run, data), "which writes no text")
    scores = done("evaluate", run, data, "--draws", "0,1", "--json").json
    expected = posterior.evaluate(one.rows, draws=[0, 1])[one.metric]
    assert scores[one.metric] == pytest.approx(expected, rel=1e-4)
    out = done("predict", run, data, "--draws", "0,1", "--json").out
    table = [json.loads(line) for line in out.splitlines()]
    assert one.columns | {*one.rows[0]} - {"labels", "label"} <= {*table[0]}
    assert len(table) >= len(one.rows)
    found = posterior.predict(one.rows, draws=[0, 1]).to_pandas()["epistemic"].tolist()
    assert [row["epistemic"] for row in table] == pytest.approx(found, abs=1e-4)
