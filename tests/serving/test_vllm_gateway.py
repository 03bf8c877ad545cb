"""The gateway to vLLM answers as the server that has the network, and starts with nothing less."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from console import pyrolora_, refused
from problems import WORDS, bert, llama, reviews, tokenizer
from servers import Live, get, post, running
from transformers import AutoModelForCausalLM
from vllm_stub import Stub, app_of

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.errors import CheckpointError, ConfigError
from pyrolora.serving import run
from pyrolora.serving.app import create_app
from pyrolora.serving.limits import Limits
from pyrolora.serving.lorax import Parameters
from pyrolora.serving.openai_fields import ChatRequest, CompletionRequest
from pyrolora.serving.vllm.checks import ready, serve_line
from pyrolora.serving.vllm.engine import ALL, Engine, EngineGoneError
from pyrolora.serving.vllm.export import export_vllm
from pyrolora.serving.vllm.exported import read_exported
from pyrolora.serving.vllm.gateway import Gateway
from pyrolora.serving.vllm.scores import coarse, generation, whole

DRAWS = [0, 1, 3]
PROMPT = "the film was"


@pytest.fixture(scope="module")
def adapters(writers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one posterior for vLLM."""
    posterior = pyrolora.load(writers.directory / "plain", writers.base)
    directory = tmp_path_factory.mktemp("adapters")
    export_vllm(posterior, directory / "plain", DRAWS)
    return directory


@pytest.fixture(scope="module")
def network(writers: Any) -> Any:
    return lambda: AutoModelForCausalLM.from_pretrained(writers.base)


def stub_of(network: Any, **options: Any) -> Stub:
    options = {"decode": tokenizer().decode, "max_logprobs": -1, **options}
    return Stub(network(), frozenset({3}), **options)


def gateway_to(
    url: str, folder: Path, limits: Limits | None = None, top: int = ALL, **options: Any
) -> Gateway:
    """A gateway whose engine has been checked."""
    engine, posterior = Engine(url, timeout=60), read_exported(folder)

    async def checked() -> Any:
        try:
            return await ready(engine, [posterior], top)
        finally:
            await engine.close()

    return Gateway(engine, [posterior], asyncio.run(checked()), limits, top=top, **options)


@pytest.fixture(scope="module")
def engine(network: Any) -> Iterator[tuple[str, Stub]]:
    stub = stub_of(network)
    with running(app_of(stub)) as url:
        yield url, stub


@pytest.fixture(scope="module")
def gateway(adapters: Path, engine: tuple[str, Stub]) -> Iterator[str]:
    with running(create_app(gateway_to(engine[0], adapters / "plain"))) as url:
        yield url


