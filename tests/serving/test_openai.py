"""OpenAI's own client against a server, unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from problems import bert, reviews, tokenizer
from servers import Shop, running, served

import pyrolora
from pyrolora.serving.app import create_app
from pyrolora.tasks import CausalLM

PROMPT = "the film was"


@pytest.fixture(scope="module")
def client(writing: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{writing.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_posteriors_are_models(client: openai.OpenAI) -> None:
    models = list(client.models.list())
    assert [model.id for model in models] == ["chat", "plain"]
    assert models[0].model_extra == {"task": CausalLM.name, "writes": True}
    assert client.models.retrieve("plain").id == "plain"
    with pytest.raises(openai.NotFoundError, match="there are: 'chat', 'plain'"):
        client.models.retrieve("nobody")


def test_a_greedy_completion_is_that_of_generate(client: openai.OpenAI, writing: Any) -> None:
    got = client.completions.create(
        model="plain", prompt=PROMPT, max_tokens=6, temperature=0, seed=3, logprobs=2
    )
    alone = writing.alone("plain").generate([PROMPT], 8, seed=3, max_new_tokens=6, do_sample=False)
    best = int((alone.log_predictive / alone.num_tokens)[0].argmax())
    (choice,) = got.choices
    assert choice.text == alone.texts[0][best]
    size = int(alone.num_tokens[0, best])
    assert got.usage.completion_tokens == size
    assert got.usage.total_tokens == got.usage.prompt_tokens + size
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == size
    assert all(len(row) == 2 for row in choice.logprobs.top_logprobs)
    for score, row in zip(
        choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
    ):
        assert score <= max(row.values()) + 1e-5
    about = choice.model_extra["uncertainty"]
    assert about["seed"] == 3
    assert about["num_samples"] == 8
    assert len(about["tokens"]) == size
    assert about["agreement"] == pytest.approx(float(alone.agreement[0]), abs=1e-5)


def test_the_number_of_draws_is_a_field_of_its_own(client: openai.OpenAI, writing: Any) -> None:
    got = client.completions.create(
        model="plain", prompt=PROMPT, max_tokens=4, temperature=0, extra_body={"num_samples": 0}
    )
    alone = writing.alone("plain").generate([PROMPT], 0, max_new_tokens=4, do_sample=False)
    assert got.choices[0].text == alone.texts[0][0]
    about = got.choices[0].model_extra["uncertainty"]
    assert about["num_samples"] == 0
    assert about["agreement"] is None
    assert about["epistemic"] == 0
    assert about["continuations"] == []


def test_several_choices_of_several_prompts(client: openai.OpenAI, writing: Any) -> None:
    got = client.completions.create(
        model="plain", prompt=[PROMPT, "bad"], n=10, max_tokens=4, seed=5
    )
    assert [choice.index for choice in got.choices] == list(range(20))
    alone = writing.alone("plain").generate(
        [PROMPT],
        8,
        seed=5,
        max_new_tokens=4,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=2,
    )
    texts = alone.texts[0]
    expected = [*texts[0::2], texts[1], texts[3]]
    assert [choice.text for choice in got.choices[:10]] == expected


def test_greedy_choices_are_of_one_draw_each(client: openai.OpenAI) -> None:
    got = client.completions.create(
        model="plain", prompt=PROMPT, n=3, max_tokens=4, temperature=0, seed=5
    )
    assert len(got.choices) == 3
    with pytest.raises(openai.UnprocessableEntityError, match="more draws"):
        client.completions.create(
            model="plain",
            prompt=PROMPT,
            n=3,
            max_tokens=4,
            temperature=0,
            extra_body={"num_samples": 2},
        )


def test_a_stream_makes_the_same_completion(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "plain",
        "prompt": PROMPT,
        "n": 2,
        "max_tokens": 5,
        "seed": 5,
        "logprobs": 1,
    }
    whole = client.completions.create(**options)
    with client.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ) as stream:
        events = list(stream)
    texts, reasons = ["", ""], [None, None]
    for event in events[:-1]:
        (choice,) = event.choices
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        assert "uncertainty" in choice.model_extra
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert events[-1].choices == []
    assert events[-1].usage == whole.usage


def test_sampled_choices_are_of_the_draws_of_these_numbers(
    client: openai.OpenAI, writing: Any
) -> None:
    got = client.completions.create(
        model="plain", prompt=PROMPT, n=2, max_tokens=5, seed=5, extra_body={"draws": [6, 3]}
    )
    alone = writing.alone("plain").generate(
        [PROMPT], draws=[6, 3], seed=5, max_new_tokens=5, do_sample=True, top_k=0
    )
    assert [choice.text for choice in got.choices] == alone.texts[0]
    assert got.choices[0].uncertainty["draws"] == [6, 3]


def test_a_stop_string_ends_a_completion(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "plain",
        "prompt": PROMPT,
        "max_tokens": 6,
        "temperature": 0,
        "seed": 3,
    }
    whole = client.completions.create(**options).choices[0].text
    word = whole.split()[1]
    got = client.completions.create(**options, stop=[word, "nothing"]).choices[0]
    assert got.text == whole[: whole.find(word)]
    assert got.finish_reason == "stop"


def test_a_chat_is_the_template_and_its_continuation(client: openai.OpenAI, writing: Any) -> None:
    options: dict[str, Any] = {
        "model": "chat",
        "messages": [
            {"role": "system", "content": "the film"},
            {"role": "user", "content": [{"type": "text", "text": "was good"}]},
        ],
        "max_completion_tokens": 5,
        "temperature": 0,
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 2,
    }
    got = client.chat.completions.create(**options)
    alone = writing.alone("chat").generate(
        ["the film was good the"], 8, seed=3, max_new_tokens=5, do_sample=False
    )
    best = int((alone.log_predictive / alone.num_tokens)[0].argmax())
    choice = got.choices[0]
    assert choice.message.content == alone.texts[0][best]
    assert choice.message.role == "assistant"
    scored = choice.logprobs.content
    assert len(scored) == got.usage.completion_tokens
    assert all(len(token.top_logprobs) == 2 for token in scored)
    assert "uncertainty" in choice.model_extra
    with client.chat.completions.create(**options, stream=True) as stream:
        events = list(stream)
    text = "".join(event.choices[0].delta.content or "" for event in events)
    assert text == choice.message.content
    assert events[0].choices[0].delta.role == "assistant"
    assert events[-1].choices[0].finish_reason == choice.finish_reason


def test_a_posterior_without_a_template_says_so(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "good"}]
    with pytest.raises(openai.UnprocessableEntityError, match="no chat template"):
        client.chat.completions.create(model="plain", messages=messages)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("logit_bias", {"5": 1}),
        ("best_of", 3),
        ("echo", True),
        ("suffix", "x"),
        ("user", "somebody"),
        ("unheard_of", 1),
        ("temperature", 3),
        ("temperature", 1e-40),
        ("logprobs", 6),
        ("logprobs", True),
        ("n", 0),
        ("n", True),
        ("max_tokens", "3"),
        ("stream", "no"),
        ("stream_options", {"include_usage": True}),
        ("temperature", 1e-320),
        ("stop", ""),
        ("stop", ["a"] * 17),
        ("prompt", [1, 2]),
    ],
)
def test_a_field_is_obeyed_or_refused_by_its_name(
    client: openai.OpenAI, field: str, value: Any
) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match=field) as caught:
        client.completions.create(model="plain", prompt=PROMPT, extra_body={field: value})
    assert caught.value.param == field
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("response_format", {"type": "json_object"}),
        ("top_logprobs", 2),
        ("messages", []),
        ("reasoning_effort", "low"),
    ],
)
def test_a_field_of_a_chat_is_obeyed_or_refused(
    client: openai.OpenAI, field: str, value: Any
) -> None:
    messages: Any = [{"role": "user", "content": "good"}]
    with pytest.raises(openai.UnprocessableEntityError, match=field):
        client.chat.completions.create(model="chat", messages=messages, extra_body={field: value})


def test_values_that_ask_for_nothing_are_taken(client: openai.OpenAI) -> None:
    client.completions.create(
        model="plain",
        prompt=PROMPT,
        max_tokens=1,
        presence_penalty=0,
        frequency_penalty=0.0,
        echo=False,
        best_of=1,
        logit_bias={},
        n=None,
        stream=None,
        stream_options=None,
    )
    chat: dict[str, Any] = dict.fromkeys(("n", "logprobs", "top_logprobs", "stream", "audio"))
    more = dict.fromkeys(("parallel_tool_calls", "reasoning_effort", "verbosity", "functions"))
    client.chat.completions.create(
        model="chat",
        messages=[{"role": "user", "content": "good"}],
        max_tokens=1,
        extra_body={**chat, **more},
    )


def test_alternatives_of_one_text_are_all_there_and_parts_of_characters_have_no_bytes() -> None:
    import torch
    from transformers import AutoTokenizer

    from pyrolora import zoo
    from pyrolora.serving.answers import Continuation
    from pyrolora.serving.openai_answers import Chat, Completion
    from pyrolora.serving.text import TokenScores

    tokenizer = AutoTokenizer.from_pretrained(zoo.folder("decoder"))
    ids = tokenizer("名", add_special_tokens=False)["input_ids"][-2:]
    assert [tokenizer.decode([token]) for token in ids] == ["\ufffd"] * 2
    scores = TokenScores(torch.tensor([-1.0]), torch.tensor([ids]), torch.tensor([[-1.0, -2.0]]))
    one = Continuation("", ids[:1], [""], "length", {}, scores)
    body: Any = SimpleNamespace(model="x")
    found: Any = Completion(body).logprobs(tokenizer, one, range(1))
    assert sorted(found["top_logprobs"][0].values()) == [-2.0, -1.0]
    found = Chat(body).logprobs(tokenizer, one, range(1))
    assert found["content"][0]["bytes"] is None


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there are: 'chat', 'plain'") as caught:
        client.completions.create(model="../plain", prompt=PROMPT)
    assert caught.value.code == "model_not_found"


def test_too_long_a_prompt_is_refused_with_the_limit(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError, match="the network takes 32") as caught:
        client.completions.create(model="plain", prompt="good " * 40)
    assert caught.value.status_code == 413


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [("max_tokens", 9999, "512"), ("n", 99, "16"), ("num_samples", 999, "64")],
)
def test_limits_are_named(client: openai.OpenAI, field: str, value: int, limit: str) -> None:
    body = {"max_tokens": 2, field: value}
    with pytest.raises(openai.UnprocessableEntityError, match=limit) as caught:
        client.completions.create(model="plain", prompt=PROMPT, extra_body=body)
    assert caught.value.param == field


def test_too_many_prompts_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match=r"65 texts.*allows 64"):
        client.completions.create(model="plain", prompt=["good"] * 65, max_tokens=1)


def test_a_regression_is_neither(tmp_path: Any, classifiers: Any) -> None:
    network = bert(num_labels=1)
    data = [{"text": row["text"], "label": float(k)} for k, row in enumerate(reviews(8))]
    pyrolora.fit(network, data, tokenizer=tokenizer(), epochs=1).save(tmp_path / "score")
    with running(create_app(served(Shop(tmp_path, network)))) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with client, pytest.raises(openai.UnprocessableEntityError, match="'regression'"):
            client.completions.create(model="score", prompt="good")
