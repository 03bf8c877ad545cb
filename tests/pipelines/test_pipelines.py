"""Pipelines of a posterior: transformers' own on a merged mean, and the posterior's numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from problems import (
    bert,
    bert_labels,
    bert_mlm,
    bert_spans,
    bert_tags,
    llama,
    mask_tokenizer,
    mlp,
    questions,
    reviews,
    several,
    squad,
    summaries,
    t5,
    tagged,
    texts,
    tokenizer,
    writer_tokenizer,
)
from problems import bert_choice as choosing
from transformers import pipeline

import pyrolora
from pyrolora import AdapterConfig, Posterior
from pyrolora.errors import ConfigError, DataError

TEXTS = ["the film was good", "bad", "a very dull book is not fine", "good film"]
GREEDY = {"do_sample": False, "max_new_tokens": 5}
WIDE = pyrolora.guides.MeanField(init_scale=0.3)


def fit(network: Any, data: Any, words: Any, **options: Any) -> Posterior:
    settings = {"adapter": AdapterConfig(r=2), "epochs": 1, "learning_rate": 0.05, "seed": 1}
    return pyrolora.fit(network, data, WIDE, tokenizer=words, **settings, **options)


@pytest.fixture(scope="module")
def classes() -> Posterior:
    return fit(bert(initializer_range=0.3), reviews(16), tokenizer())


@pytest.fixture(scope="module")
def tags() -> Posterior:
    names = {0: "O", 1: "B-X", 2: "I-X"}
    return fit(
        bert_tags(id2label=names, label2id={v: k for k, v in names.items()}),
        tagged(16),
        tokenizer(),
    )


@pytest.fixture(scope="module")
def writer() -> Posterior:
    words = writer_tokenizer()
    words.backend_tokenizer.post_processor = None
    return fit(llama(max_position_embeddings=64, initializer_range=0.3), texts(16), words)


@pytest.fixture(scope="module")
def spans() -> Posterior:
    return fit(bert_spans(initializer_range=0.3), squad(8), tokenizer())


def same(found: Any, expected: Any) -> None:
    """Compare outputs in the keys of transformers'; ours have more."""
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif isinstance(expected, dict):
        for key, value in expected.items():
            same(found[key], value)
    elif isinstance(expected, float) or hasattr(expected, "dtype"):
        assert float(found) == pytest.approx(float(expected), abs=1e-5)
    else:
        assert found == expected


def compare(posterior: Posterior, name: str, inputs: Any, **options: Any) -> None:
    merged, words = posterior.merge(), copy.deepcopy(posterior.tokenizer)
    expected = pipeline(name, model=merged, tokenizer=words)(inputs, **options)
    same(posterior.pipeline(name, num_samples=0)(inputs, **options), expected)


# transformers' own outputs ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": 3},
        {"top_k": 1},
        {"top_k": None, "batch_size": 3},
        {"top_k": None, "function_to_apply": "sigmoid"},
        {"top_k": 2, "function_to_apply": "none"},
    ],
)
def test_classes_are_those_of_the_merged_mean(classes: Posterior, options: dict[str, Any]):
    compare(classes, "text-classification", TEXTS, **options)
    compare(classes, "text-classification", TEXTS[0], **options)
    compare(classes, "text-classification", {"text": "good", "text_pair": "film"}, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"ignore_labels": []},
        {"batch_size": 3},
        {"aggregation_strategy": "simple", "ignore_labels": []},
        {"aggregation_strategy": "first", "batch_size": 2},
        {"aggregation_strategy": "simple", "stride": 4},
    ],
)
@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
def test_tags_are_those_of_the_merged_mean(tags: Posterior, options: dict[str, Any]):
    compare(tags, "token-classification", [*TEXTS, " ".join(["good film"] * 20)], **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": 3},
        {"return_full_text": False},
        {"num_beams": 2, "num_return_sequences": 2, "batch_size": 2},
    ],
)
def test_texts_are_those_of_the_merged_mean(writer: Posterior, options: dict[str, Any]):
    compare(writer, "text-generation", TEXTS, **{**GREEDY, **options})


def test_hidden_words_are_those_of_the_merged_mean():
    posterior = fit(bert_mlm(), texts(16), mask_tokenizer())
    hidden = ["the [MASK] was good", "[MASK] film is [MASK]"]
    compare(posterior, "fill-mask", hidden, top_k=3)
    compare(posterior, "fill-mask", hidden, top_k=3, batch_size=2, targets=["good", "bad"])
    one, two = posterior.pipeline()(hidden, top_k=2)
    assert len({proposal["entropy"] for proposal in one}) == 1
    assert [len(row) for row in two] == [2, 2]
    assert 0 < two[1][0]["epistemic"] < two[1][0]["entropy"]


# The posterior's numbers --------------------------------------------------------------------------