def close(one: Any, other: Any, place: str = "") -> None:
    """Both have the same content, and numbers that are equal but for rounding."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for name, value in one.items():
            close(value, other[name], f"{place}.{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), place
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            close(a, b, f"{place}[{i}]")
    elif isinstance(one, float) and isinstance(other, float):
        assert one == pytest.approx(other, rel=1e-4, abs=2e-5), place
    else:
        assert one == other, place


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"logprobs": 3, "n": 3},
        {"stop": ["film"]},
        {"draws": [3, 0]},
        {"draws": [1]},
        {"prompt": [PROMPT, "a bad book"], "max_tokens": 3},
    ],
    ids=str,
)
def test_completions_are_those_of_the_own_engine(
    gateway: str, writing: Live, more: dict[str, Any]
) -> None:
    body = {"model": "plain", "prompt": PROMPT, "max_tokens": 5, "temperature": 0, **more}
    answer = post(f"{gateway}/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    own = post(f"{writing.url}/v1/completions", json={"draws": DRAWS, **body}).json()
    about = own["choices"][0]["uncertainty"]
    if body.get("draws") != [1]:
        assert about["epistemic"] > 1e-3
    got = answer.json()
    for volatile in ("id", "created"):
        got.pop(volatile), own.pop(volatile)
    for choice in (*got["choices"], *own["choices"]):  # a greedy text has no seed here
        choice["uncertainty"].pop("seed")
    close(got, own)


def test_what_stands_behind_a_stop_string_chooses_no_answer(gateway: str, writing: Live) -> None:
    """Draws are ranked by what they wrote up to it, as the own engine ranks them."""
    told: list[dict[str, Any]] = []
    for word in WORDS[4:]:
        body = {"model": "plain", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "n": 3}
        pair = [
            post(f"{url}/v1/completions", json={**body, "stop": word, **more}).json()["choices"]
            for url, more in ((gateway, {}), (writing.url, {"draws": DRAWS}))
        ]
        told.append({c["text"]: c["finish_reason"] for c in pair[0]})
        for choice in (*pair[0], *pair[1]):
            choice["uncertainty"].pop("seed")
        close(*pair, word)
    assert any(len({*ends.values()}) > 1 for ends in told)  # or the test could not fail


def test_the_engine_stops_at_a_stop_string(gateway: str, engine: tuple[str, Stub]) -> None:
    """Tokens behind it would be written for nothing."""
    body = {"model": "plain", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "draws": [0]}
    text = post(f"{gateway}/v1/completions", json=body).json()["choices"][0]["text"]
    second = text.split()[1]
    before = engine[1].written
    answer = post(f"{gateway}/v1/completions", json={**body, "stop": second}).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["text"].split() == text.split()[:1]
    kept = answer["choices"][0]["uncertainty"]["tokens"]
    assert engine[1].written - before == len(kept) + 1 < 12  # one more, when they are scored


SENT: dict[str, dict[str, Any]] = {
    "max_tokens": {"max_tokens": 3},
    "max_completion_tokens": {"max_tokens": 3},
    "max_new_tokens": {"max_tokens": 3},
    "temperature": {"temperature": 0.5},
    "top_p": {"top_p": 0.5},
    "top_k": {"top_k": 3},
    "repetition_penalty": {"repetition_penalty": 3.0},
    "n": {"n": 2},
    "seed": {"seed": 5},
    "stop": {"stop": ["film"], "skip_special_tokens": False},
    "do_sample": {"temperature": 1.0},
    "typical_p": {},
}
"""Field of a request -> the fields of the engine's that hold it; none where it is refused."""
HERE = {
    *("model", "adapter_id", "prompt", "messages", "num_samples", "numbers", "draws", "stream"),
    *("stream_options", "logprobs", "top_logprobs", "return_full_text", "details"),
    "return_k_alternatives",
}
"""Fields that choose draws, or the form of an answer."""


def test_every_field_of_a_request_reaches_the_engine_or_is_refused(
    gateway: str, engine: tuple[str, Stub]
) -> None:
    values = {
        **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_new_tokens", "top_k"), 3),
        "temperature": 0.5,
        "top_p": 0.5,
        "typical_p": 0.5,
        "repetition_penalty": 3.0,
        "n": 2,
        "seed": 5,
        "stop": ["film"],
        "do_sample": True,
    }
    for path, fields in (("completions", CompletionRequest), ("", Parameters)):
        for name in fields.model_fields.keys() - HERE:
            field, settings = {name: values[name]}, {"draws": [0], "seed": 1}
            if path:
                body = {"model": "plain", "prompt": PROMPT, **settings, **field}
                answer = post(f"{gateway}/v1/{path}", json=body)
            else:
                body = {**settings, "do_sample": True, **field}
                answer = post(f"{gateway}/generate", json={"inputs": PROMPT, "parameters": body})
            if not SENT[name]:
                assert (answer.status_code, name in answer.json()["error"]) == (422, True)
                continue
            assert answer.status_code == 200, answer.text
            body = next(b for b in reversed(engine[1].requests) if b.get("return_token_ids"))
            assert {key: body[key] for key in SENT[name]} == SENT[name], name
    fields = CompletionRequest.model_fields | ChatRequest.model_fields | Parameters.model_fields
    assert SENT.keys() | HERE == fields.keys()


