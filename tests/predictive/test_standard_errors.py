"""Standard errors of metrics: closed forms, scipy's bootstrap, and coverage by simulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from pyrolora.errors import ConfigError, DataError
from pyrolora.predictive import (
    ClassPrediction,
    MultiLabelPrediction,
    RegressionPrediction,
    TagPrediction,
    TokenPrediction,
    aurc,
    evaluate,
    standard_errors,
)
from pyrolora.predictive.metrics import calibration_error
from pyrolora.predictive.standard_errors import scores

N = 60


def classes(probs, targets, draws=1):
    """A prediction whose draws all give these probabilities."""
    chosen = probs.gather(-1, targets[:, None]).log().T
    return ClassPrediction(targets, chosen.repeat(draws, 1), probs.repeat(draws, 1, 1))


def made(seed=0, n=N, sharp=1.5, lie=1.0):
    """Labels that follow softmax(f), and a prediction of softmax(lie f)."""
    rng = torch.Generator().manual_seed(seed)
    logits = sharp * torch.randn(n, 3, generator=rng)
    targets = torch.multinomial(logits.softmax(-1), 1, generator=rng)[:, 0]
    return classes((lie * logits).softmax(-1), targets)


def test_the_errors_of_means_are_closed_forms():
    prediction = made()
    right = (prediction.predicted == prediction.targets).double().numpy()
    loss = -prediction.log_predictive.double().numpy()
    found = standard_errors(prediction)
    assert found.keys() == evaluate(prediction).keys()
    assert found["accuracy"] == pytest.approx(right.std(ddof=1) / N**0.5)
    assert found["nll"] == pytest.approx(loss.std(ddof=1) / N**0.5, rel=1e-5)


def test_other_errors_are_those_of_scipys_bootstrap():
    prediction = made()
    found = scores(prediction, resamples=300)
    measures = {
        "ece": lambda p: calibration_error(p.probs, p.targets),
        "aurc": aurc,
        "error_auroc": lambda p: evaluate(p)["error_auroc"],
    }
    for name, measure in measures.items():
        expected = stats.bootstrap(
            (np.arange(N),), lambda rows: measure(prediction.select(torch.from_numpy(rows))),  # noqa: B023
            n_resamples=300, vectorized=False, method="percentile",
        ).standard_error  # fmt: skip
        assert found.error(name) == pytest.approx(expected, rel=0.25)  # 4 % each, by chance


def test_the_metrics_are_those_of_evaluate():
    rng = torch.Generator().manual_seed(1)
    y, draws = torch.randn(N, generator=rng), torch.randn(3, N, generator=rng)
    regression = RegressionPrediction(y, torch.zeros(3, N), draws, 0.7)
    probs = torch.rand(3, N, 4, generator=rng)
    labels = (torch.rand(N, 4, generator=rng) < 0.4).long()
    several = MultiLabelPrediction(labels, torch.zeros(3, N), probs)
    for prediction in (made(), regression, several):
        found = scores(prediction, prediction)
        expected = evaluate(prediction, prediction)
        assert list(found.metrics) == list(expected)
        assert found.metrics == pytest.approx(expected)
        assert all(np.isfinite(error) for error in found.errors().values())
    square = (regression.mean - y).square().double()  # rmse by the delta method
    delta = square.std() / N**0.5 / (2 * square.mean().sqrt())
    assert scores(regression, resamples=400).error("rmse") == pytest.approx(float(delta), rel=0.2)


def test_nats_per_token_are_a_ratio_of_sums_over_texts():
    rng = torch.Generator().manual_seed(2)
    counts = torch.randint(1, 30, (N,), generator=rng)
    text = torch.randn(N, generator=rng)  # of which all its tokens have a part
    nats = counts * (3 + 0.4 * text)
    blank = torch.full((N, 1), torch.nan)
    prediction = TokenPrediction(
        torch.zeros(N, 1), -nats[None], entropy=blank, aleatoric=blank, num_tokens=counts
    )
    found = scores(prediction, resamples=400)
    rows = np.random.default_rng(0).integers(0, N, (4000, N))
    again = nats.numpy()[rows].sum(1) / counts.numpy()[rows].sum(1)
    assert found.error("nll") == pytest.approx(again.std(), rel=0.12)
    relative = found.error("perplexity") / found.metrics["perplexity"]
    assert relative == pytest.approx(found.error("nll"), rel=0.2)


def test_tokens_of_a_text_stay_together():
    """Ten copies of each token tell no more than one."""
    one = made(n=40)
    tags = TagPrediction(
        one.targets.repeat_interleave(10), one.log_likelihood.repeat_interleave(10, 1),
        one.draws.repeat_interleave(10, 1), example=torch.arange(40).repeat_interleave(10),
        position=torch.arange(10).repeat(40),
    )  # fmt: skip
    assert standard_errors(tags) == pytest.approx(standard_errors(one), rel=0.02)


def test_examples_of_tags_are_drawn_as_wholes_and_numbered_anew():
    tags = TagPrediction(
        torch.tensor([0, 1, 1, 0, 1, 0]), None, torch.rand(2, 6, 2),
        example=torch.tensor([0, 0, 2, 3, 3, 3]), position=torch.tensor([1, 2, 1, 1, 2, 3]),
    )  # fmt: skip
    again = tags.of_examples(torch.tensor([3, 0, 3]))
    assert again.example.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert again.position.tolist() == [1, 2, 3, 1, 2, 1, 2, 3]
    assert again.draws.equal(tags.draws[:, [3, 4, 5, 0, 1, 3, 4, 5]])


def test_five_examples_that_differ_show_nothing_and_six_do():
    targets = torch.zeros(50, dtype=torch.long)
    sure = torch.tensor([[0.9, 0.1]]).repeat(50, 1)
    for differing in (5, 6):
        worse = sure.clone()
        worse[:differing] = worse[:differing].flip(-1)
        gap = scores(classes(worse, targets)).difference(scores(classes(sure, targets)), "accuracy")
        assert gap.value == pytest.approx(-differing / 50)
        assert gap.high < 0
        assert gap.more_than_chance == (differing == 6)
        assert stats.binomtest(differing, differing).pvalue < 0.05 or differing == 5


@pytest.mark.parametrize("differing", [5, 6])
def test_texts_that_differ_are_counted_whatever_their_lengths(differing):
    """A mean over tokens is a ratio: texts that both tag alike show nothing by their lengths."""
    counts = torch.randint(1, 12, (50,), generator=torch.Generator().manual_seed(0))
    example = torch.arange(50).repeat_interleave(counts)
    position = torch.cat([torch.arange(int(count)) for count in counts])
    targets = torch.zeros(len(example), dtype=torch.long)
    sure = torch.tensor([[0.9, 0.1]]).repeat(len(example), 1)
    worse = torch.where(((example < differing) & (position == 0))[:, None], sure.flip(-1), sure)
    one, two = (
        scores(
            TagPrediction(
                targets, probs[None, :, 0].log(), probs[None], example=example, position=position
            ),
            resamples=2,
        )
        for probs in (worse, sure)
    )
    for name in ("accuracy", "nll", "brier"):
        gap = one.difference(two, name)
        assert gap.low > 0 or gap.high < 0
        assert gap.more_than_chance == (differing == 6)


def test_one_example_has_no_standard_error_and_decides_nothing():
    found = scores(made(n=1))
    assert all(np.isnan(error) for error in found.errors().values())
    gap = found.difference(scores(made(n=1, lie=2.0)), "nll")
    assert np.isnan(gap.error)
    assert not gap.more_than_chance


def test_what_has_no_labels_or_samples_is_refused():
    prediction = made()
    unlabelled = ClassPrediction(None, None, prediction.draws)
    with pytest.raises(DataError, match="needs labels"):
        standard_errors(unlabelled)
    with pytest.raises(ConfigError, match="resamples"):
        standard_errors(prediction, resamples=1)


def coverage(true, pairs, names, **options):
    """Return how often the intervals have the true difference, and how often they leave out 0."""
    found = [[scores(one, **options) for one in pair] for pair in pairs]
    for name in names:
        gaps = [two.difference(one, name) for one, two in found]
        yield (
            np.mean([gap.low <= true <= gap.high for gap in gaps]),
            np.mean([gap.more_than_chance for gap in gaps]),
        )


def pairs_of(count, n, lies):
    for seed in range(count):
        yield tuple(made(seed, n, lie=lie) for lie in lies)


def swapped(seed, n):
    """Two predictions, alike in law: each example gets the one or the other at random."""
    sharp, flat = (made(seed, n, lie=lie).probs for lie in (1.6, 0.7))
    targets = made(seed, n).targets
    heads = torch.rand(n, 1, generator=torch.Generator().manual_seed(seed + 10**6)) < 0.5
    return tuple(classes(torch.where(chosen, sharp, flat), targets) for chosen in (heads, ~heads))


def test_intervals_of_means_cover_no_difference_where_there_is_none():
    """The share of 100 samples has a standard error of 0.022."""
    equal = (swapped(seed, 150) for seed in range(100))
    for covered, clear in coverage(0.0, equal, ("nll", "brier", "accuracy"), resamples=2):
        assert covered > 0.885
        assert clear < 0.115


@pytest.mark.slow
def test_intervals_of_means_cover_the_true_difference():
    true = scores(made(1, 200_000, lie=1.5)).difference(scores(made(1, 200_000)), "nll").value
    [(covered, clear)] = coverage(true, pairs_of(400, 150, (1.0, 1.5)), ["nll"], resamples=2)
    assert 0.92 < covered < 0.98
    assert clear > 0.2


@pytest.mark.slow
def test_intervals_by_bootstrap_cover_too():
    """Between predictions alike in law; and of ECE, where its bias for finite data is small.

    A resample of the bins has noise of its own, which the absolute values do not let cancel: the
    intervals of ECE are wider than they have to be.
    """
    equal = (swapped(seed, 200) for seed in range(300))
    for covered, clear in coverage(0.0, equal, ("ece", "aurc", "error_auroc")):
        assert covered > 0.91
        assert clear < 0.09
    worse, bad = (scores(made(1, 200_000, lie=lie), resamples=2) for lie in (3.0, 2.0))
    true = worse.difference(bad, "ece").value
    [(covered, clear)] = coverage(true, pairs_of(300, 600, (2.0, 3.0)), ["ece"])
    assert covered > 0.93
    assert clear > 0.9