def test_uncertainty_is_that_of_predict(classes: Posterior):
    made = classes.pipeline(draws=[0, 3, 4])
    prediction = classes.predict(TEXTS, draws=[0, 3, 4])
    low, high = prediction.interval()
    for i, labels in enumerate(made(TEXTS, top_k=None, batch_size=2)):
        for label in labels:
            k = int(label["label"].removeprefix("LABEL_"))
            assert label["score"] == pytest.approx(float(prediction.probs[i, k]), abs=1e-5)
            assert label["low"] == pytest.approx(float(low[i, k]), abs=1e-5)
            assert label["high"] == pytest.approx(float(high[i, k]), abs=1e-5)
            for name in ("entropy", "aleatoric", "epistemic"):
                expected = float(getattr(prediction, name)[i])
                assert label[name] == pytest.approx(expected, abs=1e-5)


def test_a_pipeline_answers_with_the_same_functions_at_every_call(classes: Posterior):
    made = classes.pipeline()
    assert made(TEXTS) == made(TEXTS)
    assert classes.pipeline()(TEXTS) == made(TEXTS), "the draws 0, 1, ..."
    same(classes.pipeline(draws=range(32))(TEXTS), made(TEXTS))
    assert classes.pipeline(seed=1)(TEXTS) != made(TEXTS)


def test_data_sets_and_generators_are_read_as_they_come(classes: Posterior):
    made = classes.pipeline(num_samples=2)
    assert list(made(text for text in TEXTS)) == [made(text)[0] for text in TEXTS]


def test_the_temperature_of_the_posterior_holds(classes: Posterior):
    made = classes.pipeline(num_samples=4)
    before = made(TEXTS[0])[0]["score"]
    classes.temperature = 5.0
    try:
        assert made(TEXTS[0])[0]["score"] < before
    finally:
        classes.temperature = 1.0


def test_each_of_several_labels_has_its_own_uncertainty():
    posterior = fit(bert_labels(), several(12), tokenizer())
    compare(posterior, "text-classification", TEXTS, top_k=None)
    prediction = posterior.predict(TEXTS, draws=[0, 1])
    labels = posterior.pipeline(draws=[0, 1])(TEXTS, top_k=None)[0]
    found = {label["label"]: label["entropy"] for label in labels}
    expected = dict(zip(posterior.classes, prediction.label_entropy[0].tolist(), strict=True))
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_score_of_a_regression_is_its_mean():
    data = reviews(12).map(lambda row: {"label": 2.5 * row["label"]})
    posterior = fit(bert(1, problem_type="regression"), data, tokenizer())
    compare(posterior, "text-classification", TEXTS)
    prediction = posterior.predict(TEXTS, draws=[0, 1])
    label = posterior.pipeline(draws=[0, 1])(TEXTS[0])[0]
    assert label["score"] == pytest.approx(float(prediction.mean[0]), abs=1e-5)
    assert label["std"] == pytest.approx(float(prediction.std[0]), abs=1e-5)


def test_tags_have_the_uncertainty_of_their_tokens(tags: Posterior):
    options: dict[str, Any] = {"ignore_labels": []}
    made = tags.pipeline(num_samples=4)
    tokens = made(TEXTS[2], **options)
    assert all(0 < token["epistemic"] < token["entropy"] for token in tokens)
    groups = made(TEXTS[2], aggregation_strategy="simple", **options)
    for group in groups:
        inside = [
            t["entropy"]
            for t in tokens
            if group["start"] <= t["start"] and t["end"] <= group["end"]
        ]
        assert group["entropy"] == pytest.approx(sum(inside) / len(inside), abs=1e-5)
    (split,) = made([TEXTS[2].split()], is_split_into_words=True, **options)
    assert [t["entropy"] for t in split] == pytest.approx([t["entropy"] for t in tokens], abs=1e-5)


def test_classes_of_the_data_are_named():
    names = datasets.ClassLabel(names=["O", "B-X", "I-X"])
    data = tagged(12).cast_column("ner_tags", datasets.List(names))
    posterior = fit(bert_tags(), data, tokenizer())
    assert posterior.classes == ["O", "B-X", "I-X"]
    found = {token["entity"] for token in posterior.pipeline()(TEXTS[2], ignore_labels=[])}
    assert found <= {"O", "B-X", "I-X"}
    assert posterior.base.config.id2label[1] == "LABEL_1", "the network is left as it was"


def test_texts_come_with_the_uncertainty_of_generate(writer: Posterior):
    answers = writer.pipeline(draws=[0, 1, 2])(TEXTS, batch_size=4, **GREEDY)
    generation = writer.generate(TEXTS, draws=[0, 1, 2], **GREEDY)
    for i, (answer,) in enumerate(answers):
        score = generation.log_predictive[i] / generation.num_tokens[i]
        k = int(score.argmax())
        assert answer["generated_text"].startswith(TEXTS[i])
        assert answer["nll"] == pytest.approx(-float(score[k]), abs=1e-4)
        entropy = float(generation.entropy[i, k].nanmean())
        assert answer["entropy"] == pytest.approx(entropy, abs=1e-4)
        assert answer["agreement"] == pytest.approx(float(generation.agreement[i]), abs=1e-4)


