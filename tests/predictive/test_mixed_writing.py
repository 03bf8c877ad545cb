"""Texts of several posteriors from one pass: each is what its posterior writes alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from problems import WORDS, llama, texts, tokenizer

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.model import Mixture
from pyrolora.predictive import Ask, Generation, NewToken, generate_mixed, mixed, mixed_writing

PROMPTS = ["the film was good", "bad", "a very very dull book is", "fine"]


def fitted(network: Any, guide: Any, rank: int, seed: int) -> pyrolora.Posterior:
    return pyrolora.fit(
        network,
        texts(16, seed=seed),
        guide,
        tokenizer=tokenizer(),
        adapter=AdapterConfig(r=rank, lora_alpha=2 * rank + seed),
        epochs=2,
        learning_rate=0.05,
        batch_size=8,
        seed=seed,
    )


@pytest.fixture(scope="module")
def posteriors() -> list[pyrolora.Posterior]:
    """Guides, ranks, scalings and temperatures that differ, on one network."""
    network = llama(initializer_range=0.5)
    network.generation_config.eos_token_id = WORDS.index("[SEP]")
    several = [
        fitted(network, "meanfield", 2, 0),
        fitted(network, "montec", 4, 1),
        fitted(network, "map", 1, 2),
        fitted(network, pyrolora.guides.Ensemble(members=2), 3, 3),
    ]
    several[1].temperature = 1.7
    return several


def ask(
    posterior: pyrolora.Posterior, prompt: str, num_samples: int, seed: int, **options: Any
) -> Ask:
    predictor = posterior.predictor
    factors, state = predictor.drawn(num_samples, seed, None)
    more = {name: options.pop(name) for name in ("wanted", "follower") if name in options}
    ids = tokenizer()(prompt, add_special_tokens=False)["input_ids"]
    return Ask(predictor, ids, num_samples, seed, None, options, factors, state, **more)


def alone(one: Ask) -> Generation:
    made = one.alone()
    assert made is not None
    return made


def check(got: Generation | None, expected: Generation) -> None:
    assert got is not None
    assert got.texts == expected.texts
    assert got.prompts == expected.prompts
    assert got.tokens == expected.tokens
    for name in ("sequences", "mask", "draw"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    for name in ("log_likelihood", "entropy", "aleatoric"):
        values = getattr(got, name), getattr(expected, name)
        torch.testing.assert_close(*values, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows of the passes in which texts are written."""
    rows: list[int] = []
    original = mixed_writing._pass

    def counted(mixture: Mixture, *args: Any) -> Any:
        rows.append(sum(mixture.sizes))
        return original(mixture, *args)

    monkeypatch.setattr(mixed_writing, "_pass", counted)
    return rows


