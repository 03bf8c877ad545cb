"""Texts that several posteriors write at once: shared, streamed, and cut when nobody waits."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from problems import tokenizer
from servers import SLOW, Live, post, running, served

from pyrolora.predictive import NewToken, following, mixed_writing
from pyrolora.serving import service as service_module
from pyrolora.serving.app import create_app
from pyrolora.serving.limits import Limits
from pyrolora.serving.streaming import Unfolding, steady

PROMPT = "the film was"
SOON = 60.0


def until(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def server(shop: Any, limits: Limits | None = None) -> Iterator[Live]:
    service = served(shop, limits)
    with running(create_app(service)) as url:
        yield Live(url, shop, service)


class Steps:
    """Holds the pass before each of its steps, until it may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allowed = threading.Semaphore(0)
        self.free = threading.Event()
        self.begun = threading.Event()
        self.taken = 0
        self.fails_at: int | None = None
        original = following.Following.__call__

        def step(criterion: Any, *args: Any, **kwargs: Any) -> Any:
            self.begun.set()
            while not self.free.is_set() and not self.allowed.acquire(timeout=0.05):
                pass
            self.taken += 1
            if self.taken == self.fails_at:
                raise RuntimeError("a secret of the house")
            return original(criterion, *args, **kwargs)

        monkeypatch.setattr(following.Following, "__call__", step)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Steps]:
    made = Steps(monkeypatch)
    yield made
    made.free.set()


def completion(name: str, seed: int, **more: Any) -> dict[str, Any]:
    return {"model": name, "prompt": PROMPT, "max_tokens": 6, "seed": seed, **more}