def test_the_tokenizer_of_the_posterior_pads_as_before(writer: Posterior):
    side = writer.tokenizer.padding_side
    writer.pipeline()
    assert writer.tokenizer.padding_side == side == "right"


def test_sampled_texts_are_as_many_as_were_asked_for(writer: Posterior):
    made = writer.pipeline(num_samples=3)
    assert len(made(TEXTS[0], max_new_tokens=3, num_return_sequences=2)) == 2
    stopped = made(TEXTS[0], stop_sequence="good", **GREEDY)
    assert set(stopped[0]) >= {"generated_text", "nll", "agreement", "num_tokens"}


def test_a_network_with_a_decoder_of_its_own_writes_apart():
    posterior = fit(t5(), summaries(8), writer_tokenizer())
    made = posterior.pipeline("text2text-generation", num_samples=0)
    answers = made(TEXTS, batch_size=3, max_new_tokens=4)
    expected = posterior.generate(TEXTS, 0, max_new_tokens=4)
    assert [a[0]["generated_text"] for a in answers] == [t[0] for t in expected.texts]
    several_answers = made(TEXTS[0], max_new_tokens=4, num_beams=2, num_return_sequences=2)
    assert len(several_answers) == 2


def test_answers_are_those_of_predict(spans: Posterior):
    rows = [{"question": r["question"], "context": r["context"]} for r in squad(4, seed=5)]
    made = spans.pipeline(draws=[0, 1])
    prediction = spans.predict(rows, draws=[0, 1])
    answers = made(rows, batch_size=2)
    assert [a["answer"] for a in answers] == list(prediction.texts)
    assert [a["score"] for a in answers] == pytest.approx(prediction.probability.tolist(), abs=1e-5)
    for row, answer in zip(rows, answers, strict=True):
        assert row["context"][answer["start"] : answer["end"]] == answer["answer"]
    first = rows[0]
    same(made(question=first["question"], context=first["context"]), answers[0])
    same(made(first), answers[0])
    assert made(datasets.Dataset.from_list(rows)) == made(row for row in rows) == made(rows)
    assert made([]) == []


@pytest.mark.parametrize("inputs", ["text", [{"question": "a"}], {"question": 1, "context": "b"}])
def test_questions_without_a_context_are_refused(spans: Posterior, inputs: Any):
    with pytest.raises(DataError, match="must have a 'question' and a 'context'"):
        spans.pipeline(num_samples=0)(inputs)


# What cannot be had -------------------------------------------------------------------------------


def test_what_a_pipeline_cannot_do_is_named(classes: Posterior, tags: Posterior, spans: Posterior):
    with pytest.raises(ConfigError, match="pipeline is 'text-classification', got 'fill-mask'"):
        classes.pipeline("fill-mask")
    assert classes.pipeline("sentiment-analysis", num_samples=0)("good")
    for posterior, inputs in ((classes, "good"), (tags, "good"), (spans, squad(1)[0])):
        with pytest.raises(ConfigError, match="num_samples belong"):
            posterior.pipeline(num_samples=0)(inputs, num_samples=3)
    with pytest.raises(ConfigError, match="leave out device"):
        classes.pipeline(device=0)
    with pytest.raises(ConfigError, match="draws= names the draws"):
        classes.pipeline(draws=[0], num_samples=2)
    with pytest.raises(ConfigError, match="top_k"):
        spans.pipeline(num_samples=0)(question="a", context="b", top_k=2)
    with pytest.raises(ConfigError, match="batch_size must be"):
        spans.pipeline(num_samples=0)(question="a", context="b", batch_size=0)
    with pytest.raises(ConfigError, match="pass one of"):
        spans.pipeline(num_samples=0)(question="a")


def test_tasks_and_networks_without_a_pipeline_are_named():
    x = torch.randn(8, 4)
    plain = fit(mlp(), (x, torch.arange(8) % 3), None, task="classification")
    with pytest.raises(ConfigError, match="no pipeline with the outputs of the task"):
        plain.pipeline()
    choice = fit(choosing(), questions(8), tokenizer())
    with pytest.raises(ConfigError, match="'multiple-choice' on a BertForMultipleChoice"):
        choice.pipeline()


def test_saving_a_pipeline_saves_the_posterior(classes: Posterior, tmp_path: Path):
    classes.pipeline().save_pretrained(tmp_path)
    again = pyrolora.load(tmp_path, classes.base)
    same(again.pipeline(num_samples=2)(TEXTS), classes.pipeline(num_samples=2)(TEXTS))


@pytest.mark.parametrize("name", ["classes", "tags", "writer", "spans"])
def test_no_inputs_have_no_answers(name: str, request: pytest.FixtureRequest) -> None:
    made = request.getfixturevalue(name).pipeline(num_samples=2)
    assert made([]) == []
    with pytest.raises(ConfigError, match="num_samples belong to"):
        made([], num_samples=3)
