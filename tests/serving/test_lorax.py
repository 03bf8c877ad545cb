"""LoRAX's own client against a server, unchanged."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from lorax import AsyncClient, Client
from lorax.errors import NotFoundError, ValidationError
from servers import get, post

pytestmark = pytest.mark.filterwarnings("ignore:The `dict` method is deprecated")
TEXT = "the film was good"


def test_classes_are_those_of_predict(classifying: Any) -> None:
    got = Client(classifying.url).classify(TEXT).entities
    alone = classifying.alone("reviews").predict([TEXT], 32, seed=42)
    assert [row["index"] for row in got] == alone.probs[0].argsort(descending=True).tolist()
    for row in got:
        k = row["index"]
        assert row["score"] == pytest.approx(float(alone.probs[0, k]), abs=1e-5)
        low, high = (float(bound[0, k]) for bound in alone.interval(0.9))
        about = row["uncertainty"]
        assert (about["low"], about["high"]) == pytest.approx((low, high), abs=1e-5)
        for name in ("entropy", "aleatoric", "epistemic"):
            assert about[name] == pytest.approx(float(getattr(alone, name)), abs=1e-5)
        votes = alone.draws[:, 0].argmax(-1) == alone.predicted[0]
        assert about["agreement"] == pytest.approx(float(votes.float().mean()))
        assert row["word"] == TEXT


def test_a_batch_has_the_classes_of_each_text(classifying: Any) -> None:
    client = Client(classifying.url)
    texts = [TEXT, "bad", "a very very dull book"]
    got = [one.entities for one in client.classify_batch(texts)]
    for text, rows in zip(texts, got, strict=True):
        alone = client.classify(text).entities
        assert [row["entity"] for row in rows] == [row["entity"] for row in alone]
        for row, other in zip(rows, alone, strict=True):
            assert row["score"] == pytest.approx(other["score"], abs=1e-5)


def test_text_is_that_of_generate(writing: Any) -> None:
    client = Client(writing.url)
    got = client.generate(TEXT, adapter_id="plain", max_new_tokens=6, seed=3)
    alone = writing.alone("plain").generate([TEXT], 8, seed=3, max_new_tokens=6, do_sample=False)
    best = int((alone.log_predictive / alone.num_tokens)[0].argmax())
    assert got.generated_text == alone.texts[0][best]
    details = got.details
    size = int(alone.num_tokens[0, best])
    assert details.generated_tokens == len(details.tokens) == size
    assert [t.id for t in details.tokens] == alone.sequences[0, best, :size].tolist()
    assert details.seed == 3
    assert details.finish_reason in ("length", "eos_token")
    text = "".join(token.text for token in details.tokens if not token.special)
    assert text == got.generated_text


def test_a_stream_has_the_tokens_of_the_text(writing: Any) -> None:
    client = Client(writing.url)
    options: dict[str, Any] = {"adapter_id": "plain", "max_new_tokens": 6, "seed": 3}
    whole = client.generate(TEXT, **options)
    events = list(client.generate_stream(TEXT, **options))
    assert [e.token.id for e in events] == [t.id for t in whole.details.tokens]
    shown = "".join(e.token.text for e in events if not e.token.special)
    assert shown == events[-1].generated_text == whole.generated_text
    assert events[-1].details.generated_tokens == len(events)
    assert all(e.generated_text is None for e in events[:-1])


def test_the_asynchronous_client_works_too(writing: Any) -> None:
    async def ask() -> tuple[Any, list[Any]]:
        client = AsyncClient(writing.url)
        options: dict[str, Any] = {"adapter_id": "plain", "max_new_tokens": 4}
        whole = await client.generate(TEXT, **options)
        return whole, [event async for event in client.generate_stream(TEXT, **options)]

    whole, events = asyncio.run(ask())
    assert whole.generated_text == events[-1].generated_text


def test_sampling_is_repeated_by_its_seed(writing: Any) -> None:
    client = Client(writing.url)
    options: dict[str, Any] = {
        "adapter_id": "plain",
        "max_new_tokens": 6,
        "do_sample": True,
        "temperature": 1.5,
        "top_k": 5,
    }
    first = client.generate(TEXT, seed=5, **options)
    assert first.generated_text == client.generate(TEXT, seed=5, **options).generated_text
    alone = writing.alone("plain").generate(
        [TEXT],
        8,
        seed=5,
        max_new_tokens=6,
        do_sample=True,
        temperature=1.5,
        top_k=5,
        top_p=1.0,
        typical_p=1.0,
    )
    assert first.generated_text == alone.texts[0][0]
    chosen = {client.generate(TEXT, **options).details.seed for _ in range(2)}
    assert len(chosen) == 2


def test_alternatives_and_the_full_text(writing: Any) -> None:
    client = Client(writing.url)
    got = client.generate(
        TEXT, adapter_id="plain", max_new_tokens=3, return_k_alternatives=2, return_full_text=True
    )
    assert got.generated_text.startswith(TEXT)
    for token in got.details.tokens:
        first, second = token.alternative_tokens
        assert first.logprob >= second.logprob
        assert first.logprob >= token.logprob - 1e-5


def test_uncertainty_stands_beside_the_text_and_its_tokens(writing: Any) -> None:
    body = {"inputs": TEXT, "parameters": {"adapter_id": "plain", "max_new_tokens": 6, "seed": 3}}
    got = post(f"{writing.url}/generate", json=body).json()
    assert "details" not in got
    about = got["uncertainty"]
    alone = writing.alone("plain").generate([TEXT], 8, seed=3, max_new_tokens=6, do_sample=False)
    best = int((alone.log_predictive / alone.num_tokens)[0].argmax())
    for name in ("entropy", "aleatoric", "epistemic"):
        values = getattr(alone, name)[0, best]
        counted = values[alone.mask[0, best]]
        tokens = torch.tensor([token[name] for token in about["tokens"]])
        torch.testing.assert_close(tokens, counted, atol=1e-5, rtol=1e-5)
        assert about[name] == pytest.approx(float(counted.mean()), abs=1e-5)
    assert about["agreement"] == pytest.approx(float(alone.agreement[0]), abs=1e-5)
    others = {text for text in alone.texts[0] if text != got["generated_text"]}
    assert {other["text"] for other in about["continuations"]} == others
    for other in about["continuations"]:
        assert [alone.texts[0][k] for k in other["draws"]] == [other["text"]] * len(other["draws"])


def test_a_stop_string_ends_text_tokens_and_uncertainty(writing: Any) -> None:
    client = Client(writing.url)
    options: dict[str, Any] = {"adapter_id": "plain", "max_new_tokens": 6, "seed": 3}
    whole = client.generate(TEXT, **options).generated_text
    word = whole.split()[2]
    place = whole.find(word)
    got = client.generate(TEXT, stop_sequences=[word], **options)
    assert got.generated_text == whole[:place]
    assert got.details.finish_reason == "stop_sequence"
    assert "".join(token.text for token in got.details.tokens) == whole[:place]
    body = {"inputs": TEXT, "parameters": {**options, "stop": [word]}}
    about = post(f"{writing.url}/generate", json=body).json()["uncertainty"]
    assert len(about["tokens"]) == got.details.generated_tokens


def test_a_text_that_stops_at_once_is_empty(writing: Any) -> None:
    client = Client(writing.url)
    options: dict[str, Any] = {"adapter_id": "plain", "max_new_tokens": 6, "seed": 3}
    first = client.generate(TEXT, **options).generated_text[0]
    got = client.generate(TEXT, stop_sequences=[first], **options)
    assert (got.generated_text, got.details.generated_tokens) == ("", 0)
    (event,) = client.generate_stream(TEXT, stop_sequences=[first], **options)
    assert event.generated_text == ""


def test_a_posterior_is_named_where_there_are_several(writing: Any) -> None:
    with pytest.raises(ValidationError, match=r"name one of the posteriors.*chat, plain"):
        Client(writing.url).generate(TEXT)


def test_draws_are_named_by_their_numbers(classifying: Any, writing: Any) -> None:
    parameters: dict[str, Any] = {"adapter_id": "reviews", "draws": [5, 2]}
    body = {"inputs": TEXT, "parameters": parameters}
    rows = post(f"{classifying.url}/classify", json=body).json()
    alone = classifying.alone("reviews").predict([TEXT], draws=[5, 2])
    assert rows[0]["score"] == pytest.approx(float(alone.probs.max()), rel=1e-4)
    about = rows[0]["uncertainty"]
    assert (about["draws"], about["num_samples"], about["seed"]) == ([5, 2], 2, None)
    parameters = {"adapter_id": "plain", "draws": [4, 1], "max_new_tokens": 6, "details": True}
    body = {"inputs": TEXT, "parameters": parameters}
    answer = post(f"{writing.url}/generate", json=body).json()
    written = writing.alone("plain").generate([TEXT], draws=[4, 1], max_new_tokens=6)
    best = int((written.log_predictive / written.num_tokens)[0].argmax())
    assert answer["generated_text"] == written.texts[0][best]
    chosen = sum(token["logprob"] for token in answer["details"]["tokens"])
    assert chosen == pytest.approx(float(written.log_predictive[0, best]), abs=1e-2)
    others = answer["uncertainty"]["continuations"]
    assert {draw for other in others for draw in other["draws"]} <= {4, 1}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"draws": []}, "parameters.draws"),
        ({"draws": [0, True]}, "parameters.draws"),
        ({"draws": [0, 0]}, "more than once"),
        ({"draws": [-1]}, "must be a whole number >= 0"),
        ({"draws": [2**32]}, "must be at most"),
        ({"draws": list(range(65))}, "65 draws were asked for, and the server allows 64"),
        ({"draws": [0], "num_samples": 2}, "num_samples=2 would take others"),
        ({"draws": [0], "seed": 2}, "seed=2 would take others"),
    ],
)
def test_numbers_that_name_no_draws_are_refused(
    writing: Any, classifying: Any, fields: dict[str, Any], words: str
) -> None:
    for url, name in (
        (f"{writing.url}/generate", "plain"),
        (f"{classifying.url}/classify", "reviews"),
    ):
        body = {"inputs": TEXT, "parameters": {"adapter_id": name, **fields}}
        response = post(url, json=body)
        assert response.status_code == 422
        assert words in response.json()["error"]


def test_an_unknown_posterior_is_an_error_with_the_names(writing: Any) -> None:
    with pytest.raises(NotFoundError, match="there are: 'chat', 'plain'"):
        Client(writing.url).generate(TEXT, adapter_id="nobody")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 2),
        ("watermark", True),
        ("truncate", 5),
        ("decoder_input_details", True),
        ("api_token", "x"),
        ("adapter_source", "hub"),
        ("merged_adapters", {"ids": ["a"], "weights": [1.0], "density": 0.5}),
        ("response_format", {"type": "json_object", "schema": {}}),
        ("frequency_penalty", 0.5),
        ("unheard_of", 1),
        ("seed", -1),
        ("temperature", -0.5),
        ("temperature", 1e-40),
        ("repetition_penalty", 0.0),
        ("max_new_tokens", 0),
        ("max_new_tokens", "5"),
        ("seed", True),
        ("temperature", 1e-320),
        ("return_k_alternatives", 2),
    ],
)
def test_a_field_is_obeyed_or_refused_by_its_name(writing: Any, field: str, value: Any) -> None:
    body = {"inputs": TEXT, "parameters": {"adapter_id": "plain", field: value}}
    response = post(f"{writing.url}/generate", json=body)
    assert response.status_code == 422
    assert f"parameters.{field}" in response.json()["error"]


@pytest.mark.parametrize(
    ("field", "value"), [("do_sample", True), ("top_k", 5), ("top_p", 0.5), ("typical_p", 0.5)]
)
def test_options_of_sampling_are_refused_at_temperature_0(
    writing: Any, field: str, value: Any
) -> None:
    body = {"inputs": TEXT, "parameters": {"adapter_id": "plain", "temperature": 0, field: value}}
    response = post(f"{writing.url}/generate", json=body)
    assert response.status_code == 422
    assert f"parameters.{field}" in response.json()["error"]


def test_a_route_says_whether_it_streams(writing: Any) -> None:
    for route, stream in (("generate", True), ("generate_stream", False)):
        body = {"inputs": TEXT, "parameters": {"adapter_id": "plain"}, "stream": stream}
        response = post(f"{writing.url}/{route}", json=body)
        assert response.status_code == 422
        assert "stream" in response.json()["error"]


def test_classes_are_not_asked_of_a_writer_nor_text_of_a_classifier(
    classifying: Any, writing: Any
) -> None:
    body: dict[str, Any] = {"inputs": TEXT, "parameters": {"adapter_id": "plain"}}
    response = post(f"{writing.url}/classify", json=body)
    assert response.status_code == 422
    assert "ask for text" in response.json()["error"]
    response = post(f"{classifying.url}/generate", json={"inputs": TEXT})
    assert response.status_code == 422
    assert "/classify" in response.json()["error"]


def test_the_server_says_what_it_is(classifying: Any) -> None:
    assert get(f"{classifying.url}/health").json() == {"status": "ok"}
    info = get(f"{classifying.url}/info").json()
    assert info["posteriors"] == ["other", "reviews", "third"]
    assert info["model_id"] == "encoder"


def test_without_a_length_it_writes_what_the_context_leaves(writing: Any) -> None:
    prompt = " ".join(["good"] * 28)  # 29 tokens of 32
    got = Client(writing.url).generate(prompt, adapter_id="plain")
    assert got.details.prompt_tokens == 29
    assert got.details.generated_tokens <= 3