@pytest.mark.parametrize("rows", [256, 9])
def test_greedy_texts_are_those_of_each_posterior_alone(
    posteriors: list[pyrolora.Posterior], rows: int, passes: list[int]
) -> None:
    asked = [
        ask(posteriors[k % 4], PROMPTS[(k + k // 4) % 4], [3, 2, 1, 4, 0][k % 5], k, **options)
        for k in range(8)
        for options in [{"max_new_tokens": 3 + k}]
    ]
    got = generate_mixed(asked, rows=rows)
    writing = sum(one.draws for one in asked)
    assert sum(passes) == writing
    assert len(passes) == 1 if rows == 256 else max(passes) <= 9
    for one, generation in zip(asked, got, strict=True):
        check(generation, alone(one))


def test_draws_read_texts_of_like_length_without_common_padding(
    posteriors: list[pyrolora.Posterior], monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    run = mixed.mixed_pass

    def seen(shares: Any, batch: Any) -> Any:
        widths.append(batch["input_ids"].shape[1])
        assert batch["attention_mask"].sum(1).max() == widths[-1]
        return run(shares, batch)

    monkeypatch.setattr(mixed, "mixed_pass", seen)
    monkeypatch.setattr("pyrolora.defaults.PREDICT_TOKENS_CPU", 64)
    for several in (posteriors, posteriors[:1]):
        asked = [
            ask(several[k % len(several)], PROMPTS[k % 4], 3, 5, max_new_tokens=2 + 3 * (k % 3))
            for k in range(6)
        ]
        widths.clear()
        for one, generation in zip(asked, generate_mixed(asked), strict=True):
            check(generation, alone(one))
        assert widths == sorted(widths, reverse=True)
        assert len({*widths}) > 2


def test_sampled_texts_are_those_of_their_seeds_whatever_stands_beside(
    posteriors: list[pyrolora.Posterior],
) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"temperature": 2.0, "top_k": 0},
        {"top_k": 3, "top_p": 0.8},
        {"typical_p": 0.6, "num_return_sequences": 3},
        {"temperature": 0.7, "top_k": 0, "num_return_sequences": 2, "max_new_tokens": 11},
    ]
    asked = [
        ask(
            posteriors[k % 4],
            PROMPTS[k % 4],
            [3, 0, 2, 1, 4][k % 5],
            seed,
            **{"do_sample": True, "max_new_tokens": 8, **options[k % 5]},
        )
        for seed in (5, 6)
        for k in range(5)
    ]
    asked.append(ask(posteriors[0], PROMPTS[0], 3, 5, max_new_tokens=8))
    assert {one.company() for one in asked} == {asked[0].company()}
    for one, generation in zip(asked, generate_mixed(asked), strict=True):
        check(generation, alone(one))
    texts_of = [str(generation.texts) for generation in generate_mixed(asked) if generation]
    assert len({*texts_of}) > len(asked) // 2  # or the test could not fail


def test_prompts_with_the_same_draws_share_them(posteriors: list[pyrolora.Posterior]) -> None:
    predictor = posteriors[0].predictor
    factors, state = predictor.drawn(3, 7, None)
    ids = [tokenizer()(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
    options = [
        {"max_new_tokens": 5},
        {"max_new_tokens": 7, "do_sample": True, "num_return_sequences": 2},
        {"max_new_tokens": 6, "do_sample": True, "temperature": 1.5},
        {"max_new_tokens": 2},
    ]
    asked = [
        Ask(predictor, prompt, 3, 7, None, more, factors, state)
        for prompt, more in zip(ids, options, strict=True)
    ]
    for one, generation in zip(asked, generate_mixed(asked), strict=True):
        check(generation, alone(one))


def test_each_text_ends_at_its_own_stop_strings(posteriors: list[pyrolora.Posterior]) -> None:
    plain = [ask(posterior, PROMPTS[0], 2, 5, max_new_tokens=8) for posterior in posteriors]
    written = [
        str(generation.texts[0][0]).split() for generation in map(alone, plain) if generation.texts
    ]
    words = [text[min(2, len(text) - 1)] for text in written]
    asked = [
        ask(posterior, PROMPTS[0], 2, 5, max_new_tokens=8, stop_strings=[word])
        for posterior, word in zip(posteriors, words, strict=True)
    ]
    for one, word, generation in zip(asked, words, generate_mixed(asked), strict=True):
        check(generation, alone(one))
        assert generation is not None
        assert generation.texts is not None
        assert generation.texts[0][0].endswith(word)


def test_draws_by_their_numbers_sample_with_their_seed(
    posteriors: list[pyrolora.Posterior],
) -> None:
    predictor, options = posteriors[0].predictor, {"max_new_tokens": 6, "do_sample": True}
    ids = tokenizer()(PROMPTS[0], add_special_tokens=False)["input_ids"]
    asked = [
        Ask(predictor, ids, 2, seed, (4, 1), options, *predictor.drawn(None, seed, (4, 1)))
        for seed in (1, 2)
    ]
    for one, generation in zip(asked, generate_mixed(asked), strict=True):
        check(generation, alone(one))
        assert generation is not None
        assert generation.draw.tolist() == [4, 1]


def test_beams_and_penalties_are_those_of_the_prompt_alone(
    posteriors: list[pyrolora.Posterior],
) -> None:
    """A penalty counts the tokens before, and padding must not be among them."""
    more: list[dict[str, Any]] = [
        {"repetition_penalty": 1.8},
        {"num_beams": 3},
        {"no_repeat_ngram_size": 2},
        {"min_p": 0.2, "do_sample": True},
        {"min_new_tokens": 4},
    ]
    asked = [
        ask(posteriors[k % 2], prompt, 2, 5, max_new_tokens=6, **options)
        for options in more
        for k, prompt in enumerate(PROMPTS)
    ]
    for one, generation in zip(asked, generate_mixed(asked), strict=True):
        check(generation, alone(one))


def test_draws_that_cannot_share_a_pass_write_alone(
    posteriors: list[pyrolora.Posterior], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mixture, "possible", lambda *_: False)
    asked = [ask(posteriors[k], PROMPTS[k], k, 5, max_new_tokens=5) for k in range(3)]
    for one, generation in zip(asked, generate_mixed(asked), strict=True):
        check(generation, alone(one))


class Told:
    alternatives = 2

    def __init__(self) -> None:
        self.tokens: dict[int, list[NewToken]] = {}

    def __call__(self, continuation: int, token: NewToken) -> None:
        self.tokens.setdefault(continuation, []).append(token)


@pytest.mark.parametrize("num_samples", [0, 1])
def test_a_follower_is_told_of_every_token_with_the_law_of_the_draw(
    posteriors: list[pyrolora.Posterior], num_samples: int
) -> None:
    told = [Told() for _ in posteriors]
    asked = [
        ask(posterior, prompt, num_samples, 5, follower=follower, **options)
        for posterior, prompt, follower in zip(posteriors, PROMPTS, told, strict=True)
        for options in [{"max_new_tokens": 7, "do_sample": True, "num_return_sequences": 2}]
    ]
    beside = ask(posteriors[0], PROMPTS[0], 3, 5, max_new_tokens=7, follower=Told())
    for follower, got in zip(told, generate_mixed([*asked, beside]), strict=False):
        assert got is not None
        for k in range(2):
            tokens = follower.tokens[k]
            counted = got.mask[0, k]
            assert [token.id for token in tokens] == got.sequences[0, k][counted].tolist()
            assert [token.last for token in tokens] == [False] * (len(tokens) - 1) + [True]
            entropy = torch.tensor([token.entropy for token in tokens])
            torch.testing.assert_close(entropy, got.entropy[0, k][counted], atol=1e-5, rtol=1e-5)
            total = sum(token.logprob for token in tokens)
            assert total == pytest.approx(float(got.log_likelihood[0, 0, k]), abs=1e-4)
            assert all(token.logprobs[0] >= token.logprob - 1e-6 for token in tokens)
            assert all(len(token.ids) == 2 for token in tokens)
    assert beside.follower.tokens == {}  # type: ignore[union-attr]


def test_another_thread_sees_no_temperature(posteriors: list[pyrolora.Posterior]) -> None:
    """It predicts on the network whose logits the pass tempers and follows."""
    warm, other = posteriors[1], posteriors[0]
    assert warm.temperature != 1
    assert other.temperature == 1
    read = other.predictor.reader(texts(4, seed=9), need_labels=False)
    factors = other.predictor.factors(2, 5, None)
    here, expected, seen = threading.get_ident(), read(factors), []

    def predict_elsewhere(*_: Any) -> None:
        if threading.get_ident() == here:
            with ThreadPoolExecutor(1) as pool:
                seen.append(pool.submit(read, factors).result())

    told = Told()
    asked = ask(warm, PROMPTS[0], 1, 5, max_new_tokens=3, follower=told)
    plain = alone(asked)
    handle = warm.base.register_forward_hook(predict_elsewhere)
    try:
        check(generate_mixed([asked])[0], plain)
    finally:
        handle.remove()
    entropy = torch.tensor([token.entropy for token in told.tokens[0]])
    torch.testing.assert_close(entropy, plain.entropy[0, 0], atol=1e-5, rtol=1e-5)
    assert len(seen) >= 2
    for got in seen:
        torch.testing.assert_close(got.entropy, expected.entropy, equal_nan=True)
        torch.testing.assert_close(got.log_likelihood, expected.log_likelihood)


def test_a_pass_ends_when_nobody_waits_for_it(posteriors: list[pyrolora.Posterior]) -> None:
    steps: list[int] = []
    left = iter([True] * 3)

    def leaving() -> bool:
        return next(left, False)

    staying = ask(posteriors[1], PROMPTS[1], 2, 5, max_new_tokens=6)
    gone, stayed = generate_mixed(
        [ask(posteriors[0], PROMPTS[0], 2, 5, max_new_tokens=20, wanted=leaving), staying]
    )
    assert gone is None
    check(stayed, alone(staying))
    left = iter([True] * 3)
    handle = posteriors[0].base.register_forward_hook(lambda *_: steps.append(1))
    asked = ask(posteriors[0], PROMPTS[0], 2, 5, max_new_tokens=20, wanted=leaving)
    assert generate_mixed([asked]) == [None]
    handle.remove()
    assert len(steps) < 6
