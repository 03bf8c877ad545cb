"""Generated answers: p_true by hand, and metrics of uncertainties against sklearn's."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from problems import LETTERED, bert, letter_tokenizer, llama, reviews, texts, tokens
from sklearn.metrics import roc_auc_score

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.data.choice_prompts import prompt_of
from pyrolora.errors import ConfigError, DataError
from pyrolora.guides import MonteCLoRA
from pyrolora.predictive.answers import scored_answers, truth_rows

ROWS = [
    {"question": f"{text} film", "answer": ["good", "bad"][i % 2 :]}
    for i, text in enumerate(["the", "a", "good", "bad", "is it", "not the"])
]
PROMPTS = [{"question": row["question"]} for row in ROWS]


@pytest.fixture(scope="module")
def posterior():
    network = llama(vocab_size=len(LETTERED), max_position_embeddings=256, initializer_range=0.4)
    return pyrolora.fit(
        network, texts(16), guide=MonteCLoRA(sample_scale=1.0, init_covariance=1.0), epochs=1,
        seed=0, tokenizer=letter_tokenizer(), adapter=AdapterConfig(r=2),
    )  # fmt: skip


@pytest.fixture(scope="module")
def written(posterior):
    return posterior.generate(PROMPTS, draws=[0, 1, 2], max_new_tokens=2)


def test_p_true_is_that_of_the_letter_by_a_plain_network(posterior, written):
    found = posterior.p_true(written, draws=[0, 3], ideas=2)
    assert found.shape == (2, len(ROWS), 3)
    words, rows = letter_tokenizer(), truth_rows(written, ideas=2)
    assert "Possible answer: " in rows[0]["question"]
    letters = [LETTERED.index(letter) for letter in "AB"]
    for s, draw in enumerate((0, 3)):
        plain = posterior.merge(draw)
        for place in (0, 7, 17):
            text = prompt_of(rows[place]["question"], ["True", "False"])
            with torch.no_grad():
                logits = plain(torch.tensor([words(text)["input_ids"]])).logits[0, -1]
            expected = logits[letters].softmax(-1)[0]
            torch.testing.assert_close(found[s].flatten()[place], expected, atol=1e-5, rtol=1e-4)


def test_the_question_lists_different_ideas_once(written):
    assert written.texts is not None
    row = truth_rows(written, ideas=2)[0]["question"]
    ideas = [*dict.fromkeys(text.strip() for text in written.texts[0])][:2]
    assert row.split("\n")[1 : 2 + len(ideas)] == ["Here are some brainstormed ideas:", *ideas]
    assert "ideas" not in truth_rows(written, ideas=0)[0]["question"]


def test_metrics_are_those_of_the_answers(posterior, written):
    verdicts = iter([True, False, True, True, False, False])
    p_true = posterior.p_true(written, draws=[0, 1])
    semantic = written.semantic_entropy(lambda prompt, a, b: a.split()[:1] == b.split()[:1])
    found = scored_answers(
        written, ROWS, lambda row, text: next(verdicts), semantic=semantic, p_true=p_true
    )
    assert found.accuracy == 0.5
    best = written.log_predictive.argmax(-1).tolist()
    assert found.answers["text"].tolist() == [
        t[k] for t, k in zip(written.texts, best, strict=True)
    ]
    wrong = ~found.answers["correct"]
    names = {"nll", "nll_per_token", "entropy", "epistemic", "lexical", "semantic_entropy"}
    assert {*found.metrics.index} == names | {"semantic_epistemic", "meaning", "p_true"}
    for name, row in found.metrics.iterrows():
        scores = found.answers[name]
        assert row["auroc"] == pytest.approx(roc_auc_score(wrong, scores))
        order = np.argsort(scores.to_numpy(), kind="stable")
        if scores.nunique() == len(scores):
            risk = np.cumsum(wrong.to_numpy()[order]) / np.arange(1, 7)
            assert row["aurc"] == pytest.approx(risk.mean())
        assert np.isnan(row["ece"]) == (name in ("entropy", "epistemic") or "semantic" in name)
    confidence = 1 - found.answers["p_true"]
    bins = (confidence * 15).astype(int)
    gaps = (~wrong - confidence).groupby(bins).sum().abs()
    assert found.metrics.loc["p_true", "ece"] == pytest.approx(gaps.sum() / 6, abs=1e-5)
    assert "accuracy=0.500" in repr(found)


def test_errors_that_few_samples_have_are_unknown_as_elsewhere(written):
    """The AUROC of one right answer among six is unknown in a third of the bootstrap samples."""
    first = [True, *[False] * 5]
    scored = {}
    for name, verdicts in {"some": first, "none": [False] * 6}.items():
        told = [{**row, "right": right} for row, right in zip(ROWS, verdicts, strict=True)]
        scored[name] = scored_answers(written, told, lambda row, text: row["right"]).metrics
    assert scored["some"]["auroc_se"].notna().all()
    assert scored["none"]["auroc_se"].isna().all()
    assert scored["none"]["aurc_se"].eq(0).all()  # a constant has no error


def test_answers_are_generated_and_judged_in_one_call(posterior):
    data = datasets.Dataset.from_list(ROWS)
    options = {"draws": [0, 1], "max_new_tokens": 2}
    same = lambda prompt, a, b: a == b  # noqa: E731
    found = posterior.evaluate_generation(data, "answer", same=same, p_true=True, **options)
    assert len(found.answers) == len(ROWS)
    again = posterior.generate(PROMPTS, **options)
    expected = scored_answers(
        again, ROWS, "answer", semantic=again.semantic_entropy(same),
        p_true=posterior.p_true(again, draws=[0, 1]),
    )  # fmt: skip
    assert found.answers.equals(expected.answers)
    options["draws"] = iter([0, 1])  # which can be read once, and are those of p_true as well
    once = posterior.evaluate_generation(data, "answer", same=same, p_true=True, **options)
    assert once.answers.equals(found.answers)
    plain = posterior.evaluate_generation(
        ROWS, lambda row, text: bool(row["answer"]), 2, prompts=PROMPTS, seed=0, max_new_tokens=1
    )  # fmt: skip
    assert plain.accuracy == 1
    assert plain.metrics["auroc"].isna().all()  # no answer is wrong
    assert "p_true" not in plain.metrics.index


def test_a_right_answer_is_one_of_the_column_but_for_case_and_punctuation(written):
    given = [{"answer": row} for row in (["x", text.upper() + "."] for text, *_ in written.texts)]
    best = written.log_predictive.argmax(-1)
    found = scored_answers(written, given, "answer").answers["correct"]
    assert found[best.numpy() == 0].all()
    assert not scored_answers(written, [{"answer": "x"}] * len(ROWS), "answer").accuracy


def test_what_cannot_be_judged_is_refused(posterior, written):
    with pytest.raises(DataError, match=r"correct='gold' is no column.*'answer', 'question'"):
        posterior.evaluate_generation(ROWS, "gold")
    with pytest.raises(ConfigError, match="correct must be a function"):
        posterior.evaluate_generation(ROWS, 3)
    with pytest.raises(ConfigError, match=r"must return True or False, got 0\.5"):
        scored_answers(written, ROWS, lambda row, text: 0.5)
    with pytest.raises(DataError, match=r"must be a text or a list of texts, got 3"):
        scored_answers(written, [{"answer": 3}] * len(ROWS), "answer")
    with pytest.raises(DataError, match="6 prompts and 2 rows"):
        scored_answers(written, ROWS[:2], "answer")
    classifier = pyrolora.fit(bert(), tokens(8), epochs=1, adapter=AdapterConfig(r=1))
    with pytest.raises(ConfigError):
        classifier.p_true(written)
    with pytest.raises(ConfigError):
        classifier.evaluate_generation(reviews(4), lambda row, text: True)
