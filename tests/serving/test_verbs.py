"""A row in a batch has the answer that the posterior gives for that row alone."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

import pyrolora
from pyrolora import defaults
from pyrolora.adapters import LaterFactors
from pyrolora.serving.drawn import Drawn
from pyrolora.serving.errors import TooLongError, UnsupportedError
from pyrolora.serving.text import encoded, first_stop, pieces, token_scores
from pyrolora.serving.verbs import Classify, ToWrite, Write, Written, chosen, classified, written

TEXTS = ["the film was good", "bad", "a very very dull book is not fine"]


@pytest.fixture(scope="module")
def classifier(classifiers: Any) -> pyrolora.Posterior:
    return pyrolora.load(classifiers.directory / "reviews", classifiers.base)


@pytest.fixture(scope="module")
def writer(writers: Any) -> pyrolora.Posterior:
    return pyrolora.load(writers.directory / "plain", writers.base)


def wrote(posterior: pyrolora.Posterior, settings: Write, rows: list[Any]) -> list[Written]:
    made = written([ToWrite(posterior, settings, row) for row in rows], Drawn())
    return [one for one in made if one is not None]


@pytest.mark.parametrize("num_samples", [0, 1, 5])
def test_classes_of_a_batch_are_those_of_its_rows(
    classifier: pyrolora.Posterior, num_samples: int
) -> None:
    rows = [encoded(classifier, text) for text in TEXTS]
    settings = Classify(num_samples, seed=7)
    got = classified([(classifier, settings, row) for row in rows], Drawn())
    for text, one in zip(TEXTS, got, strict=True):
        alone = classifier.predict([text], num_samples, seed=7)
        torch.testing.assert_close(one.draws, alone.draws, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.entropy, alone.entropy, atol=1e-5, rtol=1e-5)
        assert one.classes == alone.classes


@pytest.mark.parametrize("num_samples", [0, 4])
@pytest.mark.parametrize("options", [(), (("num_beams", 2),)])
def test_continuations_of_a_batch_are_those_of_its_rows(
    writer: pyrolora.Posterior, num_samples: int, options: Any
) -> None:
    rows = [encoded(writer, text, reserved=6) for text in TEXTS]
    settings = Write(num_samples, seed=3, max_new_tokens=6, options=options)
    for text, one in zip(TEXTS, wrote(writer, settings, rows), strict=True):
        alone = writer.generate(
            [text], num_samples, seed=3, max_new_tokens=6, do_sample=False, **dict(options)
        )
        assert one.generation.texts == alone.texts
        assert one.generation.prompts == alone.prompts
        for name in ("sequences", "mask", "draw"):
            assert torch.equal(getattr(one.generation, name), getattr(alone, name))
        for name in ("entropy", "aleatoric", "log_likelihood"):
            torch.testing.assert_close(
                getattr(one.generation, name),
                getattr(alone, name),
                atol=1e-5,
                rtol=1e-5,
                equal_nan=True,
            )


def test_sampled_texts_are_those_of_the_seed(writer: pyrolora.Posterior) -> None:
    settings = Write(3, seed=5, max_new_tokens=6, sampled=True, options=(("top_k", 0),))
    (one,) = wrote(writer, settings, [encoded(writer, TEXTS[0], reserved=6)])
    alone = writer.generate([TEXTS[0]], 3, seed=5, max_new_tokens=6, do_sample=True, top_k=0)
    assert one.generation.texts == alone.texts


def test_the_greedy_answer_is_what_the_mixture_finds_likeliest(
    writer: pyrolora.Posterior,
) -> None:
    generation = writer.generate([TEXTS[0]], 6, seed=3, max_new_tokens=6)
    order = chosen(generation, 6, sampled=False)
    scores = (generation.log_predictive / generation.num_tokens)[0][order]
    assert torch.equal(scores, scores.sort(descending=True).values)


def test_sampled_choices_are_of_draws_in_turn(writer: pyrolora.Posterior) -> None:
    generation = writer.generate(
        [TEXTS[0]], 3, seed=3, max_new_tokens=4, do_sample=True, num_return_sequences=2
    )
    order = chosen(generation, 4, sampled=True)
    assert generation.draw[order].tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("num_samples", [0, 1, 4])
def test_scores_of_tokens_are_those_of_the_mixture(
    writer: pyrolora.Posterior, num_samples: int
) -> None:
    row = encoded(writer, TEXTS[0], reserved=6)
    settings = Write(num_samples, seed=3, max_new_tokens=6, choices=2, alternatives=3)
    if num_samples < 2:
        settings = Write(num_samples, seed=3, max_new_tokens=6, alternatives=3)
    (one,) = wrote(writer, settings, [row])
    assert one.scores is not None
    assert len(one.scores) == len(one.order)
    for k, scores in zip(one.order, one.scores, strict=True):
        ids = one.generation.sequences[0, k][one.generation.mask[0, k]]
        assert scores.ids.shape == scores.scores.shape == (len(ids), 3)
        assert (scores.chosen <= scores.scores[:, 0] + 1e-6).all()
        if num_samples < 2:  # of one draw the tokens' scores sum to that of the text
            total = one.generation.log_likelihood[0, 0, k]
            torch.testing.assert_close(scores.chosen.sum(), total, atol=1e-4, rtol=1e-4)


def test_scores_have_the_temperature_of_the_posterior(writers: Any) -> None:
    posterior = pyrolora.load(writers.directory / "plain", writers.base)
    posterior.temperature = 2.0
    ids = encoded(posterior, TEXTS[0], reserved=6)["input_ids"]
    generation = posterior.generate([TEXTS[0]], 1, seed=3, max_new_tokens=5)
    new = generation.sequences[0, 0][generation.mask[0, 0]]
    factors = posterior.predictor.factors(1, 3, None)
    (scores,) = token_scores(posterior, ids, [new], factors, alternatives=1)
    total = generation.log_likelihood[0, 0, 0]
    torch.testing.assert_close(scores.chosen.sum(), total, atol=1e-4, rtol=1e-4)


def test_a_text_above_the_limit_is_refused_with_the_limit(
    classifier: pyrolora.Posterior, writer: pyrolora.Posterior
) -> None:
    with pytest.raises(TooLongError, match=r"42 tokens, and the network takes 32"):
        encoded(classifier, "good " * 40)
    with pytest.raises(TooLongError, match="30 are to be written"):
        encoded(writer, "good film", reserved=30)


def test_a_posterior_without_tokenizer_reads_no_text() -> None:
    from problems import bert, tokens

    posterior = pyrolora.fit(bert(), tokens(8), epochs=1)
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        encoded(posterior, "good")


def test_pieces_make_the_text(writer: pyrolora.Posterior) -> None:
    generation = writer.generate([TEXTS[0]], 6, seed=3, max_new_tokens=6)
    assert generation.texts is not None
    for k, text in enumerate(generation.texts[0]):
        ids = generation.sequences[0, k][generation.mask[0, k]].tolist()
        parts = pieces(writer.tokenizer, ids)
        assert len(parts) == len(ids)
        assert "".join(parts) == text


def test_a_character_of_several_tokens_stands_at_its_last() -> None:
    from transformers import AutoTokenizer

    from pyrolora import zoo

    words = AutoTokenizer.from_pretrained(zoo.folder("decoder"))
    text = "naïve 名前 🙂 end"
    ids = words(text, add_special_tokens=False)["input_ids"]
    parts = pieces(words, ids)
    assert "".join(parts) == words.decode(ids)
    assert not any("\ufffd" in part for part in parts)
    assert "" in parts


@pytest.mark.parametrize(
    ("stops", "place"), [([], None), (["x"], None), (["b", "ab"], 0), (["c", "b"], 1)]
)
def test_the_first_stop_counts(stops: list[str], place: int | None) -> None:
    assert first_stop("abcabc", stops) == place


def test_draws_that_are_made_some_at_a_time_are_not_kept(
    classifier: pyrolora.Posterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that sends a new seed with every request fills no memory."""
    monkeypatch.setattr(defaults, "DRAWN_BYTES", 1)
    drawn = Drawn()
    first = drawn.factors(classifier, 3, 0)
    assert isinstance(first, LaterFactors)
    assert torch.equal(drawn.factors(classifier, 3, 0)[1].A, first[1].A)
    drawn.factors(classifier, 2, None, (0, 1))
    assert not drawn._kept


def test_draws_are_kept_within_their_budget(
    classifier: pyrolora.Posterior, classifiers: Any
) -> None:
    drawn = Drawn()
    first = drawn.factors(classifier, 3, 0)
    assert drawn.bytes >= 3 * 4 * classifier.model.program.bank.A_loc.numel()
    drawn.budget = 2 * drawn.bytes
    assert drawn.factors(classifier, 3, 0) is first
    assert torch.equal(first.A, classifier.predictor.factors(3, 0, None).A)
    for seed in (1, 2, 3):
        drawn.factors(classifier, 3, seed)
    assert drawn.bytes <= drawn.budget
    assert drawn.factors(classifier, 3, 0) is not first
    assert drawn.factors(classifier, 10**4, 0).A.shape[0] == 10**4  # too large to be kept
    other = pyrolora.load(classifiers.directory / "other", classifiers.base)
    before = drawn.bytes
    drawn.factors(other, 1, 0)
    assert drawn.bytes != before
    del other
    gc.collect()
    assert all(ref() is classifier for ref, *_ in drawn._kept)
