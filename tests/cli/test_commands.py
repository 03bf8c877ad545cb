"""The commands end to end on small models: what they print, write, and leave for Python."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import arviz as az
import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from console import done, pyrolora_, refused, saved
from problems import bert, gpt2, llama, reviews
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import pyrolora
from pyrolora import AdapterConfig, cli, defaults
from pyrolora.guides import MonteCLoRA

NAMES = ("bad", "good")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and data."""
    place = tmp_path_factory.mktemp("place")
    saved(bert(initializer_range=0.3).bert, place / "encoder")
    reviews(24).to_json(place / "train.jsonl")
    reviews(10, seed=1).to_json(place / "test.jsonl")
    return place


FIT = ("--epochs", 2, "--batch-size", 8, "--learning-rate", 0.01, "--seed", 3)


def fit_command(place: Path, output: Path, *more: Any, data: str = "train.jsonl") -> list[Any]:
    model = ["--model", place / "encoder"] if "--model" not in more else []
    return ["fit", place / data, *model, "--output-dir", output, *FIT, *more]


@pytest.fixture(scope="module")
def fitted(place: Path) -> Path:
    done(*fit_command(place, place / "run"))
    return place / "run"


def state(folder: Path) -> dict[str, torch.Tensor]:
    return pyrolora.load(folder).model.own_state()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


# fit ----------------------------------------------------------------------------------------------


def test_fit_prints_its_result_as_one_json_document(place: Path, tmp_path: Path) -> None:
    """And progress elsewhere, on standard error."""
    result = done(
        *fit_command(place, tmp_path / "run", "--json", "--eval-data", place / "test.jsonl")
    )
    assert result.json["output_dir"] == str(tmp_path / "run")
    assert result.json["guide"] == "montec"
    assert result.json["num_examples"] == 24
    assert result.json["resumed_from_step"] == 0
    scores = pyrolora.load(tmp_path / "run").evaluate(reviews(10, seed=1), seed=3)
    assert result.json["metrics"] == pytest.approx(scores)
    assert record_of(tmp_path / "run")["result"]["metrics"] == pytest.approx(scores)
    assert "step 1/6" in result.err  # no bar: it is no terminal
    assert "it/s" not in result.err


def test_fit_says_what_the_examples_that_were_held_back_chose(place: Path, tmp_path: Path) -> None:
    reviews(100).to_json(tmp_path / "data.jsonl")
    command = partial(fit_command, place, data=str(tmp_path / "data.jsonl"))
    short = done(*command(tmp_path / "short"))  # it ends before the first choice of the width
    assert "were held back, and chose the temperature" in " ".join(short.out.split())
    assert "width" not in record_of(tmp_path / "short")["result"]
    longer = ("--epochs", "3")
    result = done(*command(tmp_path / "run", *longer))
    kept = record_of(tmp_path / "run")["result"]
    posterior = pyrolora.load(tmp_path / "run")
    assert (kept["num_examples"], kept["held_back"]) == (90, 10)
    assert posterior.history[-1] == {
        name: kept[name] for name in ("held_back", "width", "temperature")
    }
    assert posterior.options == MonteCLoRA()
    assert (
        f"10 of 100 examples were held back, and chose the width {kept['width']:.3g} and the "
        f"temperature {kept['temperature']:.3g}." in " ".join(result.out.split())
    )
    known = done(*command(tmp_path / "run", *longer, "--json")).json  # finished: nothing is fitted
    assert {name: known[name] for name in kept} == kept
    for value in ("0", "0.0"):
        result = done(*command(tmp_path / value, "--set", f"guide.hold_back={value}"))
        assert "held back" not in result.out
        assert record_of(tmp_path / value)["result"]["num_examples"] == 100
        assert pyrolora.load(tmp_path / value).options.hold_back == 0
    for value in ("None", "null"):
        done(*command(tmp_path / value, "--set", f"guide.hold_back={value}"))
        assert same(state(tmp_path / value), state(tmp_path / "short"))