def test_temperatures_that_vllm_raises_are_refused(gateway: str) -> None:
    body = {"model": "plain", "prompt": PROMPT, "max_tokens": 2, "temperature": 0.009}
    answer = post(f"{gateway}/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "temperature")
    assert "at 0.01 or above" in answer.text


def test_lorax_and_streams_are_those_of_the_own_engine(gateway: str, writing: Live) -> None:
    parameters = {"max_new_tokens": 3, "details": True, "return_k_alternatives": 2}
    for path in ("/generate", "/generate_stream"):
        got = post(f"{gateway}{path}", json={"inputs": PROMPT, "parameters": parameters})
        own = post(
            f"{writing.url}{path}",
            json={
                "inputs": PROMPT,
                "parameters": {**parameters, "adapter_id": "plain", "draws": DRAWS},
            },
        )
        events = [
            [json.loads(e.removeprefix("data:")) for e in answer.text.strip().split("\n\n")]
            if "stream" in path
            else [answer.json()]
            for answer in (got, own)
        ]
        for event in (e for answer in events for e in answer):
            for place in (event.get("details"), event.get("uncertainty")):
                if isinstance(place, dict):
                    place.pop("seed", None)
        close(*events)


def test_openais_client_samples_from_every_draw(gateway: str, engine: tuple[str, Stub]) -> None:
    with openai.OpenAI(base_url=f"{gateway}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["plain"]
        ask = {"model": "plain", "prompt": PROMPT, "max_tokens": 2, "seed": 7, "n": 6}
        one, two = (client.completions.create(**ask) for _ in range(2))
    assert [c.text for c in one.choices] == [c.text for c in two.choices]
    about = one.choices[0].model_extra["uncertainty"]
    assert (about["seed"], about["draws"]) == (7, DRAWS)
    writing = [b for b in engine[1].requests if b.get("return_token_ids")][-len(DRAWS) :]
    assert len({b["seed"] for b in writing} | {b["seed"] + 1 for b in writing}) == 2 * len(DRAWS)
    assert {b["n"] for b in writing} == {2}


def test_a_calibrated_posterior_keeps_its_temperature(
    writers: Any, network: Any, tmp_path: Path
) -> None:
    posterior = pyrolora.load(writers.directory / "plain", writers.base)
    posterior.temperature = 1.7
    export_vllm(posterior, tmp_path / "warm", DRAWS)
    with running(app_of(stub_of(network))) as url:
        with pytest.raises(ConfigError, match=r"has the temperature 1\.7.*-1"):
            gateway_to(url, tmp_path / "warm", top=20)
        with running(create_app(gateway_to(url, tmp_path / "warm"))) as there:
            body = {"model": "warm", "prompt": PROMPT, "max_tokens": 5, "temperature": 0}
            (choice,) = post(f"{there}/v1/completions", json=body).json()["choices"]
    alone = posterior.generate([PROMPT], draws=DRAWS, max_new_tokens=5, do_sample=False)
    k = alone.texts[0].index(choice["text"])
    found = [token["entropy"] for token in choice["uncertainty"]["tokens"]]
    assert found == pytest.approx(alone.entropy[0, k, : len(found)].tolist(), rel=1e-4)


def test_few_log_probabilities_bound_the_entropies_from_below(
    adapters: Path, network: Any, gateway: str
) -> None:
    body = {"model": "plain", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    (exact,) = post(f"{gateway}/v1/completions", json=body).json()["choices"]
    with running(app_of(stub_of(network, max_logprobs=20))) as url:
        with pytest.raises(ConfigError, match=r"greater than max.*--max-logprobs 21"):
            gateway_to(url, adapters / "plain", top=21)
        with running(create_app(gateway_to(url, adapters / "plain", top=5))) as there:
            (choice,) = post(f"{there}/v1/completions", json=body).json()["choices"]
            refusal = post(f"{there}/v1/completions", json={**body, "logprobs": 2})
            assert (refusal.status_code, refusal.json()["error"]["param"]) == (422, "logprobs")
            assert "--top-logprobs -1" in refusal.text
            scored = post(f"{there}/v1/completions", json={**body, "logprobs": 0}).json()
    assert choice["text"] == exact["text"]
    about, full = choice["uncertainty"], exact["uncertainty"]
    assert about["top_logprobs"] == 5
    assert 0 < about["covered"] < 1
    assert "covered" not in full
    for token, whole_token in zip(about["tokens"], full["tokens"], strict=True):
        for name in ("entropy", "aleatoric", "epistemic"):
            assert 0 <= token[name] <= whole_token[name] + 1e-5
    assert 0.3 * full["entropy"] < about["entropy"] < 0.999 * full["entropy"]
    assert about["agreement"] == full["agreement"]
    logprobs = scored["choices"][0]["logprobs"]["token_logprobs"]
    with_all = post(f"{gateway}/v1/completions", json={**body, "logprobs": 0}).json()
    assert logprobs == pytest.approx(with_all["choices"][0]["logprobs"]["token_logprobs"], abs=1e-5)


def test_coarse_scores_of_all_tokens_are_the_whole_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 9, generator=generator).log_softmax(-1)
    logits[1, 2, 5] = -math.inf
    ids = [1, 8, 3, 0]
    places = [[dict(enumerate(row.log_softmax(-1).tolist())) for row in draw] for draw in logits]
    draw = torch.arange(3)
    one = generation([ids], [whole(places, ids, 9)], draw[:1], 1.0)
    other = generation([ids], [coarse(places, ids)], draw[:1], 1.0)
    probs = logits.softmax(-1)
    entropy = -torch.special.xlogy(probs.mean(0), probs.mean(0)).sum(-1)
    aleatoric = -torch.special.xlogy(probs, probs).sum(-1).mean(0)
    for made in (one, other):
        torch.testing.assert_close(made.entropy[0, 0], entropy)
        torch.testing.assert_close(made.aleatoric[0, 0], aleatoric)
        likelihood = logits.log_softmax(-1)[:, range(4), ids].sum(-1)
        torch.testing.assert_close(made.log_likelihood[:, 0, 0], likelihood)


# The start --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("confused", "words"),
    [
        ({1: "base"}, "as its base model.*match none of its layers"),
        ({1: 0}, "give the same scores.*no uncertainty"),
        ({0: 1, 1: 0}, r"scores like .*draw-1.*rather than like the exported draw"),
        ({"base": 0}, "not the one that 'plain' was fitted on|as its base model"),
    ],
    ids=["no key matches", "two are one", "swapped", "the base is merged"],
)
def test_draws_that_are_not_served_are_seen_at_the_start(
    adapters: Path, network: Any, confused: dict[Any, Any], words: str
) -> None:
    names = [adapter.name for adapter in read_exported(adapters / "plain").adapters]

    def name(one: Any) -> str:
        return one if one == "base" else names[one]

    stub = stub_of(network, confused={name(a): name(b) for a, b in confused.items()})
    with running(app_of(stub)) as url, pytest.raises(ConfigError, match=f"(?s){words}"):
        gateway_to(url, adapters / "plain")


def test_adapters_whose_names_match_nothing_are_seen_at_the_start(
    adapters: Path, network: Any, tmp_path: Path
) -> None:
    """PEFT, like vLLM, takes such a file and adapts nothing."""
    from safetensors.torch import load_file, save_file

    posterior = read_exported(adapters / "plain")
    stub = stub_of(network)
    for adapter in posterior.adapters:
        folder = tmp_path / adapter.name
        shutil.copytree(posterior.path / adapter.name, folder)
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        save_file({n.replace("layers", "blocks"): t for n, t in tensors.items()}, file)
        with warnings.catch_warnings():  # PEFT's, of the first; vLLM has none
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            stub.load(adapter.name, str(folder))
    with (
        running(app_of(stub)) as url,
        pytest.raises(ConfigError, match="match none of its layers"),
    ):
        gateway_to(url, adapters / "plain")


def test_another_base_model_is_seen_at_the_start(adapters: Path) -> None:
    other = llama(seed=5, initializer_range=0.5)
    stub = stub_of(lambda: other)
    with running(app_of(stub)) as url, pytest.raises(ConfigError, match="nats per token"):
        gateway_to(url, adapters / "plain")


def test_an_engine_that_lets_nobody_load_is_told_how_to_start(adapters: Path, network: Any) -> None:
    posterior = read_exported(adapters / "plain")
    stub = stub_of(network, runtime=False)
    with running(app_of(stub)) as url:
        with pytest.raises(ConfigError) as raised:
            gateway_to(url, adapters / "plain")
        line = serve_line("base", [posterior], ALL)
        assert line in str(raised.value)
        assert "--lora-target-modules k_proj q_proj v_proj " in line
        for words in ("--enable-lora", "--max-lora-rank 8", "--max-loras 3", "--max-logprobs -1"):
            assert words in line
        for module in line.split("--lora-modules ")[1].split():  # as vllm serve reads them
            stub.load(*module.split("=", 1))
        gateway_to(url, adapters / "plain")


def test_an_engine_that_is_not_there(adapters: Path) -> None:
    with pytest.raises(EngineGoneError, match="does not answer"):
        gateway_to("http://127.0.0.1:9", adapters / "plain")


# Requests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [
        ({"model": "nobody"}, 404, "'plain'"),
        ({"num_samples": 0}, 422, "no mean adapter"),
        ({"num_samples": 5}, 422, "serves 3 draws"),
        ({"draws": [2]}, 422, "[0, 1, 3]"),
        ({"draws": [0, 0]}, 422, "another one"),
        ({"draws": [0], "num_samples": 1}, 422, "give one of them"),
        ({"seed": 3}, 422, "leave it out"),
        ({"max_tokens": 29}, 413, "takes 31"),
        ({"max_tokens": 10**6}, 422, "allows 512"),
        ({"n": 5}, 422, "5 choices"),
        ({"n": 17, "temperature": 1}, 422, "allows 16"),
        ({"prompt": "a " * 40}, 413, "the network takes 31"),
    ],
    ids=str,
)
def test_what_cannot_be_obeyed_is_refused(
    gateway: str, more: dict[str, Any], status: int, words: str
) -> None:
    body = {"model": "plain", "prompt": PROMPT, "max_tokens": 4, "temperature": 0, **more}
    answer = post(f"{gateway}/v1/completions", json=body)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]


