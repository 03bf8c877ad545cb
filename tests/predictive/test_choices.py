"""A language model's choices: by hand from its logits, and as any classification."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import bert_choice, llama, questions, reviews, tokenizer
from tokenizers import processors

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.errors import ConfigError, DataError
from pyrolora.guides import MonteCLoRA
from pyrolora.predictive import Conformal, draw_factors

WIDE = MonteCLoRA(sample_scale=0.5, init_covariance=1.0)
ROWS = [
    {"question": "the film is", "choices": ["good", "not bad", "dull"], "label": 1},
    {"question": "the book", "choices": ["is dull", "good"], "label": 0},
]


@pytest.fixture(scope="module")
def posterior():
    return pyrolora.fit(
        llama(initializer_range=0.4), reviews(24).remove_columns("label"), guide=WIDE,
        epochs=1, seed=0, adapter=AdapterConfig(r=2), tokenizer=tokenizer(),
    )  # fmt: skip


def log_likelihood(posterior, factors, context, choice):
    """Of the choice's words and the end of the text, after the context's words: (S,), and how many
    tokens these are."""
    ids = tokenizer()(f"{context} {choice}")["input_ids"]
    start = len(tokenizer()(context)["input_ids"]) - 1  # the context ends with [SEP]
    with torch.no_grad():
        logits = posterior.model.network({"input_ids": torch.tensor([ids])}, factors)[:, 0]
    own = logits[:, start - 1 : -1].log_softmax(-1)
    picked = own.gather(-1, torch.tensor(ids[start:]).expand(len(own), -1)[..., None])
    return picked.sum((-2, -1)), len(ids) - start


@pytest.mark.parametrize("per_token", [False, True])
def test_probabilities_are_the_softmax_of_the_choices_likelihoods(posterior, per_token):
    factors = draw_factors(posterior.model, 3, 4)
    found = posterior.predict_choices(ROWS, 3, seed=4, per_token=per_token)
    assert found.draws.shape == (3, 2, 3)
    for i, row in enumerate(ROWS):
        pairs = [log_likelihood(posterior, factors, row["question"], c) for c in row["choices"]]
        scores = torch.stack([s / n if per_token else s for s, n in pairs], -1)
        size = len(row["choices"])
        torch.testing.assert_close(found.draws[:, i, :size], scores.softmax(-1))
        assert (found.draws[:, i, size:] == 0).all()
        torch.testing.assert_close(
            found.log_likelihood[:, i], scores.log_softmax(-1)[:, row["label"]]
        )
    assert found.targets.tolist() == [1, 0]


def test_predict_and_evaluate_choose_where_there_are_choices(posterior):
    chosen = posterior.predict_choices(ROWS, 4, seed=0)
    predicted = posterior.predict(ROWS, 4, seed=0)
    torch.testing.assert_close(predicted.draws, chosen.draws)
    assert set(posterior.evaluate(ROWS, 4)) >= {"accuracy", "nll", "ece", "aurc"}
    data = questions(30)
    sets = Conformal(posterior.predict(data, 4, seed=0), 0.9)
    assert sets(posterior.predict(data, 4, seed=0)).shape == (30, 4)


def test_choices_named_as_in_arc_and_without_labels(posterior):
    named = [
        {"question": r["question"], "choices": {"text": r["choices"], "label": [*"ABC"][:n]},
         "label": "ABC"[r["label"]]}
        for r, n in zip(ROWS, (3, 2), strict=True)
    ]  # fmt: skip
    again = posterior.predict(named, 2, seed=0)
    plain = posterior.predict(ROWS, 2, seed=0)
    assert again.targets.tolist() == [1, 0]
    torch.testing.assert_close(again.draws, plain.draws)
    unlabelled = posterior.predict([{k: r[k] for k in ("question", "choices")} for r in ROWS], 2)
    assert unlabelled.targets is unlabelled.log_likelihood is None


def test_training_to_choose_is_seen_in_the_choices():
    """Taught that texts go on with 'good', it chooses 'good'."""
    text = [{"text": "the film good"}, {"text": "the book good"}, {"text": "the plot good"}] * 8
    posterior = pyrolora.fit(
        llama(initializer_range=0.3), text, guide="map", epochs=15, learning_rate=0.05, seed=0,
        adapter=AdapterConfig(r=4), tokenizer=tokenizer(),
    )  # fmt: skip
    rows = [
        {"question": q, "choices": ["bad", "good"], "label": 1} for q in ("the film", "the book")
    ]
    assert posterior.evaluate(rows, 0)["accuracy"] == 1
    assert (posterior.predict(rows, 0).probs[:, 1] > 0.9).all()


def test_a_context_that_is_too_long_is_cut_from_the_left():
    network = llama(initializer_range=0.4, max_position_embeddings=6)
    posterior = pyrolora.fit(
        network, [{"text": "the film"}] * 4, epochs=1, adapter=AdapterConfig(r=1),
        tokenizer=tokenizer(), seed=0,
    )  # fmt: skip
    long = [{"question": "the " * 20 + "film is not", "choices": ["good", "dull"]}]
    with torch.no_grad():
        ids = [
            tokenizer()(f"{long[0]['question']} {c}")["input_ids"][-6:] for c in ("good", "dull")
        ]
        factors = draw_factors(posterior.model, 0)
        logits = posterior.model.network({"input_ids": torch.tensor(ids)}, factors)
    own = logits[:, 3:5].log_softmax(-1)  # the choice and the end of the text
    scores = own.gather(-1, torch.tensor(ids)[:, 4:, None]).sum((1, 2))
    with pytest.warns(UserWarning, match="1 of 1 texts have more than 6 tokens"):
        found = posterior.predict(long, 0).probs[0]
    torch.testing.assert_close(found, scores.softmax(-1), rtol=1e-4, atol=1e-5)


def test_a_language_model_does_not_train_on_questions_alone(posterior):
    with pytest.raises(DataError, match=r"choices='letters'.*choices='texts'.*join the"):
        pyrolora.fit(llama(), ROWS, epochs=1, adapter=AdapterConfig(r=1), tokenizer=tokenizer())


def test_arviz_has_what_is_chosen(posterior):
    rows = [*ROWS, *ROWS]
    idata = posterior.to_arviz(4, data=rows, log_likelihood=True, seed=0)
    chosen = posterior.predict_choices(rows, 4, seed=0)
    found = idata["posterior_predictive"]["probs"].to_numpy()[0]
    np.testing.assert_allclose(found, chosen.draws, rtol=1e-4, atol=1e-6)
    assert set(idata["posterior_predictive"]["y"].to_numpy()[0, :, 1]) <= {0, 1}
    scores = idata["log_likelihood"]["y"].to_numpy()[0]
    np.testing.assert_allclose(scores, chosen.log_likelihood, rtol=1e-4, atol=1e-6)
    assert idata["observed_data"]["y"].to_numpy().tolist() == [1, 0, 1, 0]


def test_wrong_choices_are_refused_in_words(posterior):
    with pytest.raises(DataError, match="missing values"):
        posterior.predict([{**ROWS[0], "question": None}, ROWS[1]], 2)
    bare = tokenizer()
    bare.backend_tokenizer.post_processor = processors.Sequence([])
    plain = pyrolora.fit(
        llama(), [{"text": "the film"}] * 4, epochs=1, adapter=AdapterConfig(r=1), tokenizer=bare
    )
    with pytest.raises(DataError, match=r"nothing stands before the choice 'good'"):
        plain.predict([{"question": "", "choices": ["good", "bad film"]}], 2)
    with pytest.raises(DataError, match=r"label of example 1 is 2, and its choices are \[0, 1\]"):
        posterior.predict([ROWS[0], {**ROWS[1], "label": 2}], 2)
    with pytest.raises(DataError, match="adds no token"):
        posterior.predict([{**ROWS[0], "choices": ["good", " "]}], 2)
    with pytest.raises(DataError, match="has no labels"):
        posterior.evaluate([{"question": "the", "choices": ["good", "bad"]}], 2)
    with pytest.raises(ConfigError, match="column 'choices'"):
        posterior.predict_choices([{"text": "the film"}], 2)
    other = pyrolora.fit(
        bert_choice(), questions(8), epochs=1, adapter=AdapterConfig(r=1), tokenizer=tokenizer()
    )
    with pytest.raises(ConfigError, match="the task is 'multiple-choice'"):
        other.predict_choices(questions(4), 2)