def test_fit_says_what_to_do_next(place: Path, tmp_path: Path) -> None:
    result = done(*fit_command(place, tmp_path / "run", "--eval-data", place / "test.jsonl"))
    assert f"pyrolora evaluate {tmp_path / 'run'}" in result.out
    assert "accuracy" in result.out
    names = {path.name.partition("-")[0] for path in (tmp_path / "run").iterdir()}
    kept = {"run.json", "posterior.json", "adapters", "tokenizer", "README.md"}
    assert names == kept, "checkpoints are left"


def test_fit_is_the_fit_of_python(fitted: Path, place: Path) -> None:
    posterior = pyrolora.fit(
        place / "encoder", reviews(24), epochs=2, batch_size=8, learning_rate=0.01, seed=3
    )
    loaded = pyrolora.load(fitted)
    assert same(loaded.model.own_state(), posterior.model.own_state())
    assert loaded.settings == posterior.settings
    assert loaded.options == posterior.options


def test_every_part_of_a_fit_can_be_set(place: Path, tmp_path: Path) -> None:
    settings = [
        *(
            "--set",
            "guide.kl_weight=0.25",
            "--set",
            "guide.covariance=full",
            "--set",
            "adapter.r=3",
        ),
        *("--set", 'adapter.target_modules=["query"]'),
        *("--set", "training.gradient_accumulation_steps=2", "--set", "training.weight_decay=0.1"),
    ]
    done(*fit_command(place, tmp_path / "run", *settings))
    posterior = pyrolora.load(tmp_path / "run")
    assert posterior.options == MonteCLoRA(kl_weight=0.25, covariance="full")
    assert {spec.rank for spec in posterior.bank.specs.values()} == {3}
    assert all(name.endswith("query") for name in posterior.bank.specs)
    assert posterior.settings["gradient_accumulation_steps"] == 2
    assert posterior.settings["weight_decay"] == 0.1
    assert posterior.history[-1]["step"] == 4, "24 examples, 2 epochs, 16 a step"
    options = record_of(tmp_path / "run")["options"]
    assert options["guide"]["kl_weight"] == 0.25
    assert options["adapter"]["r"] == 3
    assert options["training"] == {"gradient_accumulation_steps": 2, "weight_decay": 0.1}


def test_set_options_are_those_of_python(place: Path, tmp_path: Path) -> None:
    settings = ["--guide", "map", "--set", "guide.prior_scale=0.5", "--set", "adapter.r=2"]
    done(*fit_command(place, tmp_path / "run", *settings))
    posterior = pyrolora.fit(
        place / "encoder",
        reviews(24),
        pyrolora.guides.MAP(prior_scale=0.5),
        adapter=AdapterConfig(r=2),
        epochs=2,
        batch_size=8,
        learning_rate=0.01,
        seed=3,
    )
    assert same(state(tmp_path / "run"), posterior.model.own_state())


def test_the_record_holds_the_command_as_it_was_given(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest", "--something-else"])
    command = fit_command(place, tmp_path / "a run")
    done(*command)
    words = record_of(tmp_path / "a run")["command"]
    assert words.startswith(f"pyrolora fit {place / 'train.jsonl'} --model")
    assert f"--output-dir '{tmp_path / 'a run'}'" in words
    assert record_of(tmp_path / "a run")["directory"] == str(Path.cwd())


def test_a_finished_fit_is_not_fitted_again(place: Path, tmp_path: Path, steps: list[int]) -> None:
    command = fit_command(place, tmp_path / "run", "--json")
    first = done(*command)
    assert steps
    steps.clear()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}
    again = done(*command)
    assert not steps
    assert again.json == first.json
    assert "finished" in again.err
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")} == before


def test_a_fit_to_a_saved_data_set_is_known_again(
    place: Path, tmp_path: Path, steps: list[int]
) -> None:
    reviews(8).rename_column("text", "body").save_to_disk(tmp_path / "data")
    command = fit_command(place, tmp_path / "run", "--text", "body", data=str(tmp_path / "data"))
    done(*command)
    steps.clear()
    done(*command)
    assert not steps


