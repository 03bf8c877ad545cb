"""Labels may be the names of classes: the network then knows them, and so does what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from console import saved
from problems import bert, reviews, tokenizer

import pyrolora
from pyrolora import Posterior
from pyrolora.data import prepare
from pyrolora.data.labels import class_names
from pyrolora.errors import DataError
from pyrolora.tasks import Classification

NAMES = ["good", "bad"]  # of the labels 1 and 0: sorted they are bad, good


def with_labels(labels: Any, n: int = 24, seed: int = 0, column: str = "label") -> Any:
    return reviews(n, seed).remove_columns("label").add_column(column, labels)


def named(n: int = 24, seed: int = 0, names: tuple[str, str] = ("bad", "good")) -> Any:
    """The reviews with strings in place of the labels 0 and 1."""
    labels = [names[label] for label in reviews(n, seed)["label"]]
    return with_labels(labels, n, seed)


def class_label(names: list[str], n: int = 24, seed: int = 0) -> Any:
    """The same names as numbers of a ``ClassLabel``."""
    return named(n, seed).cast_column("label", datasets.ClassLabel(names=names))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network that has no head yet."""
    return saved(bert(initializer_range=0.3).bert, tmp_path_factory.mktemp("encoder"))


def fit(encoder: Path, data: Any, **options: Any) -> Posterior:
    return pyrolora.fit(encoder, data, epochs=2, batch_size=8, learning_rate=0.01, **options)


@pytest.fixture(scope="module")
def posterior(encoder: Path) -> Posterior:
    return fit(encoder, named())


@pytest.fixture(scope="module")
def numbers(encoder: Path) -> Posterior:
    """The same fit on numbers."""
    return fit(encoder, reviews(24))


def same(one: Posterior, other: Posterior) -> bool:
    first, second = one.model.own_state(), other.model.own_state()
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_the_sorted_names_are_the_networks_classes(posterior: Posterior) -> None:
    assert posterior.base.config.id2label == {0: "bad", 1: "good"}
    assert posterior.classes == ["bad", "good"]
    assert posterior.base.config.label2id == {"bad": 0, "good": 1}
    assert posterior.base.config.num_labels == 2


def test_names_are_fitted_as_the_numbers_that_they_stand_for(
    posterior: Posterior, numbers: Posterior
) -> None:
    assert same(posterior, numbers)
    assert numbers.base.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}


@pytest.mark.parametrize("column", ["label", "labels"])
def test_a_list_of_dicts_may_have_names_too(
    column: str, encoder: Path, posterior: Posterior
) -> None:
    rows = [{"text": row["text"], column: row["label"]} for row in named()]
    assert same(fit(encoder, rows), posterior)


def test_three_names_are_three_classes(encoder: Path) -> None:
    data = with_labels(["neutral", "bad", "good"] * 8)
    posterior = fit(encoder, data)
    assert posterior.base.config.id2label == {0: "bad", 1: "good", 2: "neutral"}
    assert posterior.predict(["good film"], 2).draws.shape == (2, 1, 3)
    assert posterior.predict(data, 0).targets.tolist() == [2, 0, 1] * 8


def test_the_names_of_a_class_label_keep_their_order(encoder: Path) -> None:
    posterior = fit(encoder, class_label(NAMES))
    assert posterior.base.config.id2label == {0: "good", 1: "bad"}
    expected = [1 - label for label in reviews(24)["label"]]
    assert posterior.predict(class_label(NAMES), 0).targets.tolist() == expected


def test_a_class_label_keeps_names_that_no_example_has(encoder: Path) -> None:
    data = named().cast_column("label", datasets.ClassLabel(names=["bad", "good", "neutral"]))
    assert fit(encoder, data).base.config.num_labels == 3


FORMS = {
    "strings": lambda: named(10, 1),
    "the same order": lambda: class_label(["bad", "good"], 10, 1),
    "another order": lambda: class_label(["good", "bad"], 10, 1),
    "numbers": lambda: reviews(10, 1),
    "a list": lambda: list(named(10, 1)),
    "in torch format": lambda: class_label(["good", "bad"], 10, 1).with_format("torch"),
    "a dictionary of splits": lambda: datasets.DatasetDict(test=named(10, 1)),
}


