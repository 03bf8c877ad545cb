"""Posteriors of every task in one directory: each is answered as its task, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from problems import bert, questions, reviews, tagged, tokenizer
from servers import Live, Shop, get, post, running, served
from test_serving_page import driven, with_driver
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.serving.app import create_app
from pyrolora.serving.entities import words_of
from pyrolora.serving.errors import UnsupportedError
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


def test_a_regression_is_answered_with_its_mean_and_spreads(live: Live) -> None:
    body = {"inputs": [TEXT, "bad"], "parameters": {"adapter_id": "regression", "draws": [0, 3]}}
    rows = post(f"{live.url}/classify_batch", json=body).json()
    alone = live.alone("regression").predict([TEXT, "bad"], draws=[0, 3])
    low, high = alone.interval(0.9)
    for i, (row,) in enumerate(rows):
        assert (row["entity"], row["word"]) == ("value", [TEXT, "bad"][i])
        assert row["score"] == pytest.approx(float(alone.mean[i]), rel=1e-4)
        about = row["uncertainty"]
        for name in ("std", "aleatoric", "epistemic", "entropy"):
            assert about[name] == pytest.approx(float(getattr(alone, name)[i]), rel=1e-3, abs=1e-5)
        assert about["low"] == pytest.approx(float(low[i]), rel=1e-3)
        assert about["high"] == pytest.approx(float(high[i]), rel=1e-3)
        assert about["agreement"] is None


def test_every_word_is_answered_with_its_tag(live: Live) -> None:
    """The known answer is that of `predict` for the words of the text, whose first tokens count."""
    name, text = "token-classification", "the  film was good"
    body = {"inputs": [text, "bad"], "parameters": {"adapter_id": name, "draws": [0, 3]}}
    rows, (short,) = post(f"{live.url}/classify_batch", json=body).json()
    posterior = live.alone(name)
    alone = posterior.predict([{"tokens": text.split()}], draws=[0, 3])
    assert [row["word"] for row in rows] == text.split()
    assert [text[row["start"] : row["end"]] for row in rows] == text.split()
    assert [row["index"] for row in rows] == alone.position.tolist()
    names = alone.classes or ["0", "1", "2"]
    assert [row["entity"] for row in rows] == [names[k] for k in alone.predicted.tolist()]
    low, high = alone.interval(0.9)
    for i, row in enumerate(rows):
        k, about = int(alone.predicted[i]), row["uncertainty"]
        assert row["score"] == pytest.approx(float(alone.probs[i, k]), rel=1e-4)
        assert about["entropy"] == pytest.approx(float(alone.entropy[i]), rel=1e-4)
        assert about["epistemic"] == pytest.approx(float(alone.epistemic[i]), rel=1e-2, abs=1e-5)
        assert (about["low"], about["high"]) == pytest.approx(
            (float(low[i, k]), float(high[i, k])), rel=1e-4
        )
    assert (short["word"], short["index"]) == ("bad", 1)


@pytest.mark.parametrize("name", ["token-classification", "regression"])
def test_the_page_shows_tags_and_numbers(live: Live, name: str, tmp_path: Path) -> None:
    app = with_driver(create_app(served(live.shop)), name, TEXT)
    with running(app) as url:
        body = {"inputs": TEXT, "parameters": {"adapter_id": name, "seed": 3}}
        rows = post(f"{url}/classify", json=body).json()
        found, console = driven(f"{url}/driver", tmp_path)
    assert (found["error"], console, found["sideways"]) == ("", [], [])
    assert f"{rows[0]['uncertainty']['num_samples']} draws of the seed 3" in found["answer"]
    for row in rows:
        about = row["uncertainty"]
        if name == "regression":
            assert f"{row['score']:.3f} ({about['low']:.3f} to" in found["answer"]
            assert f"between draws {about['epistemic']:.3f}" in found["answer"]
        else:
            assert f"{row['word']}: {row['entity']} {100 * row['score']:.1f} %" in found["answer"]


def test_words_of_several_tokens_have_the_tag_of_their_first() -> None:
    letters = Tokenizer(models.BPE({c: i for i, c in enumerate("abc.")}, []))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=letters)
    assert words_of(words, " ab c.") == [(0, (1, 3)), (2, (4, 5)), (3, (5, 6))]
    with pytest.raises(UnsupportedError, match="does not say where"):
        words_of(object(), "a")


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
    if name in ("multi-label-classification", "token-classification", "regression"):
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
    assert (serves.pop("token-classification"), serves.pop("regression")) == ("tags", "value")
    assert serves == dict.fromkeys(("classification", "multi-label-classification"), "classes")
