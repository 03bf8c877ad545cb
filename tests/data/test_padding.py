"""Padding changes nothing: scores, predictions and the objective are those of single texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import WORDS, arguments, gpt2, llama, tokenizer
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

import pyrolora
from pyrolora import AdapterConfig

TEXTS = ["the film", "a film is dull and a book was very fine", "not good", "the book is bad"]
SMALL = AdapterConfig(r=2, target_modules="all-linear")


def padding_on(side: str) -> Any:
    made = tokenizer()
    made.padding_side = side
    return made


def gpt2_classifier() -> Any:
    """A decoder whose positions are absolute: what stands left of a text moves it."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": len(WORDS)}
    config = GPT2Config(**sizes, pad_token_id=0, num_labels=3, initializer_range=0.3)
    return GPT2ForSequenceClassification(config).eval()


def xlnet_classifier() -> Any:
    """It classifies by the last position, padding or not."""
    torch.manual_seed(0)
    config = XLNetConfig(
        vocab_size=len(WORDS), d_model=16, n_layer=2, n_head=2, d_inner=32, num_labels=3,
        pad_token_id=0, dropout=0.0, summary_last_dropout=0.0, initializer_range=0.3,
    )  # fmt: skip
    return XLNetForSequenceClassification(config).eval()


def language_model(make: Any, side: str, tmp_path: Any, **changes: Any) -> pyrolora.Posterior:
    return pyrolora.fit(
        make(initializer_range=0.3),
        [{"text": text} for text in TEXTS],
        "map",
        tokenizer=padding_on(side),
        adapter=SMALL,
        training=arguments(tmp_path, **{"max_steps": 1, **changes}),
    )


def of_single_texts(network: Any) -> tuple[Tensor, Tensor]:
    """Each text's log-likelihood after its first token, and how many tokens that are; by hand."""
    scores, counts = [], []
    for text in TEXTS:
        ids = tokenizer()(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            log_probs = network(input_ids=ids).logits.log_softmax(-1)
        scores.append(log_probs[0, :-1].gather(-1, ids[0, 1:, None]).sum())
        counts.append(ids.shape[1] - 1)
    return torch.stack(scores), torch.tensor(counts)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_batch_of_texts_scores_what_its_texts_do(make, side, tmp_path):
    posterior = language_model(make, side, tmp_path)
    expected, counts = of_single_texts(posterior.merge())
    for batch_size in (1, 2, 4):
        found = posterior.predict(TEXTS, 0, batch_size=batch_size)
        assert found.num_tokens.tolist() == counts.tolist()
        torch.testing.assert_close(found.log_likelihood[0], expected, atol=1e-4, rtol=1e-4)
        nll = posterior.evaluate(TEXTS, 0, batch_size=batch_size)["nll"]
        assert nll == pytest.approx(float(-expected.sum() / counts.sum()), rel=1e-4)
    assert posterior.tokenizer.padding_side == side


def test_the_objective_does_not_depend_on_the_side(tmp_path):
    first = [language_model(gpt2, side, tmp_path).history[0] for side in ("left", "right")]
    assert first[0]["log_likelihood"] == pytest.approx(first[1]["log_likelihood"], rel=1e-5)
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-5)


@pytest.mark.parametrize("per_token", [False, True])
def test_choices_do_not_depend_on_the_batch(per_token, tmp_path):
    posterior = language_model(gpt2, "left", tmp_path)
    data = [{"question": text, "choices": ["good", "very dull and not fine"]} for text in TEXTS]
    alone, together = (
        posterior.predict_choices(data, 0, batch_size=size, per_token=per_token).probs
        for size in (1, 8)
    )
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [gpt2_classifier, xlnet_classifier])
def test_classes_do_not_depend_on_the_batch(make, tmp_path):
    network = make()
    targets = ["c_attn"] if make is gpt2_classifier else ["layer_1"]
    posterior = pyrolora.fit(
        network,
        [{"text": text, "label": i % 3} for i, text in enumerate(TEXTS)],
        "map",
        tokenizer=padding_on("left"),
        adapter=AdapterConfig(r=2, target_modules=targets),
        training=arguments(tmp_path, max_steps=1),
    )
    alone, together = (posterior.predict(TEXTS, 0, batch_size=size).probs for size in (1, 4))
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-4)
    assert (alone[0] - alone[1]).abs().max() > 1e-3


def test_of_tensors_that_are_padded_on_the_left_no_token_is_predicted_by_padding(tmp_path):
    posterior = language_model(llama, "right", tmp_path)

    def scored(ids: list[int], mask: list[int]) -> Any:
        return posterior.predict([{"input_ids": ids, "attention_mask": mask}], 0)

    padded, plain = scored([0, 0, 6, 4, 5], [0, 0, 1, 1, 1]), scored([6, 4, 5], [1, 1, 1])
    assert padded.num_tokens.tolist() == plain.num_tokens.tolist() == [2]
    torch.testing.assert_close(padded.log_likelihood, plain.log_likelihood, atol=1e-4, rtol=1e-4)
    batch = {
        "input_ids": torch.tensor([[0, 0, 6, 4, 5]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1]]),
    }
    mask = posterior.task.token_mask(batch)  # as the Pyro pair has it
    assert mask.tolist() == [[False, False, True, True]]