def test_classes_and_typical_p_are_refused_by_name(gateway: str) -> None:
    answer = post(f"{gateway}/classify", json={"inputs": PROMPT})
    assert answer.status_code == 422
    assert "written" not in answer.json()["error"]
    assert "without --engine" in answer.json()["error"]
    body = {"inputs": PROMPT, "parameters": {"typical_p": 0.5}}
    answer = post(f"{gateway}/generate", json=body)
    assert answer.status_code == 422
    assert "typical_p: vLLM has none" in answer.json()["error"]


def test_its_page_says_what_it_is(gateway: str) -> None:
    info = get(f"{gateway}/info").json()
    assert (info["engine"], info["draws"]) == ("vllm", {"plain": 3})
    assert get(f"{gateway}/v1/models/plain").json()["writes"] is True
    assert get(f"{gateway}/health").status_code == 200
    assert "pyrolora_queue_length 0.0" in get(f"{gateway}/metrics").text


def test_engines_that_fail_and_clients_that_go(
    adapters: Path, network: Any, caplog: pytest.LogCaptureFixture
) -> None:
    stub = stub_of(network)
    body = {"model": "plain", "prompt": PROMPT, "max_tokens": 2, "temperature": 0}
    limits = Limits(queue=2, timeout=5)
    with running(app_of(stub)) as url:
        made = gateway_to(url, adapters / "plain", limits)
        with running(create_app(made)) as there:
            ask = f"{there}/v1/completions"
            assert post(ask, json={**body, "prompt": [PROMPT] * 3}).status_code == 429
            stub.delay = 2.0
            with pytest.raises(httpx.ReadTimeout):
                post(ask, json=body, timeout=0.3)
            stub.delay = 0.0
            assert post(ask, json=body).status_code == 200
            assert "pyrolora_queue_length 0.0" in get(f"{there}/metrics").text
            forgotten = stub.loaded.popitem()
            answer = post(ask, json=body)
            assert answer.status_code == 502
            assert "with status 404; the gateway's log" in answer.json()["error"]["message"]
            assert forgotten[0] not in answer.text
            assert f"{forgotten[0]}` does not exist" in caplog.text
        engine = made.engine
    answer_of_none = asyncio.run(_refusal(engine))
    assert answer_of_none.status == 503
    assert url not in str(answer_of_none)