def test_texts_of_several_posteriors_and_draws_share_a_pass(
    writers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy and sampled, with different draws, seeds, settings: each is that of generate."""
    passes: list[int] = []
    original = mixed_writing._pass

    def counted(mixture: Any, *args: Any) -> Any:
        passes.append(sum(mixture.sizes))
        return original(mixture, *args)

    monkeypatch.setattr(mixed_writing, "_pass", counted)
    asked = [
        completion("plain", 1, temperature=0, num_samples=3),
        completion("chat", 1, temperature=0, num_samples=2, max_tokens=5),
        completion("plain", 2, temperature=1.3, num_samples=4),
        completion("chat", 3, temperature=0.8, top_p=0.9, num_samples=0),
        completion("chat", 4, temperature=1.0, num_samples=2, n=4),
    ]
    gate, reached = threading.Event(), threading.Event()
    run = service_module._run

    def held(drawn: Any, rows: Any) -> Any:
        reached.set()
        assert gate.wait(SOON)
        return run(drawn, rows)

    monkeypatch.setattr(service_module, "_run", held)
    with server(writers) as live, ThreadPoolExecutor(8) as pool:

        def ask(body: dict[str, Any]) -> Any:
            return post(f"{live.url}/v1/completions", json=body).json()

        first = pool.submit(ask, completion("plain", 9, temperature=0, num_samples=0))
        assert reached.wait(SOON)
        others = [pool.submit(ask, body) for body in asked]
        until(lambda: len(live.service.batcher) == len(asked))
        gate.set()
        answers = [other.result(SOON) for other in others]
        first.result(SOON)
        assert passes == [1, 3 + 2 + 4 + 1 + 4]
        for body, answer in zip(asked, answers, strict=True):
            greedy = not body["temperature"]
            sampled = {"temperature": body["temperature"], "top_k": 0}
            alone = live.alone(body["model"]).generate(
                [PROMPT],
                body["num_samples"],
                seed=body["seed"],
                max_new_tokens=body["max_tokens"],
                do_sample=not greedy,
                num_return_sequences=body.get("n", 1) // max(body["num_samples"], 1) or 1,
                **({} if greedy else {**sampled, "top_p": body.get("top_p", 1.0)}),
            )
            assert alone.texts is not None
            texts = alone.texts[0]
            if greedy:
                best = int((alone.log_predictive / alone.num_tokens)[0].argmax())
                expected = [texts[best]]
            else:
                expected = [*texts[0::2], *texts[1::2]] if "n" in body else texts[:1]
            assert [choice["text"] for choice in answer["choices"]] == expected


@pytest.mark.parametrize("draws", [{"num_samples": 0}, {"draws": [4]}])
def test_the_first_token_comes_before_the_second_is_written(
    writers: Any, steps: Steps, draws: dict[str, Any]
) -> None:
    with server(writers) as live:
        whole: dict[str, Any] = {}
        for route, body in (
            ("generate_stream", {"inputs": PROMPT, "parameters": {"adapter_id": "plain", **draws}}),
            ("v1/completions", completion("plain", 3, stream=True, logprobs=2, **draws)),
        ):
            if route == "generate_stream":
                body["parameters"] |= {"max_new_tokens": 6, "return_k_alternatives": 2}
            while steps.allowed.acquire(blocking=False):
                pass
            before = steps.taken
            steps.allowed.release()
            with httpx.stream("POST", f"{live.url}/{route}", json=body, timeout=SLOW) as response:
                lines = (line for line in response.iter_lines() if line.startswith("data: {"))
                events = [json.loads(next(lines).removeprefix("data: "))]
                assert steps.taken == before + 1
                for _ in range(5):
                    steps.allowed.release()
                events += [json.loads(line.removeprefix("data: ")) for line in lines]
            whole[route] = events
        steps.free.set()
        plain = whole["generate_stream"]
        body = {"inputs": PROMPT, "parameters": {"adapter_id": "plain", "max_new_tokens": 6}}
        body["parameters"] |= {**draws, "details": True, "return_k_alternatives": 2}
        answer = post(f"{live.url}/generate", json=body).json()
        assert plain[-1]["generated_text"] == answer["generated_text"]
        for event, token in zip(plain, answer["details"]["tokens"], strict=True):
            shown = event["token"]
            assert (shown["id"], shown["text"]) == (token["id"], token["text"])
            assert shown["logprob"] == pytest.approx(token["logprob"], abs=1e-4)
            assert shown["uncertainty"] == pytest.approx(token["uncertainty"], abs=1e-4)
            for one, other in zip(
                shown["alternative_tokens"], token["alternative_tokens"], strict=True
            ):
                assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-4)
        body = completion("plain", 3, logprobs=2, **draws)
        (choice,) = post(f"{live.url}/v1/completions", json=body).json()["choices"]
        *tokens, last = [event["choices"][0] for event in whole["v1/completions"]]
        assert "".join(token["text"] for token in tokens) == choice["text"]
        assert last["finish_reason"] == choice["finish_reason"]
        assert last["uncertainty"]["entropy"] == pytest.approx(choice["uncertainty"]["entropy"])
        for t, token in enumerate(tokens):
            for name in ("tokens", "text_offset"):
                assert token["logprobs"][name] == choice["logprobs"][name][t : t + 1]
            score = choice["logprobs"]["token_logprobs"][t]
            assert token["logprobs"]["token_logprobs"] == [pytest.approx(score, abs=1e-4)]
            assert token["uncertainty"]["text"] == token["text"]


def test_choices_of_one_draw_stream_side_by_side(writing: Live) -> None:
    body = completion("plain", 3, n=3, num_samples=1, temperature=1.5)
    choices = post(f"{writing.url}/v1/completions", json=body).json()["choices"]
    body |= {"stream": True, "prompt": [PROMPT, "bad"]}
    texts: dict[int, str] = {}
    with httpx.stream("POST", f"{writing.url}/v1/completions", json=body, timeout=SLOW) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert sorted(texts) == [0, 1, 2, 3, 4, 5]
    assert [texts[k] for k in range(3)] == [choice["text"] for choice in choices]


@contextmanager
def asked(url: str, body: dict[str, Any]) -> Iterator[None]:
    """A request for a completion, whose connection is closed at the end of the block."""
    content = json.dumps(body).encode()
    host, port = url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + content)
        yield


def test_a_client_that_hangs_up_ends_the_pass_that_is_its_own(
    writers: Any, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Any] = []
    original = service_module._to_write
    monkeypatch.setattr(service_module, "_to_write", lambda row: rows.append(row) or original(row))
    for more in ({"num_samples": 0, "stream": True}, {"num_samples": 2}):
        steps.free.clear()
        steps.begun.clear()
        steps.taken = 0
        with server(writers) as live:
            with asked(live.url, completion("plain", 3, max_tokens=20, **more)):
                assert steps.begun.wait(SOON)
                steps.allowed.release()
                until(lambda: steps.taken == 1)
            until(lambda: all(row.given_up for row in rows))
            steps.free.set()
            entry = live.service.registry._entries["plain"]
            until(lambda: entry.users == 0)  # noqa: B023
            assert steps.taken == 2
            body = {"inputs": PROMPT, "parameters": {"adapter_id": "plain"}}
            assert post(f"{live.url}/generate", json=body).status_code == 200


def test_an_error_within_a_stream_is_an_event_without_a_trace(writers: Any, steps: Steps) -> None:
    steps.free.set()
    for route, body in (
        ("v1/completions", completion("plain", 3, num_samples=0, stream=True)),
        ("generate_stream", {"inputs": PROMPT, "parameters": {"adapter_id": "plain"}}),
    ):
        steps.taken, steps.fails_at = 0, 3
        if route == "generate_stream":
            body["parameters"] |= {"num_samples": 0, "max_new_tokens": 6}
        with server(writers) as live:
            text = post(f"{live.url}/{route}", json=body).text
        *tokens, error = [line for line in text.splitlines() if line]
        assert len(tokens) >= 1
        assert "secret" not in text
        said = json.loads(error.removeprefix("data: "))
        assert "its log has the reason" in str(said["error"])


def test_a_stream_that_takes_too_long_says_so(writers: Any, steps: Steps) -> None:
    with server(writers) as live:
        steps.free.set()
        body = completion("plain", 3, num_samples=0, stream=True)
        assert "[DONE]" in post(f"{live.url}/v1/completions", json=body).text
        steps.free.clear()
        steps.taken = 0
        live.service.limits = Limits(timeout=3.0)
        steps.allowed.release()
        text = post(f"{live.url}/v1/completions", json=body).text
        assert "not answered within 3 seconds" in text.splitlines()[-2]
        steps.free.set()
    assert steps.taken <= 2


def test_what_is_refused_before_it_begins_has_its_status(writing: Live) -> None:
    body = completion("nobody", 3, stream=True)
    assert post(f"{writing.url}/v1/completions", json=body).status_code == 404
    body = completion("plain", 3, stream=True, max_tokens=30)
    assert post(f"{writing.url}/v1/completions", json=body).status_code == 413


# Texts of tokens ----------------------------------------------------------------------------------


def unfolded(words: Any, ids: list[int], stops: list[str]) -> list[str]:
    text = Unfolding(words, stops)
    sent = []
    for place, token in enumerate(ids):
        new = NewToken(place, token, place == len(ids) - 1, 0.0, 0.0, [], [])
        sent += [part for part, _ in text.push(new)]
    return sent


@pytest.mark.parametrize("stops", [[], ["名前 🙂 e"], ["x"], ["d", "nd t"], ["ï"], ["naïve 名 no"]])
def test_what_is_sent_early_is_the_beginning_of_the_answer(stops: list[str]) -> None:
    from transformers import AutoTokenizer

    from pyrolora import zoo
    from pyrolora.serving.answers import _cut

    words = AutoTokenizer.from_pretrained(zoo.folder("decoder"))
    ids = words("naïve 名前 🙂 end the end", add_special_tokens=False)["input_ids"]
    for size in range(1, len(ids) + 1):
        sent, whole = unfolded(words, ids[:size], stops), _cut(words, ids[:size], stops)
        assert sent == whole.parts[: len(sent)]
        assert len(sent) <= max(len(whole.parts) - 1, 0) or whole.stopped
        if not stops:
            assert len(sent) == size - 1


def test_a_text_that_is_written_again_goes_on_where_it_was() -> None:
    words = tokenizer()
    ids = words("the film was good", add_special_tokens=False)["input_ids"]
    text = Unfolding(words, [])
    tokens = [NewToken(k, token, False, 0.0, 0.0, [], []) for k, token in enumerate(ids)]
    sent = [part for token in (*tokens[:2], *tokens) for part, _ in text.push(token)]
    assert "".join(sent) == "the film was good"


def test_a_tokenizer_that_takes_spaces_back_is_not_steady() -> None:
    from transformers import AutoTokenizer

    from pyrolora import zoo

    words = tokenizer()
    assert steady(words)
    assert steady(AutoTokenizer.from_pretrained(zoo.folder("decoder")))
    words.clean_up_tokenization_spaces = True
    assert not steady(words)