@pytest.mark.parametrize("form", FORMS)
def test_test_data_is_scored_by_the_names_of_its_labels(
    form: str, posterior: Posterior, numbers: Posterior
) -> None:
    prediction = posterior.predict(FORMS[form](), 4, seed=0)
    assert prediction.targets.tolist() == reviews(10, 1)["label"][:]
    expected = numbers.evaluate(reviews(10, 1), 4, seed=0)
    assert posterior.evaluate(FORMS[form](), 4, seed=0) == pytest.approx(expected, nan_ok=True)
    assert 0 < expected["accuracy"] < 1, "the test says nothing about the order"


def test_a_posterior_that_was_loaded_knows_the_names(
    posterior: Posterior, encoder: Path, tmp_path: Path
) -> None:
    posterior.save(tmp_path / "run")
    expected = posterior.evaluate(named(10, 1), 4, seed=0)
    for model in (None, encoder):
        loaded = pyrolora.load(tmp_path / "run", model)
        assert loaded.base.config.id2label == {0: "bad", 1: "good"}
        assert loaded.base.config.label2id == {"bad": 0, "good": 1}
        for data in (named(10, 1), class_label(["good", "bad"], 10, 1)):
            assert loaded.evaluate(data, 4, seed=0) == pytest.approx(expected)


def test_a_merged_model_knows_the_names(posterior: Posterior, tmp_path: Path) -> None:
    posterior.merge().save_pretrained(tmp_path)
    assert type(posterior.base).from_pretrained(tmp_path).config.id2label == {0: "bad", 1: "good"}


def test_evaluation_data_during_the_fit_may_have_another_order(encoder: Path) -> None:
    def scores(data: Any) -> list[float]:
        history = fit(encoder, named(), eval_data=data, seed=0).history
        return [entry["eval_nll"] for entry in history if "eval_nll" in entry]

    assert scores(class_label(["good", "bad"], 10, 1)) == scores(named(10, 1))


def test_a_network_that_has_names_counts_by_them() -> None:
    """One that is passed as an object, whose order is its own."""
    network = bert(id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1})
    for data in (named(), class_label(["bad", "good"]), class_label(["good", "bad"])):
        prepared = prepare(data, network, Classification(), tokenizer())
        assert prepared.labels is not None
        assert prepared.labels.tolist() == [1 - label for label in reviews(24)["label"]]


def test_numbers_are_left_alone_whatever_the_networks_names() -> None:
    network = bert(id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1})
    prepared = prepare(reviews(24), network, Classification(), tokenizer())
    assert prepared.labels is not None
    assert prepared.labels.tolist() == reviews(24)["label"][:]


@pytest.mark.parametrize("names", [["bad", "good"], ["neg", "good"]])
def test_a_class_label_of_other_names_has_two_readings(names: list[str]) -> None:
    network = bert(id2label={0: "neg", 1: "pos"}, label2id={"neg": 0, "pos": 1})
    data = reviews(24).cast_column("label", datasets.ClassLabel(names=names))
    with pytest.raises(DataError, match=r"none of the network's.*By number.*by name.*id2label="):
        prepare(data, network, Classification(), tokenizer())


@pytest.mark.parametrize("names", [["0", "1"], ["LABEL_0", "LABEL_1"]])
def test_names_that_are_the_numbers_say_the_numbers(names: list[str]) -> None:
    network = bert(id2label={0: "neg", 1: "pos"}, label2id={"neg": 0, "pos": 1})
    data = reviews(24).cast_column("label", datasets.ClassLabel(names=names))
    prepared = prepare(data, network, Classification(), tokenizer())
    assert prepared.labels is not None
    assert prepared.labels.tolist() == reviews(24)["label"][:]


