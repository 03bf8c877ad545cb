"""The server as a whole: errors, limits, the key, cancelled clients, its end."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import torch
from servers import Live, get, post, running, served

import pyrolora
from pyrolora.errors import ConfigError
from pyrolora.serving import service as service_module
from pyrolora.serving.app import create_app
from pyrolora.serving.limits import Limits

TEXT = "the film was good"
KEY = "a key of many letters"
SOON = 30.0


def classify(url: str, name: str = "reviews", text: str = TEXT, **options: Any) -> httpx.Response:
    body = {"inputs": text, "parameters": {"adapter_id": name}}
    return post(f"{url}/classify", json=body, **options)


@contextmanager
def server(shop: Any, limits: Limits | None = None, **options: Any) -> Iterator[Live]:
    service = served(shop, limits)
    with running(create_app(service, **options)) as url:
        yield Live(url, shop, service)


class Gate:
    """Holds the network until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.reached = threading.Semaphore(0)
        self.rows: list[int] = []
        original = service_module._run

        def held(drawn: Any, rows: Any) -> Any:
            self.rows.append(len(rows))
            self.reached.release()
            assert self.opened.wait(SOON)
            return original(drawn, rows)

        monkeypatch.setattr(service_module, "_run", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def until(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nobody", "../reviews", "reviews/../other", "", "/etc/passwd"])
def test_an_unknown_posterior_is_404_with_the_names(classifying: Live, name: str) -> None:
    response = classify(classifying.url, name)
    assert response.status_code == 404
    error = response.json()
    assert "there are: 'other', 'reviews', 'third'" in error["error"]
    assert error["error_type"] == "not_found"


def test_a_damaged_folder_is_422_with_the_reason_and_the_server_lives(shop: Any) -> None:
    made = shop("reviews", "other")
    next((made.directory / "reviews").glob("*.safetensors")).unlink()
    with server(made) as live:
        response = classify(live.url)
        assert response.status_code == 422
        assert "'reviews' cannot be loaded" in response.json()["error"]
        assert str(made.directory) not in response.text
        assert classify(live.url, "other").status_code == 200


def test_a_posterior_of_another_base_is_422(shop: Any, classifiers: Any) -> None:
    from problems import bert, reviews, tokenizer

    made = shop("reviews")
    stranger = pyrolora.fit(bert(seed=5), reviews(8), tokenizer=tokenizer(), epochs=1)
    stranger.save(made.directory / "stranger")
    with server(made) as live:
        response = classify(live.url, "stranger")
        assert response.status_code == 422
        assert "does not belong to the network of this server" in response.json()["error"]
        assert classify(live.url).status_code == 200


def test_too_long_a_text_is_413_with_the_limit(classifying: Live) -> None:
    response = classify(classifying.url, text="good " * 100)
    assert response.status_code == 413
    assert "takes 32" in response.json()["error"]


@pytest.mark.parametrize(
    "body",
    [
        *(b"{", b"[" * 100_000, b"\xff", b"null", b"[]"),
        *(b'{"inputs": 5}', b'{"inputs": "\\ud800"}', b'{"inputs": ""}', b'{"inputs": NaN}'),
    ],
)
def test_a_body_that_is_no_request_is_refused(classifying: Live, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = post(f"{classifying.url}/classify", content=body, headers=headers)
    assert response.status_code == 422
    assert response.json()["error"].startswith(("the body", "inputs: "))


def test_a_field_that_stands_twice_is_refused(classifying: Live) -> None:
    headers = {"Content-Type": "application/json"}
    fields = "".join(f'"f{k}": 0, ' for k in range(50_000))  # found without comparing all pairs
    for more in ("", fields):
        body = f'{{{more}"inputs": "good", "inputs": "bad", "parameters": {{}}}}'
        response = post(f"{classifying.url}/classify", content=body, headers=headers)
        assert response.status_code == 422
        assert "'inputs' twice" in response.json()["error"]


def test_a_body_of_another_type_is_refused(classifying: Live) -> None:
    body = json.dumps({"inputs": TEXT})
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        headers = {"Content-Type": kind}
        response = post(f"{classifying.url}/classify", content=body, headers=headers)
        assert response.status_code == 415


def test_an_unexpected_error_leaves_no_trace_but_its_number(
    classifying: Live, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(rows: Any) -> Any:
        raise RuntimeError("a secret of the house")

    monkeypatch.setattr(classifying.service.batcher, "_run", broken)
    with caplog.at_level(logging.ERROR):
        response = classify(classifying.url)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    number = response.json()["error"].split()[-1]
    assert number in caplog.text
    assert "a secret of the house" in caplog.text


def test_paths_and_methods_that_there_are_not(classifying: Live) -> None:
    assert get(f"{classifying.url}/nothing").status_code == 404
    assert get(f"{classifying.url}/classify").status_code == 405
    error = get(f"{classifying.url}/v1/nothing").json()["error"]
    assert error["type"] == "invalid_request_error"


# Protection -------------------------------------------------------------------------------------


def test_a_long_body_is_413_whatever_its_header_says(classifiers: Any) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 100

    with server(classifiers, Limits(body=1000)) as live:
        assert classify(live.url, text="x" * 2000).status_code == 413
        headers = {"Content-Type": "application/json"}
        response = post(f"{live.url}/classify", content=chunks(), headers=headers)
        assert response.status_code == 413
        assert "1,000 bytes" in response.json()["error"]
        assert classify(live.url).status_code == 200


def test_the_key_is_asked_for(classifiers: Any) -> None:
    with server(classifiers, key=KEY) as live:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": KEY},
            {"Authorization": f"Basic {KEY}"},
            {"Authorization": "Bearer"},
        ):
            response = classify(live.url, headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            for path in ("/v1/models", "/info", "/metrics", "/openapi.json"):
                assert get(live.url + path, headers=headers).status_code == 401
        right = {"Authorization": f"Bearer {KEY}"}
        assert classify(live.url, headers=right).status_code == 200
        assert get(f"{live.url}/health").status_code == 200
        assert get(f"{live.url}/").status_code == 200


def test_a_key_that_is_no_ascii_is_compared_too(classifiers: Any) -> None:
    with server(classifiers, key="schlüssel") as live:
        assert classify(live.url, headers={"Authorization": "Bearer x"}).status_code == 401
        right = {"Authorization": "Bearer schlüssel".encode()}
        assert classify(live.url, headers=right).status_code == 200
    with server(classifiers, key="voilà") as live:  # its last byte is a space in Latin-1
        right = {"Authorization": "Bearer voilà".encode()}
        assert classify(live.url, headers=right).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [("evil.example", 421), ("evil.example:80", 421), ("localhost:1", 200), ("[::1]:80", 200)],
)
def test_the_loopback_answers_to_its_own_names(classifying: Live, host: str, status: int) -> None:
    assert get(f"{classifying.url}/health", headers={"Host": host}).status_code == status


def test_limits_are_checked() -> None:
    for wrong in ({"queue": 0}, {"timeout": 0.0}, {"window": -1.0}):
        with pytest.raises(ConfigError):
            Limits(**wrong)  # type: ignore[arg-type]


# The queue --------------------------------------------------------------------------------------


def test_requests_at_once_share_a_batch(classifiers: Any, gate: Gate) -> None:
    with server(classifiers) as live, ThreadPoolExecutor(8) as pool:
        first = pool.submit(classify, live.url)
        assert gate.reached.acquire(timeout=SOON)
        others = [pool.submit(classify, live.url, text="bad") for _ in range(5)]
        until(lambda: len(live.service.batcher) == 5)
        gate.opened.set()
        assert first.result(SOON).status_code == 200
        assert {one.result(SOON).status_code for one in others} == {200}
    assert gate.rows == [1, 5]


def test_requests_for_several_posteriors_share_a_batch(classifiers: Any, gate: Gate) -> None:
    names = ["other", "third", "reviews", "other"]
    with server(classifiers) as live, ThreadPoolExecutor(8) as pool:
        first = pool.submit(classify, live.url)
        assert gate.reached.acquire(timeout=SOON)
        others = [pool.submit(classify, live.url, name) for name in names]
        until(lambda: len(live.service.batcher) == 4)
        gate.opened.set()
        got = {name: one.result(SOON).json() for name, one in zip(names, others, strict=True)}
        first.result(SOON)
    assert gate.rows == [1, 4]
    for name, rows in got.items():
        posterior = pyrolora.load(classifiers.directory / name, classifiers.base)
        alone = posterior.predict([TEXT], seed=42).probs[0]
        scores = [row["score"] for row in sorted(rows, key=lambda row: row["index"])]
        torch.testing.assert_close(torch.tensor(scores), alone, atol=1e-5, rtol=1e-5)


def test_a_full_queue_is_429_with_a_time_to_come_back(classifiers: Any, gate: Gate) -> None:
    with server(classifiers, Limits(queue=2)) as live, ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(classify, live.url)]
        assert gate.reached.acquire(timeout=SOON)
        waiting += [pool.submit(classify, live.url, text="bad") for _ in range(2)]
        until(lambda: len(live.service.batcher) == 2)
        response = classify(live.url)
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error_type"] == "overloaded"
        gate.opened.set()
        assert {one.result(SOON).status_code for one in waiting} == {200}
        assert classify(live.url).status_code == 200


def test_a_client_that_hangs_up_frees_its_place(classifiers: Any, gate: Gate) -> None:
    with server(classifiers, Limits(queue=1)) as live, ThreadPoolExecutor(2) as pool:
        first = pool.submit(classify, live.url)
        assert gate.reached.acquire(timeout=SOON)
        body = json.dumps({"inputs": TEXT, "parameters": {"adapter_id": "other"}}).encode()
        host, port = live.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as gone:
            head = (
                f"POST /classify HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            gone.sendall(head.encode() + body)
            until(lambda: len(live.service.batcher) == 1)
        until(lambda: len(live.service.batcher) == 0)
        gate.opened.set()
        assert first.result(SOON).status_code == 200
        entry = live.service.registry._entries["other"]
        assert entry.users == 0
    assert sum(gate.rows) == 1


def test_an_answer_that_comes_late_is_504(classifiers: Any, gate: Gate) -> None:
    with server(classifiers, Limits(timeout=1.0)) as live:
        response = classify(live.url)
        assert response.status_code == 504
        assert "1 seconds" in response.json()["error"]
        gate.opened.set()
        until(lambda: classify(live.url).status_code == 200)
        until(lambda: live.service.registry._entries["reviews"].users == 0)


def test_loading_counts_for_the_time_and_leaves_nothing_in_use(
    classifiers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server(classifiers, Limits(timeout=1.0)) as live:
        networks, loaded = live.service.registry.networks, threading.Event()
        original = networks.load

        def held(folder: Any) -> Any:
            assert loaded.wait(SOON)
            return original(folder)

        monkeypatch.setattr(networks, "load", held)
        timer = threading.Timer(10.0, loaded.set)
        timer.start()
        response = classify(live.url)
        assert response.status_code == 504
        timer.cancel()
        loaded.set()
        until(lambda: classify(live.url).status_code == 200)
        until(lambda: live.service.registry._entries["reviews"].users == 0)


def test_the_end_waits_for_what_was_begun(classifiers: Any, gate: Gate) -> None:
    with ThreadPoolExecutor(2) as pool:
        with server(classifiers) as live:
            begun = pool.submit(classify, live.url)
            assert gate.reached.acquire(timeout=SOON)
            threading.Timer(0.3, gate.opened.set).start()
        assert begun.result(SOON).status_code == 200
    assert live.service.registry.loaded() == []
    with pytest.raises(httpx.ConnectError):
        classify(live.url)


# Numbers ----------------------------------------------------------------------------------------


def test_metrics_count_what_happened(classifiers: Any) -> None:
    with server(classifiers) as live:
        classify(live.url)
        classify(live.url, "nobody")
        get(f"{live.url}/any/thing")
        text = get(f"{live.url}/metrics").text
    assert 'pyrolora_requests_total{route="/classify",status="200"} 1.0' in text
    assert 'pyrolora_requests_total{route="/classify",status="404"} 1.0' in text
    assert 'pyrolora_requests_total{route="other",status="404"} 1.0' in text
    assert 'pyrolora_request_seconds_count{route="/classify"} 2.0' in text
    assert "pyrolora_posteriors_loaded 1.0" in text
    assert "pyrolora_queue_length 0.0" in text
    assert "pyrolora_batch_rows_count 1.0" in text
    size = live.service.registry.bytes
    assert size == 0  # the server has ended
    line = next(line for line in text.splitlines() if line.startswith("pyrolora_posterior_bytes "))
    assert float(line.split()[1]) > 0


def test_every_answer_is_of_the_posterior_that_was_asked(classifying: Live) -> None:
    """Many clients, several posteriors: nothing lost, nothing mixed up."""
    names, texts = ("reviews", "other", "third"), (TEXT, "bad", "a very dull book")
    expected = {
        (name, text): classifying.alone(name).predict([text], 32, seed=42).probs[0]
        for name in names
        for text in texts
    }
    asked = [*expected] * 2
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda one: classify(classifying.url, *one).json(), asked))
    for key, rows in zip(asked, answers, strict=True):
        got = torch.tensor([row["score"] for row in sorted(rows, key=lambda row: row["index"])])
        torch.testing.assert_close(got, expected[key], atol=1e-5, rtol=1e-5)


def test_posteriors_take_turns_in_memory_for_one(classifiers: Any) -> None:
    from pyrolora.serving.registry import Registry
    from pyrolora.serving.service import Service

    registry = Registry(classifiers.directory, classifiers.base)
    registry.lease("reviews").release()
    small = Registry(classifiers.directory, classifiers.base, budget=int(1.5 * registry.bytes))
    service = Service(small)
    with running(create_app(service)) as url, ThreadPoolExecutor(6) as pool:
        names = ("reviews", "other", "third") * 4
        answers = list(pool.map(lambda name: classify(url, name), names))
        assert small.bytes <= 1.5 * registry.bytes
    assert {answer.status_code for answer in answers} == {200}