def test_other_settings_are_refused_and_nothing_is_changed(
    place: Path, tmp_path: Path, steps: list[int]
) -> None:
    run = tmp_path / "run"
    done(*fit_command(place, run))
    before = state(run)
    steps.clear()
    other = fit_command(place, run, "--set", "guide.sample_scale=0.5")
    was = f"guide.sample_scale was {defaults.SAMPLE_SCALE}, now 0.5"
    refused(pyrolora_(*other), was, "--output-dir")
    assert not steps
    assert same(state(run), before)
    done("evaluate", run, place / "test.jsonl")


def test_another_model_in_the_same_folder_is_another_model(place: Path, tmp_path: Path) -> None:
    saved(bert().bert, tmp_path / "encoder")
    command = fit_command(place, tmp_path / "run", "--model", tmp_path / "encoder")
    done(*command)
    saved(bert(hidden_size=32).bert, tmp_path / "encoder")
    refused(pyrolora_(*command), "model.safetensors was")


def test_other_data_under_the_same_name_is_other_data(place: Path, tmp_path: Path) -> None:
    reviews(8).to_json(tmp_path / "data.jsonl")
    command = fit_command(place, tmp_path / "run", data=str(tmp_path / "data.jsonl"))
    done(*command)
    reviews(8, seed=5).to_json(tmp_path / "data.jsonl")
    refused(pyrolora_(*command), "data_digest was 'sha256:")