@pytest.mark.parametrize("names", [["GOOD", "BAD"], ["Good ", "b-a_d"]])
def test_names_are_the_same_up_to_case_and_signs(names: list[str]) -> None:
    network = bert(id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    strings = [names[1 - label] for label in reviews(24)["label"]]
    data = with_labels(strings)
    for form in (data, data.cast_column("label", datasets.ClassLabel(names=names))):
        prepared = prepare(form, network, Classification(), tokenizer())
        assert prepared.labels is not None
        assert prepared.labels.tolist() == reviews(24)["label"][:]


def test_true_and_false_go_by_the_networks_names_or_are_1_and_0() -> None:
    data = with_labels([bool(label) for label in reviews(24)["label"]])
    turned = bert(id2label={0: "TRUE", 1: "FALSE"}, label2id={"TRUE": 0, "FALSE": 1})
    other = bert(id2label={0: "neg", 1: "pos"}, label2id={"neg": 0, "pos": 1})
    answers = bert(id2label={0: "Yes", 1: "No"}, label2id={"Yes": 0, "No": 1})
    for network, expected in ((turned, 0), (answers, 0), (other, 1), (bert(), 1)):
        prepared = prepare(data, network, Classification(), tokenizer())
        assert prepared.labels is not None
        found = [label == expected for label in prepared.labels.tolist()]
        assert found == [bool(label) for label in reviews(24)["label"]]


def test_two_tables_of_names_that_disagree_are_told() -> None:
    network = bert(id2label={0: "bad", 1: "good"}, label2id={"bad": 1, "good": 0})
    with pytest.raises(DataError, match=r"id2label=.*label2id=.*disagree"):
        prepare(class_label(NAMES), network, Classification(), tokenizer())
    with pytest.raises(DataError, match="disagree"):
        prepare(class_label(["bad", "good"]), network, Classification(), tokenizer())


def test_numbers_that_are_names_of_other_classes_have_two_readings() -> None:
    stars = bert(id2label={0: "1", 1: "2", 2: "3"}, label2id={"1": 0, "2": 1, "3": 2}, num_labels=3)
    with pytest.raises(DataError, match="the number of a class or its name"):
        prepare(with_labels([1, 2] * 12), stars, Classification(), tokenizer())
    prepared = prepare(with_labels([0, 2] * 12), stars, Classification(), tokenizer())
    assert prepared.labels is not None
    assert prepared.labels.tolist() == [0, 2] * 12  # 0 is no name


# A network without names that is fitted on classes with names ---------------------------------


@pytest.fixture(scope="module")
def unnamed() -> Posterior:
    network = bert(initializer_range=0.3)
    options = {"tokenizer": tokenizer(), "epochs": 2, "learning_rate": 0.01, "seed": 0}
    return pyrolora.fit(network, class_label(NAMES), "meanfield", **options)


def test_the_posterior_remembers_the_names_of_its_data(unnamed: Posterior, tmp_path: Path) -> None:
    assert unnamed.classes == NAMES
    assert unnamed.base.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}, "the network is as it was"
    unnamed.save(tmp_path)
    loaded = pyrolora.load(tmp_path, bert(initializer_range=0.3))
    assert loaded.classes == NAMES
    for posterior in (unnamed, loaded):
        loud = named(names=("BAD", "GOOD"))
        loud = loud.cast_column("label", datasets.ClassLabel(names=["BAD", "GOOD"]))
        for data in (class_label(NAMES), class_label(["bad", "good"]), loud, named()):
            expected = [1 - label for label in reviews(24)["label"]]
            assert posterior.predict(data, 0).targets.tolist() == expected
        numbers = posterior.predict(reviews(24), 0).targets
        assert numbers.tolist() == reviews(24)["label"][:]


def test_names_of_the_data_are_in_tables_and_in_what_is_made(unnamed: Posterior) -> None:
    table = unnamed.predict(class_label(["bad", "good"]), 0).to_pandas()
    assert list(table)[:3] == ["prob_good", "prob_bad", "predicted"]
    assert table["target"].tolist() == named()["label"][:]
    assert set(table["predicted"]) <= set(NAMES)
    assert unnamed.merge().config.id2label == {0: "good", 1: "bad"}
    assert unnamed.merge().config.label2id == {"good": 0, "bad": 1}
    drawn = unnamed.to_arviz(4, data=class_label(NAMES))
    assert drawn.posterior_predictive["class"].values.tolist() == NAMES


def test_a_later_fit_goes_by_the_names_of_the_first(unnamed: Posterior) -> None:
    options = {"tokenizer": tokenizer(), "epochs": 1, "seed": 0}
    turned = class_label(["bad", "good"])
    network = bert(initializer_range=0.3)
    for later in (
        pyrolora.fit(unnamed, turned, "laplace"),
        pyrolora.fit(network, turned, prior=unnamed, **options),
    ):
        assert later.classes == NAMES
        expected = [1 - label for label in turned["label"]]
        assert later.predict(turned, 0).targets.tolist() == expected


def test_splits_may_number_the_classes_differently() -> None:
    data = datasets.DatasetDict(
        train=class_label(NAMES), validation=class_label(["bad", "good"], 10, 1)
    )
    same_order = datasets.DatasetDict(
        train=class_label(NAMES), validation=class_label(NAMES, 10, 1)
    )

    def scores(data: Any) -> list[float]:
        fitted = pyrolora.fit(bert(), data, "map", tokenizer=tokenizer(), epochs=1, seed=0)
        return [entry["eval_nll"] for entry in fitted.history if "eval_nll" in entry]

    assert scores(data) == scores(same_order)


