"""`pyrolora.compare`: rows are the posteriors' own evaluations, differences are paired."""

from __future__ import annotations

import io

import datasets
import numpy as np
import pandas as pd
import pytest
from problems import bert, llama, mlp, reviews, tokenizer, tokens
from rich.console import Console

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.errors import ConfigError, DataError
from pyrolora.report import as_table


def fitted(guide, **options):
    return pyrolora.fit(
        bert(initializer_range=0.3), tokens(24), guide=guide, epochs=3, learning_rate=0.02, seed=0,
        adapter=AdapterConfig(r=2), **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def posteriors():
    return {"plain": fitted("map"), "spread": fitted("montec")}


def test_rows_are_the_evaluations_and_differences_are_paired(posteriors):
    data, outside = tokens(20, seed=3), tokens(10, seed=9, classes=7)  # labels that are no classes
    table = pyrolora.compare(posteriors, data, 4, outside=outside, seed=0)
    assert list(table.index) == ["plain", "spread"]
    losses = {}
    for name, posterior in posteriors.items():
        own = posterior.evaluate(data, 4, outside=outside, seed=0)
        assert "ood_auroc" in own
        for metric, value in own.items():
            assert table.loc[name, metric] == pytest.approx(value, nan_ok=True)
        losses[name] = -posterior.predict(data, 4, seed=0).log_predictive.double().numpy()
    best, worst = sorted(losses, key=lambda name: losses[name].mean())
    difference = losses[worst] - losses[best]
    assert table.loc[best, "nll_difference"] == table.loc[best, "nll_difference_se"] == 0
    assert table.loc[worst, "nll_difference"] == pytest.approx(difference.mean())
    expected = difference.std(ddof=1) / np.sqrt(20)
    assert table.loc[worst, "nll_difference_se"] == pytest.approx(expected)


def test_the_rich_table_has_a_row_a_metric(posteriors):
    table = pyrolora.compare(posteriors, tokens(20, seed=3), 2, seed=0)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(as_table(table, {"nll": "nats; lower is better"}))
    lines = console.export_text().splitlines()
    assert {"plain", "spread"} <= set(lines[1].replace("┃", " ").split())
    (nll,) = [line for line in lines if line.startswith("│ nll ") and "difference" not in line]
    assert f"{table.loc['plain', 'nll']:.3f}" in nll
    assert "nats; lower is better" in nll
    assert any("nll difference" in line for line in lines)


def test_language_models_are_compared_by_text():
    options = {"epochs": 1, "adapter": AdapterConfig(r=1), "tokenizer": tokenizer(), "seed": 0}
    texts = reviews(8).remove_columns("label")
    models = {g: pyrolora.fit(llama(), texts, guide=g, **options) for g in ("map", "montec")}
    table = pyrolora.compare(models, texts.select(range(6)), 2, seed=0)
    assert {"perplexity", "nll_difference"} <= set(table.columns)
    assert table["nll_difference"].min() == 0


def test_networks_that_number_their_classes_differently(posteriors):
    def named(names):
        network = bert(initializer_range=0.3)
        network.config.id2label = dict(enumerate(names))
        network.config.label2id = {name: i for i, name in enumerate(names)}
        return pyrolora.fit(
            network, tokens(8), guide="map", epochs=1, adapter=AdapterConfig(r=1), seed=0
        )

    both = {"up": named(["bad", "good"]), "down": named(["good", "bad"])}
    with pytest.raises(ConfigError, match=r"'up' \{0: 'bad', 1: 'good'\} and 'down'.*are numbers"):
        pyrolora.compare(both, tokens(6))
    names = datasets.ClassLabel(names=["good", "bad"])
    data = tokens(6).cast_column("labels", names)
    table = pyrolora.compare(both, data, 0)
    assert table.loc["down", "nll"] == pytest.approx(both["down"].evaluate(tokens(6), 0)["nll"])
    others = tokens(6).cast_column("labels", datasets.ClassLabel(names=["x", "y"]))
    with pytest.raises(ConfigError, match="number their classes differently"):
        pyrolora.compare(both, others)
    shouted = {"up": both["up"], "loud": named(["BAD", "GOOD"])}  # no word of another order
    assert len(pyrolora.compare(shouted, tokens(6), 0)) == 2
    assert len(pyrolora.compare({"up": both["up"], **posteriors}, tokens(6), 2)) == 3


def test_what_cannot_be_compared_is_refused(posteriors):
    with pytest.raises(ConfigError, match="mapping of names to posteriors"):
        pyrolora.compare(list(posteriors.values()), tokens(4))
    with pytest.raises(ConfigError, match="mapping of names to posteriors"):
        pyrolora.compare({}, tokens(4))
    with pytest.raises(ConfigError, match="'a' is a Sequential"):
        pyrolora.compare({"a": mlp()}, tokens(4))
    other = pyrolora.fit(
        bert(1), tokens(8), guide="map", task="regression", epochs=1,
        adapter=AdapterConfig(r=1),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"different tasks.*classification.*regression"):
        pyrolora.compare({**posteriors, "other": other}, tokens(4))
    with pytest.raises(DataError, match="needs labels"):
        pyrolora.compare(posteriors, tokens(4).remove_columns("labels"), 2)


def test_names_are_shown_as_they_are() -> None:
    """Neither markup nor escape sequences in a name have an effect."""
    frame = pd.DataFrame({"nll": [1.0]}, index=["[red]a[/red]\x1b[31m[link=http://x]"])
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(as_table(frame))
    assert "[red]a[/red]\\x1b[31m[link=http://x]" in console.export_text()


def test_differences_are_those_of_the_metrics_and_say_if_they_are_chance(posteriors):
    data = tokens(40, seed=3)
    table = pyrolora.compare({**posteriors, "again": posteriors["plain"]}, data, 4, seed=0)
    for name in ("accuracy", "nll", "ece", "brier", "aurc"):
        gap = table.loc["spread", f"{name}_difference"] - table.loc["plain", f"{name}_difference"]
        assert gap == pytest.approx(table.loc["spread", name] - table.loc["plain", name])
        columns = [f"{name}{part}" for part in ("", "_se", "_difference", "_more_than_chance")]
        assert table.loc["again", columns].tolist() == table.loc["plain", columns].tolist()
    same = {"one": posteriors["plain"], "two": posteriors["plain"]}
    table = pyrolora.compare(same, data, 4, seed=0)
    assert not table.filter(regex="difference|chance").to_numpy().any()
    single = pyrolora.compare({"plain": posteriors["plain"]}, data, 4, seed=0)
    assert not [name for name in single.columns if "difference" in name]
    assert single.loc["plain", "accuracy_se"] == pytest.approx(table.loc["one", "accuracy_se"])


def test_a_reference_may_be_named(posteriors):
    table = pyrolora.compare(posteriors, tokens(20, seed=3), 4, seed=0, reference="spread")
    other = pyrolora.compare(posteriors, tokens(20, seed=3), 4, seed=0, reference="plain")
    assert table.loc["spread", "brier_difference"] == 0
    turned = -other.loc["spread", "brier_difference"]
    assert table.loc["plain", "brier_difference"] == pytest.approx(turned)
    with pytest.raises(ConfigError, match="one of 'plain', 'spread', got 'montec'"):
        pyrolora.compare(posteriors, tokens(4), reference="montec")


@pytest.mark.filterwarnings("ignore:.* texts have more than 4 tokens")
def test_nats_of_other_tokens_are_not_compared_silently():
    def fit(length):
        texts = pyrolora.TextOptions(max_length=length)
        return pyrolora.fit(
            llama(), reviews(8).remove_columns("label"), guide="map", epochs=1, texts=texts,
            tokenizer=tokenizer(), adapter=AdapterConfig(r=1),
        )  # fmt: skip

    models = {"long": fit(1024), "short": fit(4)}
    with pytest.warns(UserWarning, match=r"'short' counts \d+ tokens in the data, 'long' \d+"):
        pyrolora.compare(models, reviews(6).remove_columns("label"), 0)


def test_the_table_marks_errors_and_chance():
    row = {"nll": 0.5, "nll_se": 0.1, "nll_difference": 0.2, "nll_difference_se": 0.05}
    rows = {"a": {**row, "nll_more_than_chance": False}, "b": {**row, "nll_more_than_chance": True}}
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(as_table(pd.DataFrame.from_dict(rows, orient="index")))
    lines = console.export_text().splitlines()
    (nll,) = [line for line in lines if line.startswith("│ nll ") and "difference" not in line]
    assert nll.count("0.500 ± 0.100") == 2
    (gap,) = [line for line in lines if "nll difference" in line]
    assert [cell.strip() for cell in gap.split("│")[2:4]] == ["0.200 ± 0.050", "0.200 ± 0.050 *"]
    assert any("more than chance" in line for line in lines)


def test_outside_data_of_which_posteriors_see_different_numbers_are_refused():
    """As where one tokenizer leaves nothing of a text to predict."""
    options = {"epochs": 1, "adapter": AdapterConfig(r=1), "tokenizer": tokenizer(), "seed": 0}
    texts = reviews(4).remove_columns("label")
    models = {g: pyrolora.fit(llama(), texts, guide=g, **options) for g in ("map", "montec")}
    whole = models["montec"].predict
    models["montec"].predict = lambda data, *a, **k: whole(
        data if len(data) == 4 else ["the film"] * 2, *a, **k
    )
    with pytest.raises(ConfigError, match="'montec' sees 2 examples in the outside data, 'map' 3"):
        pyrolora.compare(models, texts, 2, outside=["the film"] * 3, seed=0)