async def _refusal(engine: Engine) -> EngineGoneError:
    with pytest.raises(EngineGoneError) as raised:
        await engine.models()
    await engine.close()
    return raised.value


def test_late_answers_are_given_up(adapters: Path, network: Any) -> None:
    stub = stub_of(network)
    with running(app_of(stub)) as url:
        made = gateway_to(url, adapters / "plain", Limits(timeout=0.2))
        stub.delay = 1.0
        with running(create_app(made)) as there:
            body = {"model": "plain", "prompt": PROMPT, "max_tokens": 2, "temperature": 0}
            assert post(f"{there}/v1/completions", json=body).status_code == 504


# The export -------------------------------------------------------------------------------------


def test_names_are_of_the_content(writers: Any, adapters: Path, tmp_path: Path) -> None:
    plain, chat = (
        pyrolora.load(writers.directory / name, writers.base) for name in ("plain", "chat")
    )
    first = [adapter.name for adapter in read_exported(adapters / "plain").adapters]
    assert export_vllm(plain, tmp_path / "again", [3, 0], name="plain") == [first[2], first[0]]
    other = export_vllm(chat, tmp_path / "chat", [0], name="plain")
    assert other[0].startswith("plain-draw-0-")
    assert other[0] != first[0]
    strange = export_vllm(plain, tmp_path / "a b=c", [0])
    assert strange[0].startswith("a-b-c-draw-0-")
    config = json.loads((adapters / "plain" / first[0] / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    assert not any(config[k] for k in ("rank_pattern", "alpha_pattern", "modules_to_save"))


def test_what_vllm_does_not_serve_is_refused_by_name(writers: Any, tmp_path: Path) -> None:
    settings = {"adapter": AdapterConfig(r=1), "epochs": 1, "batch_size": 8}
    classifier = pyrolora.fit(bert(), reviews(8), "map", tokenizer=tokenizer(), **settings)
    with pytest.raises(ConfigError, match="task 'classification'"):
        export_vllm(classifier, tmp_path / "x", [0])
    plain = pyrolora.load(writers.directory / "plain", writers.base)
    with pytest.raises(ConfigError, match="exists"):
        export_vllm(plain, writers.base)
    plain.tokenizer = None
    with pytest.raises(ConfigError, match="no tokenizer"):
        export_vllm(plain, tmp_path / "x", [0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda meta: meta.update(temperature=2.0), "was changed since"),
        (lambda meta: meta.pop("probe"), "has no 'probe'"),
        (lambda meta: meta["adapters"][0].update(name="../x"), "of the form"),
        (lambda meta: meta.update(format_version=2), "must be 1"),
    ],
)
def test_an_edited_description_is_refused(
    adapters: Path, tmp_path: Path, edit: Any, words: str
) -> None:
    shutil.copytree(adapters / "plain", tmp_path / "plain")
    file = tmp_path / "plain" / "vllm.json"
    meta = json.loads(file.read_text())
    edit(meta)
    file.write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match=words):
        read_exported(tmp_path / "plain")