def test_a_trained_head_by_name_keeps_its_order(tmp_path: Path) -> None:
    network = bert(id2label={0: "BAD", 1: "GOOD"}, label2id={"BAD": 0, "GOOD": 1})
    folder = saved(network, tmp_path)
    found = fit(folder, class_label(NAMES), guide="map")
    assert found.base.config.id2label == {0: "BAD", 1: "GOOD"}
    assert found.predict(class_label(NAMES), 0).targets.tolist() == reviews(24)["label"][:]
    other = class_label(NAMES).cast_column("label", datasets.ClassLabel(names=["pos", "neg"]))
    with pytest.raises(DataError, match=r"by number they would be.*by name"):
        fit(folder, other, guide="map")


# What cannot be -----------------------------------------------------------------------------------


def test_an_unknown_name_is_named(posterior: Posterior) -> None:
    data = with_labels(["good", "bad", "ugly", "good"], 4)
    with pytest.raises(
        DataError, match=r"'ugly' is none of the network's classes, \['bad', 'good'"
    ):
        posterior.evaluate(data, 2)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda: with_labels(["good"] * 24), id="strings"),
        pytest.param(
            lambda: with_labels([0] * 24).cast_column("label", datasets.ClassLabel(names=["good"])),
            id="class label",
        ),
    ],
)
def test_one_class_is_no_classification(data: Any, encoder: Path) -> None:
    with pytest.raises(DataError, match=r"two classes.*'good'"):
        fit(encoder, data())


def test_a_missing_name_is_a_missing_label(encoder: Path, posterior: Posterior) -> None:
    data = with_labels([None if i in (2, 5) else "good" if i % 2 else "bad" for i in range(24)])
    with pytest.raises(DataError, match="2 examples have no label, the first is example 2"):
        fit(encoder, data)
    with pytest.raises(DataError, match="2 examples have no label, the first is example 2"):
        posterior.evaluate(data, 2)


def test_nothing_but_missing_names_is_said_to_be_missing(encoder: Path) -> None:
    data = with_labels([None] * 24).cast_column("label", datasets.Value("string"))
    with pytest.raises(DataError, match="label"):
        fit(encoder, data)


def test_a_missing_class_label_is_a_missing_label(encoder: Path) -> None:
    labels = [None if i == 3 else i % 2 for i in range(24)]
    data = with_labels(labels).cast_column("label", datasets.ClassLabel(names=["bad", "good"]))
    for order in (["bad", "good"], ["good", "bad"]):
        network = bert(
            id2label=dict(enumerate(order)), label2id={n: i for i, n in enumerate(order)}
        )
        with pytest.raises(DataError, match="1 examples have no label, the first is example 3"):
            prepare(data, network, Classification(), tokenizer())


def test_names_for_a_network_without_names_are_told_to_be_numbered() -> None:
    with pytest.raises(DataError, match="labels must be numbers, got 'bad'; map"):
        prepare(named(), bert(), Classification(), tokenizer())


def test_names_are_no_regression(encoder: Path) -> None:
    with pytest.raises(DataError, match="numbers"):
        fit(encoder, named(), task="regression")


def test_rows_made_on_access_have_the_networks_numbers_too(posterior: Posterior) -> None:
    turned = class_label(["good", "bad"], 10, seed=1)  # the network: bad, good
    lazy = turned.with_transform(lambda rows: {**tokenizer()(rows["text"]), "label": rows["label"]})
    expected = posterior.predict(turned, 0)
    found = posterior.predict(lazy, 0)
    assert found.targets.tolist() == expected.targets.tolist() != turned["label"][:]
    torch.testing.assert_close(found.probs, expected.probs)
    part = torch.utils.data.Subset(turned, [3, 1, 0])
    assert posterior.predict(part, 0).targets.tolist() == expected.targets[[3, 1, 0]].tolist()
    other = class_label(["good", "bad"], 10, seed=1).cast_column(
        "label", datasets.ClassLabel(names=["good", "awful"])
    )
    with pytest.raises(DataError, match="'awful' is none of the network's classes"):
        posterior.predict(other.with_transform(lambda rows: {**tokenizer()(rows["text"])}), 0)


def test_labels_that_join_others_have_two_readings() -> None:
    data = datasets.Dataset.from_dict(
        {"text": ["a"] * 3, "label": ["rude", "false", "rude, false"]}
    )
    with pytest.raises(DataError, match=r"'rude, false' is a class of its own, or the labels"):
        class_names(data)
