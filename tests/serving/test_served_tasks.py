"""Posteriors of every task in one directory: each is answered as its task, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from problems import bert, questions, reviews, tagged, tokenizer
from servers import Live, Shop, get, post, running, served
from transformers import T5Config, T5ForConditionalGeneration

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.serving.app import create_app
from pyrolora.tasks.registry import kinds

TEXT = "the film was good"
REVIEWS = reviews(12)
LABELS = [["good"] * ("good" in t) + ["a"] * ("a" in t.split()) for t in REVIEWS["text"]]
NUMBERS = [float(label) for label in REVIEWS["label"]]
DATA: dict[str, Any] = {
    "multi-label-classification": REVIEWS.remove_columns("label").add_column("labels", LABELS),
    "regression": REVIEWS.remove_columns("label").add_column("label", NUMBERS),
    "token-classification": tagged(12),
    "multiple-choice": questions(12),
    "reward-modelling": REVIEWS.rename_columns({"text": "chosen"})
    .remove_columns("label")
    .add_column("rejected", REVIEWS["text"][::-1]),
}


def fitted(network: Any, data: Any, words: Any = None) -> pyrolora.Posterior:
    return pyrolora.fit(
        network, data, "meanfield", tokenizer=words, adapter=AdapterConfig(r=1), epochs=1, seed=0,
        learning_rate=0.05,
    )  # fmt: skip


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("tasks")
    bert(initializer_range=0.3).bert.save_pretrained(root / "encoder")
    tokenizer().save_pretrained(root / "encoder")
    for name, data in DATA.items():
        posterior = fitted(str(root / "encoder"), data)
        assert posterior.task.name == name
        posterior.save(root / "posteriors" / name)
    shop = Shop(root / "posteriors", root / "encoder")
    with running(create_app(served(shop))) as url:
        yield Live(url, shop, served(shop))


def test_several_labels_are_answered_with_a_probability_each(live: Live) -> None:
    name = "multi-label-classification"
    body = {"inputs": TEXT, "parameters": {"adapter_id": name, "draws": [0, 3]}}
    rows = post(f"{live.url}/classify", json=body).json()
    alone = live.alone(name).predict([TEXT], draws=[0, 3])
    found = {row["entity"]: row["score"] for row in rows}
    expected = dict(zip(alone.classes, alone.probs[0].tolist(), strict=True))
    assert found == pytest.approx(expected, rel=1e-4)
    about = rows[0]["uncertainty"]
    assert about["entropy"] == pytest.approx(float(alone.entropy[0]), rel=1e-4)
    votes = (alone.draws[:, 0] > 0.5) == (alone.probs[0] > 0.5)
    assert about["agreement"] == pytest.approx(float(votes.all(-1).float().mean()))


@pytest.mark.parametrize("name", DATA)
def test_what_is_not_served_is_refused_by_its_task(live: Live, name: str) -> None:
    parameters = {"adapter_id": name}
    asked = {
        "/generate": {"inputs": TEXT, "parameters": parameters},
        "/generate_stream": {"inputs": TEXT, "parameters": parameters},
        "/v1/completions": {"model": name, "prompt": TEXT},
        "/v1/chat/completions": {"model": name, "messages": [{"role": "user", "content": TEXT}]},
        "/classify": {"inputs": TEXT, "parameters": parameters},
        "/classify_batch": {"inputs": [TEXT], "parameters": parameters},
    }
    if name == "multi-label-classification":
        asked = {path: body for path, body in asked.items() if "classify" not in path}
    for path, body in asked.items():
        answer = post(f"{live.url}{path}", json=body)
        assert answer.status_code == 422, (path, answer.text)
        assert f"of the task '{name}'" in answer.text
    model = get(f"{live.url}/v1/models/{name}").json()
    assert (model["task"], model["writes"]) == (name, False)


def test_networks_that_read_or_write_otherwise_are_refused(tmp_path: Any) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 3}
    T5ForConditionalGeneration(T5Config(vocab_size=32, **sizes, **ids)).save_pretrained(
        tmp_path / "t5"
    )
    tokenizer().save_pretrained(tmp_path / "t5")
    pairs = [{"source": text, "target": "good"} for text in REVIEWS["text"]]
    fitted(str(tmp_path / "t5"), pairs).save(tmp_path / "posteriors" / "pairs")
    with running(create_app(served(Shop(tmp_path / "posteriors", tmp_path / "t5")))) as url:
        for path, body in (
            ("/generate", {"inputs": TEXT}),
            ("/classify", {"inputs": TEXT}),
            ("/v1/completions", {"model": "pairs", "prompt": TEXT}),
        ):
            answer = post(f"{url}{path}", json=body)
            assert answer.status_code == 422
            assert "text2text-generation" in answer.text


def test_only_what_one_text_is_enough_for_is_served() -> None:
    serves = {kind.name: kind.serves for kind in kinds() if kind.serves}
    assert serves.pop("text-generation") == "text"
    assert serves == dict.fromkeys(("classification", "multi-label-classification"), "classes")