def test_a_damaged_adapter_is_refused(adapters: Path, tmp_path: Path) -> None:
    shutil.copytree(adapters / "plain", tmp_path / "plain")
    name = read_exported(tmp_path / "plain").adapters[2].name
    file = tmp_path / "plain" / name / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is not the one that was written"):
        read_exported(tmp_path / "plain")
    shutil.rmtree(file.parent)
    with pytest.raises(CheckpointError):
        read_exported(tmp_path / "plain")


# The commands -----------------------------------------------------------------------------------


def test_from_a_run_to_an_answer_by_the_commands(
    writers: Any, network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "")
    folder = tmp_path / "adapters" / "books"
    said = pyrolora_(
        *("export", writers.directory / "plain", folder, "--to", "vllm", "--draws", "0,1"),
        *("--model", writers.base),
    )
    assert said.code == 0, said.err
    assert "--lora-modules books-draw-0-" in said.out
    assert "pyrolora serve" in said.out
    answers: list[Any] = []

    def ask(service: Any, **_: Any) -> None:
        with running(create_app(service)) as url:
            body = {"model": "books", "prompt": PROMPT, "temperature": 0}
            answers.append(post(f"{url}/v1/completions", json=body).json())

    monkeypatch.setattr(run, "run", ask)
    with running(app_of(stub_of(network, key="secret", max_logprobs=20))) as url:
        command = ["serve", folder.parent, "--engine", "vllm", "--url", url]
        refused(pyrolora_(*command), "Unauthorized")
        monkeypatch.setenv("VLLM_API_KEY", "secret")
        result = pyrolora_(*command)
        assert result.code == 0, result.err
        refused(pyrolora_(*command, "--num-samples", 3), "2 exported draws")
        refused(pyrolora_(*command, "--default", "x"), "--default names 'x'")
    assert answers[0]["choices"][0]["uncertainty"]["draws"] == [0, 1]
    assert answers[0]["choices"][0]["uncertainty"]["top_logprobs"] == 20