def test_the_validation_split_of_the_evaluation_data_is_scored(place: Path, tmp_path: Path) -> None:
    splits = {"train": reviews(8), "validation": reviews(6, seed=1), "test": reviews(7, seed=2)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    for more, name in (((), "validation"), (("--eval-split", "test"), "test")):
        run = tmp_path / name
        command = fit_command(place, run, "--json", data=str(tmp_path / "data"))
        result = done(*command, "--eval-data", tmp_path / "data", *more)
        posterior = pyrolora.load(run)
        assert result.json["num_examples"] == 8
        assert result.json["metrics"] == pytest.approx(posterior.evaluate(splits[name], seed=3))
        scored = [entry.get("epoch") for entry in posterior.history if "eval_nll" in entry]
        assert scored == [1, 2, None], "the last with the scales of the end"
    found = done("evaluate", tmp_path / "test", tmp_path / "data", "--seed", 3, "--json").json
    assert found["nll"] == pytest.approx(result.json["metrics"]["nll"]), "the test split"


def test_a_run_can_be_used_from_another_folder_than_it_was_fitted_from(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the model and the data were given by relative names."""
    monkeypatch.chdir(place)
    done("fit", "train.jsonl", "--model", "encoder", "--output-dir", tmp_path / "run", *FIT)
    monkeypatch.chdir(tmp_path)
    done("evaluate", "run", place / "test.jsonl")


# evaluate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [0, 5])
def test_evaluate_gives_the_scores_of_python(fitted: Path, place: Path, draws: int) -> None:
    command = ["evaluate", fitted, place / "test.jsonl", "--num-samples", draws, "--seed", 7]
    expected = pyrolora.load(fitted).evaluate(reviews(10, seed=1), draws, seed=7)
    found = done(*command, "--json").json
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["num_samples"] == draws
    table = done(*command).out
    assert all(name.replace("_", " ") in table for name in expected)
    assert f"{expected['nll']:.3f}" in table


def test_evaluate_prints_null_for_a_score_that_is_not_defined(fitted: Path, place: Path) -> None:
    """JSON has no NaN: no answer is wrong, so that nothing can be said about finding them."""
    predicted = pyrolora.load(fitted).predict(reviews(10, seed=1), 0).predicted
    right = reviews(10, seed=1).remove_columns("label").add_column("label", predicted.tolist())
    right.to_json(place / "right.jsonl")
    command = ["evaluate", fitted, place / "right.jsonl", "--num-samples", 0]
    found = done(*command, "--json").json
    assert found["accuracy"] == 1
    assert found["error_auroc"] is None


# predict ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(fitted: Path) -> pd.DataFrame:
    """The table that Python makes of the test data."""
    prediction = pyrolora.load(fitted).predict(reviews(10, seed=1), 4, seed=7)
    return prediction.to_pandas().drop(columns="target")


PREDICT = ("--num-samples", 4, "--seed", 7)


def read_table(file: Path) -> pd.DataFrame:
    if file.suffix == ".parquet":
        return pd.read_parquet(file)
    if file.suffix == ".jsonl":
        return pd.read_json(file, lines=True)
    return pd.read_csv(file, sep="\t" if file.suffix == ".tsv" else ",")


def assert_beside(table: pd.DataFrame, data: datasets.Dataset, expected: pd.DataFrame) -> None:
    """The columns of ``data``, in its order of rows, and then those of the prediction."""
    assert list(table) == [*data.column_names, *expected]
    for name in data.column_names:
        assert table[name].tolist() == data[name][:]
    for name in expected:
        np.testing.assert_allclose(table[name], expected[name], rtol=1e-4, atol=1e-6)


def test_predict_prints_csv_beside_the_datas_own_columns(
    fitted: Path, place: Path, expected: pd.DataFrame, tmp_path: Path
) -> None:
    data = reviews(10, seed=1).add_column("id", [f"row {i}" for i in range(10)])
    data.to_json(tmp_path / "data.jsonl")
    result = done("predict", fitted, tmp_path / "data.jsonl", *PREDICT)
    (tmp_path / "printed.csv").write_text(result.out)
    assert_beside(pd.read_csv(tmp_path / "printed.csv"), data, expected)


def test_predict_prints_an_object_a_line(fitted: Path, place: Path, expected: pd.DataFrame) -> None:
    result = done("predict", fitted, place / "test.jsonl", *PREDICT, "--json")
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert_beside(pd.DataFrame(rows), reviews(10, seed=1), expected)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_predict_writes_a_file(
    kind: str, fitted: Path, place: Path, expected: pd.DataFrame, tmp_path: Path
) -> None:
    file = tmp_path / f"predictions.{kind}"
    result = done("predict", fitted, place / "test.jsonl", *PREDICT, "--output", file)
    assert result.out == ""
    assert str(file) in result.err
    assert_beside(read_table(file), reviews(10, seed=1), expected)


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param(None, id="no labels"),
        pytest.param([None] * 10, id="empty labels"),
        pytest.param([0, None] * 5, id="labels of some"),
        pytest.param(["who knows"] * 10, id="labels that are no classes"),
        pytest.param([7] * 10, id="numbers that are no classes"),
        pytest.param([0.5] * 10, id="labels of another kind"),
    ],
)
def test_predict_needs_no_labels(
    labels: Any, fitted: Path, expected: pd.DataFrame, tmp_path: Path
) -> None:
    """Whatever stands in their column stays as it is, and has no effect."""
    data = reviews(10, seed=1).remove_columns("label")
    if labels is not None:
        data = data.add_column("label", labels)
    data.to_parquet(tmp_path / "data.parquet")
    command = ["predict", fitted, tmp_path / "data.parquet", *PREDICT, "--json"]
    rows = [json.loads(line) for line in done(*command).out.splitlines()]
    assert [row.get("label") for row in rows] == (labels or [None] * 10)
    for name in expected:
        np.testing.assert_allclose([row[name] for row in rows], expected[name], atol=1e-5)


def test_predict_takes_lines_of_text(fitted: Path, expected: pd.DataFrame, tmp_path: Path) -> None:
    texts = reviews(10, seed=1)["text"][:]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    result = done("predict", fitted, tmp_path / "texts.txt", *PREDICT, "--json")
    table = pd.DataFrame([json.loads(line) for line in result.out.splitlines()])
    assert table["text"].tolist() == texts
    np.testing.assert_allclose(table["prob_1"], expected["prob_1"], atol=1e-5)


def test_columns_that_a_prediction_has_too_are_not_overwritten(
    fitted: Path, place: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first.csv"
    done("predict", fitted, place / "test.jsonl", "--num-samples", 2, "--output", first)
    again = pyrolora_("predict", fitted, first, "--num-samples", 0, "--text", "text")
    refused(again, "first.csv", "'predicted'", "'entropy'", "rename")


def test_predict_leaves_the_cells_of_a_table_as_they_are(fitted: Path, tmp_path: Path) -> None:
    """Leading zeros, numbers in words, empty cells, other types."""
    rows = "text,code,amount,flag\ngood film,007,1.10,true\nbad film,,NA,2020-01-01\n"
    (tmp_path / "data.csv").write_text(rows)
    several = pyrolora_("predict", fitted, tmp_path / "data.csv", "--num-samples", 0)
    refused(several, "'text', 'amount', 'flag'", "--text")
    command = ["predict", fitted, tmp_path / "data.csv", "--num-samples", 0, "--text", "text"]
    result = done(*command)
    kept = [",".join(line.split(",")[:4]) for line in result.out.splitlines()]
    assert kept == rows.splitlines()


# Kinds of problems --------------------------------------------------------------------------------


def test_classes_go_by_their_names(place: Path, tmp_path: Path) -> None:
    def named(n: int, seed: int) -> datasets.Dataset:
        data = reviews(n, seed=seed)
        labels = [NAMES[label] for label in data["label"]]
        return data.remove_columns("label").add_column("mood", labels)

    named(24, 0).to_csv(tmp_path / "train.csv", index=False)
    named(10, 1).to_csv(tmp_path / "test.csv", index=False)
    run = tmp_path / "run"
    done(*fit_command(place, run, "--label", "mood", data=str(tmp_path / "train.csv")))
    posterior = pyrolora.load(run)
    table = posterior.predict(reviews(10, seed=1), 4, seed=7).to_pandas()
    result = done("predict", run, tmp_path / "test.csv", *PREDICT, "--json")
    rows = pd.DataFrame([json.loads(line) for line in result.out.splitlines()])
    own = ["predicted", "entropy", "aleatoric", "epistemic"]
    assert list(rows) == ["text", "mood", "prob_bad", "prob_good", *own]
    np.testing.assert_allclose(rows["prob_bad"], table["prob_bad"], atol=1e-5)
    np.testing.assert_allclose(rows["prob_good"], table["prob_good"], atol=1e-5)
    assert rows["predicted"].tolist() == table["predicted"].tolist()
    assert set(rows["predicted"]) <= set(NAMES)
    found = done("evaluate", run, tmp_path / "test.csv", *PREDICT, "--json").json
    scores = posterior.evaluate(reviews(10, seed=1), 4, seed=7)
    assert {name: found[name] for name in scores} == pytest.approx(scores)


def test_pairs_of_texts_and_another_label(place: Path, tmp_path: Path) -> None:
    """The columns of the fit hold for the other commands; one called label is not the label."""
    first, second = reviews(24), reviews(24, seed=1)
    rows = {
        "claim": first["text"][:],
        "premise": second["text"][:],
        "label": [1 - label for label in first["label"]],
        "verdict": first["label"][:],
    }
    data = datasets.Dataset.from_dict(rows)
    data.to_json(tmp_path / "pairs.jsonl")
    choice = ["--text", "premise", "--text", "claim", "--label", "verdict"]
    run = tmp_path / "run"
    done(*fit_command(place, run, *choice, data=str(tmp_path / "pairs.jsonl")))
    assert record_of(run)["options"]["columns"] == {
        "text": ["premise", "claim"],
        "label": "verdict",
    }
    pairs = datasets.Dataset.from_dict(
        {"text": rows["premise"], "text_pair": rows["claim"], "label": rows["verdict"]}
    )
    by_hand = pyrolora.fit(
        place / "encoder", pairs, epochs=2, batch_size=8, learning_rate=0.01, seed=3
    )
    assert same(state(run), by_hand.model.own_state())
    found = done("evaluate", run, tmp_path / "pairs.jsonl", *PREDICT, "--json").json
    scores = by_hand.evaluate(pairs, 4, seed=7)
    assert {name: found[name] for name in scores} == pytest.approx(scores)
    table = tmp_path / "predictions.parquet"
    done("predict", run, tmp_path / "pairs.jsonl", *PREDICT, "--output", table)
    assert_beside(
        pd.read_parquet(table), data, by_hand.predict(pairs.remove_columns("label"), 4, seed=7)
        .to_pandas(),
    )  # fmt: skip
    alone = done("evaluate", run, tmp_path / "pairs.jsonl", *PREDICT, "--json", "--text", "claim")
    assert alone.json["nll"] != pytest.approx(scores["nll"]), "--text has no effect"


def test_regression(place: Path, tmp_path: Path) -> None:
    data = reviews(24)
    data = data.remove_columns("label").add_column("label", [x - 0.25 for x in data["label"]])
    data.to_csv(tmp_path / "train.csv", index=False)
    run = tmp_path / "run"
    done(*fit_command(place, run, data=str(tmp_path / "train.csv")))
    posterior = pyrolora.load(run)
    assert posterior.task.name == "regression"
    scores = posterior.evaluate(data, 4, seed=7)
    assert set(scores) == {"rmse", "nll", "crps", "coverage", "aurc"}
    found = done("evaluate", run, tmp_path / "train.csv", *PREDICT, "--json").json
    assert {name: found[name] for name in scores} == pytest.approx(scores)
    table = tmp_path / "predictions.parquet"
    data.to_json(tmp_path / "test.jsonl")
    done("predict", run, tmp_path / "test.jsonl", *PREDICT, "--output", table)
    prediction = posterior.predict(data, 4, seed=7).to_pandas().drop(columns="target")
    assert_beside(pd.read_parquet(table), data, prediction)


def test_whole_numbers_are_a_regression_if_that_is_said(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done(*fit_command(place, run, "--task", "regression"))
    assert set(done("evaluate", run, place / "test.jsonl", "--json").json) >= {"rmse", "crps"}


@pytest.mark.parametrize("network", [llama, gpt2])
def test_a_language_model(network: Any, tmp_path: Path) -> None:
    saved(network(), tmp_path / "decoder")
    texts = reviews(16)["text"][:]
    (tmp_path / "train.txt").write_text("\n".join(texts))
    run = tmp_path / "run"
    done("fit", tmp_path / "train.txt", "--model", tmp_path / "decoder", "--output-dir", run, *FIT)
    posterior = pyrolora.load(run)
    assert posterior.task.name == "text-generation"
    found = done("evaluate", run, tmp_path / "train.txt", *PREDICT, "--json").json
    scores = posterior.evaluate(texts, 4, seed=7)
    assert {"nll", "perplexity"} == set(scores)
    assert {name: found[name] for name in scores} == pytest.approx(scores)
    table = tmp_path / "predictions.parquet"
    done("predict", run, tmp_path / "train.txt", *PREDICT, "--output", table)
    prediction = posterior.predict(texts, 4, seed=7).to_pandas()
    assert_beside(pd.read_parquet(table), datasets.Dataset.from_dict({"text": texts}), prediction)


# export -------------------------------------------------------------------------------------------


def test_a_merged_model_is_one_that_transformers_loads(fitted: Path, tmp_path: Path) -> None:
    result = done("export", fitted, tmp_path / "merged", "--json")
    expected = {"run": str(fitted), "to": "transformers", "path": str(tmp_path / "merged")}
    assert result.json == expected
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokens = AutoTokenizer.from_pretrained(tmp_path / "merged")
    batch = tokens(reviews(5)["text"][:], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = pyrolora.load(fitted).merge()(**batch).logits
        torch.testing.assert_close(network(**batch).logits, expected, atol=1e-6, rtol=1e-5)


def test_draws_are_written_for_arviz(fitted: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "posterior.nc"
    result = done("export", fitted, file, "--to", "arviz", "--num-samples", 7, "--seed", 1)
    assert f"az.from_netcdf('{file}')" in result.out
    written = az.from_netcdf(str(file)).posterior
    expected = pyrolora.load(fitted).to_arviz(7, seed=1).posterior
    assert written.sizes["draw"] == 7
    assert set(written.data_vars) == set(expected.data_vars)
    for name in expected.data_vars:
        np.testing.assert_allclose(written[name], expected[name], rtol=1e-6)


def test_draws_are_named_by_their_numbers(fitted: Path, place: Path, tmp_path: Path) -> None:
    """The same functions on every command, and in what Python and PEFT make of them."""
    posterior, data = pyrolora.load(fitted), reviews(10, seed=1)
    expected = posterior.predict(data, draws=[2, 0])
    out = done("predict", fitted, place / "test.jsonl", "--draws", "2,0", "--json").out
    entropy = [json.loads(line)["entropy"] for line in out.splitlines()]
    assert entropy == pytest.approx(expected.entropy.tolist(), abs=1e-6)
    scores = done("evaluate", fitted, place / "test.jsonl", "--draws", "2, 0", "--json").json
    assert scores["draws"] == [2, 0]
    assert "num_samples" not in scores
    assert scores["nll"] == pytest.approx(posterior.evaluate(data, draws=[2, 0])["nll"], rel=1e-5)
    command = ("export", fitted, tmp_path / "peft", "--to", "peft", "--draws", "2,0", "--uniform")
    assert str(tmp_path / "peft" / "draw-2") in done(*command).out
    for k, own in zip((2, 0), expected.draws, strict=True):
        folder = tmp_path / "peft" / f"draw-{k}"
        network = AutoModelForSequenceClassification.from_pretrained(place / "encoder")
        read = pyrolora.from_peft(folder, network, tokenizer=posterior.tokenizer)
        torch.testing.assert_close(read.predict(data, 0).draws[0], own, atol=1e-5, rtol=1e-5)
        assert json.loads((folder / "adapter_config.json").read_text())["alpha_pattern"] == {}
    file = tmp_path / "draws.nc"
    done("export", fitted, file, "--to", "arviz", "--draws", "2,0")
    assert az.from_netcdf(str(file)).posterior["draw"].values.tolist() == [2, 0]
    done("export", fitted, tmp_path / "first.nc", "--to", "arviz", "--num-samples", 3)
    first = az.from_netcdf(str(tmp_path / "first.nc")).posterior
    named = az.from_netcdf(str(file)).posterior
    np.testing.assert_allclose(first["adapter_norm"][:, [2, 0]], named["adapter_norm"], rtol=1e-5)


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("predict", ("--draws", "0,x"), "0,1,2, got '0,x'"),
        ("predict", ("--draws", ""), "0,1,2, got ''"),
        ("predict", ("--draws", "-1"), "0,1,2, got '-1'"),
        ("predict", ("--draws", "0,0"), "more than once"),
        ("predict", ("--draws", "0", "--num-samples", 2), "--num-samples would take others"),
        ("evaluate", ("--draws", "0", "--seed", 2), "--seed would take others"),
        ("generate", ("--draws", "0", "--num-samples", 2), "--num-samples would take others"),
        ("export", ("--draws", "0"), "--draws would do nothing with --to transformers, which"),
        ("export", ("--draws", "0", "--draw", 1, "--to", "peft"), "--draw would take others"),
        ("calibrate", ("--draws", "0", "--seed", 2), "--seed would take others"),
        ("report", ("--draws", "0", "--seed", 2), "--seed would take others"),
    ],
)
def test_what_names_no_draws_is_refused(
    command: str, options: tuple[Any, ...], message: str, fitted: Path, place: Path, tmp_path: Path
) -> None:
    where = tmp_path / "out" if command == "export" else place / "test.jsonl"
    refused(pyrolora_(command, fitted, where, *options), message)


USELESS = [
    *(("transformers", option) for option in ("--num-samples 2", "--seed 0", "--uniform")),
    *(("peft", option) for option in ("--num-samples 2", "--seed 0")),
    *(("arviz", option) for option in ("--draw 0", "--uniform")),
]


@pytest.mark.parametrize(("to", "option"), USELESS)
def test_an_option_that_would_do_nothing_is_refused(
    to: str, option: str, fitted: Path, tmp_path: Path
) -> None:
    command = ("export", fitted, tmp_path / "out", "--to", to, *option.split())
    refused(pyrolora_(*command), f"{option.split()[0]} would do nothing with --to {to}, which")


def test_options_that_would_have_nothing_to_act_on_are_refused(
    fitted: Path, place: Path, tmp_path: Path
) -> None:
    command = fit_command(place, tmp_path / "run", "--eval-split", "test")
    refused(pyrolora_(*command), "--eval-split test is a split of --eval-data, and there are none")
    command = ("predict", fitted, place / "test.jsonl", "--json", "--output", tmp_path / "a.csv")
    refused(pyrolora_(*command), "give one of them")


# Help ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        *("fit", "predict", "evaluate", "compare", "generate", "report", "export", "demo"),
    ],
)
def test_help_shows_an_example(command: str) -> None:
    result = done(command, "--help")
    examples = [line for line in result.out.splitlines() if "Usage:" not in line]
    assert any(f"  pyrolora {command}" in line for line in examples), result.out


def test_a_stop_string_is_shown_as_a_shell_reads_it() -> None:
    text = done("generate", "--help").out
    assert "\n  pyrolora generate run chats.jsonl --stop-string $'\\n\\n'\n" in text
    assert '"agreement" (0 to 1, how similar' in " ".join(text.split())  # lines are filled


@pytest.mark.parametrize("command", [name.__name__ for name in (cli.fit, *cli.commands)])
def test_help_fits_a_screen(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a hundred columns; 70 lines for fit and serve, of the most options."""
    monkeypatch.setenv("COLUMNS", "100")
    lines = done(command, "--help").out.splitlines()
    assert len(lines) <= (70 if command in ("fit", "serve") else 56)
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "pyrolora ev"
    for name, value in (
        ("COMPLETE", f"complete_{shell}"), ("COMPLETE_ARGS", words),
        ("COMPLETE_FISH_ACTION", "get-args"),
    ):  # fmt: skip
        monkeypatch.setenv(f"_PYROLORA_{name}" if name == "COMPLETE" else f"_TYPER_{name}", value)
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", "1")
    assert "evaluate" in pyrolora_().out


def test_the_help_of_fit_names_what_the_registries_hold() -> None:
    text = " ".join(done("fit", "--help").out.replace("│", " ").split())
    assert ", ".join(pyrolora.tasks.available()) in text
    assert ", ".join(pyrolora.guides.available()) in text
    assert "{" not in text.partition("{data}")[2]


def test_help_names_the_commands_and_the_exit_codes() -> None:
    result = done("--help")
    for word in ("fit", "compare", "generate", "report", "demo", "Exit codes"):
        assert word in result.out


def test_no_command_at_all_shows_the_help() -> None:
    result = pyrolora_()
    assert result.code == 2
    assert "evaluate" in result.out + result.err
    assert not result.err.rstrip().endswith("error:"), "an error that says nothing"


def test_help_does_not_wait_for_torch() -> None:
    """``python -m pyrolora --help`` in a process of its own imports no large library."""
    code = (
        "import runpy, sys; sys.argv = ['pyrolora', '--help']\n"
        "try: runpy.run_module('pyrolora', run_name='__main__')\n"
        "except SystemExit as end: code = end.code\n"
        "found = {'torch', 'transformers', 'datasets', 'pandas', 'arviz'} & set(sys.modules)\n"
        "sys.exit(f'imported: {found}' if found else code)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "evaluate" in process.stdout