@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_the_commands_that_an_export_prints_serve_its_temperature(
    writers: Any, tmp_path: Path, temperature: float
) -> None:
    posterior = pyrolora.load(writers.directory / "plain", writers.base)
    posterior.temperature = temperature
    posterior.save(tmp_path / "run")
    said = pyrolora_(
        *("export", tmp_path / "run", tmp_path / "adapters" / "books", "--to", "vllm"),
        *("--draws", "0", "--model", writers.base),
    )
    assert said.code == 0, said.err
    printed = " ".join(said.out.split())
    assert ("--max-logprobs -1" in printed) == (temperature != 1)
    assert ("--top-logprobs -1" in printed) == (temperature != 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--engine", "vllm"], "--url is missing"),
        ([], "--model is missing"),
        (["--model", "x", "--url", "http://x"], "--url would do nothing with --engine own"),
        (["--engine", "vllm", "--url", "http://x", "--budget", "1GB"], "--budget would do"),
        (["--engine", "vllm", "--url", "http://x", "--model", "x"], "--model would do nothing"),
        (["--engine", "vllm", "--url", "ftp://x"], "an address such as"),
        (["--engine", "vllm", "--url", "http://x/v1"], "leave /v1 out"),
        (["--engine", "vllm", "--url", "http://x", "--top-logprobs", "0"], "--top-logprobs is -1"),
        (["--engine", "vllm", "--url", "http://127.0.0.1:9"], "does not answer"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(adapters: Path, options: list[str], words: str) -> None:
    refused(pyrolora_("serve", adapters, *options), words)


def test_a_directory_without_exports_is_refused(writers: Any, tmp_path: Path) -> None:
    options = ["--engine", "vllm", "--url", "http://127.0.0.1:9"]
    refused(pyrolora_("serve", writers.directory, *options), "holds no posterior for vLLM")
    refused(pyrolora_("serve", tmp_path / "x", *options), "there is no folder")
