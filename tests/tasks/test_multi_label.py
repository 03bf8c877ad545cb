"""Multi-label classification: the law against transformers' own loss, labels in every form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from console import done, saved
from peft_trainer import check_map
from problems import LABELS, Rows, arguments, bert, bert_labels, bert_mlm, several, tokenizer
from transformers import BertForSequenceClassification

import pyrolora
from pyrolora import AdapterConfig, Posterior
from pyrolora.data import prepare
from pyrolora.errors import ConfigError, DataError
from pyrolora.predictive import Conformal, evaluate, reliability_table
from pyrolora.report import report_on
from pyrolora.tasks import MultiLabel, MultiLabelPrediction, load_network, task_for

MULTI = "multi_label_classification"


def prepared(data: Any, net: Any = None, **options: Any) -> Any:
    net = bert_labels() if net is None else net
    return prepare(data, net, MultiLabel(), tokenizer(), **options)


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    options = {"tokenizer": tokenizer(), "adapter": AdapterConfig(r=2), "seed": 0}
    return pyrolora.fit(bert_labels(), several(16), "meanfield", epochs=2, **options)


# The law -----------------------------------------------------------------------------------------


def test_the_likelihood_is_transformers_own_loss_summed_over_labels() -> None:
    net, task = bert_labels(), MultiLabel()
    ready = prepared(several(5), net)
    batch = ready.collate([ready.examples[i] for i in range(5)])
    output = task.output(net(**{n: t for n, t in batch.items() if n != "labels"}))
    expected = net(**batch).loss * 5 * 3  # a mean over examples and classes
    torch.testing.assert_close(-task.log_prob(output, batch).sum(), expected)


def test_a_map_fit_is_that_of_peft_and_the_trainer(tmp_path: Path) -> None:
    """transformers' loss is a mean over classes: it takes steps that are as many times longer."""
    plain = {"optim": "sgd", "max_grad_norm": 0.0}
    net = bert_labels(initializer_range=0.3)
    ready = prepared(several(12), net)
    check_map(
        net,
        several(12),
        ready.examples,
        ready.collate,
        kind="SEQ_CLS",
        head="classifier",
        ours=arguments(tmp_path / "ours", learning_rate=0.5, **plain),
        theirs=arguments(tmp_path / "theirs", learning_rate=1.5, **plain),
        tokenizer=tokenizer(),
    )


def test_the_curvature_is_the_hessian() -> None:
    task, output = MultiLabel(), torch.randn(4, 3)
    batch = {"labels": torch.tensor([[1, 0, 1]] * 4)}
    vectors = torch.stack([*task.curvature(output, batch)])
    found = torch.einsum("vbi,vbj->bij", vectors, vectors)
    for row, labels, value in zip(output, batch["labels"], found, strict=True):
        exact = torch.autograd.functional.hessian(
            lambda f, y=labels: -task.log_prob(f[None], {"labels": y[None]}).sum(), row
        )
        torch.testing.assert_close(value, exact)


def test_the_temperature_divides_the_logits() -> None:
    task, output, batch = MultiLabel(), torch.randn(2, 4, 3), {"labels": torch.ones(4, 3)}
    expected = torch.nn.functional.logsigmoid(output / 2).sum(-1)
    torch.testing.assert_close(task.at(2.0).log_prob(output, batch), expected)


def test_a_draw_is_the_network_with_its_update_in_the_weights(posterior: Posterior) -> None:
    data, net = several(6, seed=1), bert_labels()
    drawn = posterior.predict(data, draws=[1])
    factors = {
        n: (A[0], B[0]) for n, (A, B) in posterior.factors(posterior.sample(draws=[1])).items()
    }
    with torch.no_grad():
        for name, (A, B) in factors.items():
            spec = posterior.bank.specs[name]
            net.get_submodule(name).weight += spec.scaling * B @ A
        for name, (head, *_) in posterior.model.named_heads().items():
            net.get_submodule(name).load_state_dict(head.state_dict())
    ready = prepared(data, net)
    batch = ready.collate([ready.examples[i] for i in range(6)])
    probs = net(**{n: t for n, t in batch.items() if n != "labels"}).logits.sigmoid()
    torch.testing.assert_close(drawn.draws[0], probs.detach(), atol=1e-5, rtol=1e-4)


# Labels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["numbers", "integers", "floats", "booleans", "columns"])
def test_every_form_of_labels_is_the_same(form: str) -> None:
    expected = prepared(several(12)).labels
    torch.testing.assert_close(prepared(several(12, form)).labels, expected)


def test_numbers_with_names_are_matched_by_name() -> None:
    other = datasets.List(datasets.ClassLabel(names=["NOT", "Good", "bad"]))
    data = datasets.Dataset.from_list(
        [{"text": "film", "labels": [0, 1]}, {"text": "film", "labels": []}]
    ).cast_column("labels", other)
    assert prepared(data).labels.tolist() == [[1, 0, 1], [0, 0, 0]]
    ready = prepared(data, bert_labels(named=False))  # a network without names takes the data's
    assert ready.labels.tolist() == [[1, 1, 0], [0, 0, 0]]
    assert ready.names == ["NOT", "Good", "bad"]


def test_tensors_and_rows_have_a_place_per_class() -> None:
    ids, hot = torch.randint(4, 10, (6, 5)), torch.randint(2, (6, 3))
    rows = Rows([{"input_ids": ids[i], "labels": hot[i].float()} for i in range(6)])
    for data in ((ids, hot), (ids, hot.bool()), rows):
        torch.testing.assert_close(prepared(data).labels.float(), hot.float())


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([[0, 1], [1, 0]], "two readings"),
        ([[0, 0], [0, 2]], "of 2 classes.*none twice"),
        ([[0.2, 1.0], [1.0, 0.0]], "several real targets"),
        ([[0], [5]], "the network has 2, from 0 to 1"),
        ([["good"], ["dull"]], "'dull' is none of the network's classes"),
        ([[1.0, None], [0.0, 1.0]], "0 or 1 per class"),
        ([[[1]], [[0]]], "shape"),
        ([0, 1], "list per example"),
        (["good,bad", "bad"], r"split\(','\)"),
    ],
)
def test_labels_that_cannot_be_read_are_told(labels: Any, words: str) -> None:
    data = [{"text": "film", "labels": row} for row in labels]
    with pytest.raises(DataError, match=words):
        prepared(data, bert_labels(2))


def test_lists_of_two_places_are_told_apart_where_they_can_be() -> None:
    hot = [{"text": "film", "labels": row} for row in ([0, 1], [1, 1])]
    assert prepared(hot, bert_labels(2)).labels.tolist() == [[0, 1], [1, 1]]
    numbers = [{"text": "film", "labels": row} for row in ([0, 1], [1])]
    assert prepared(numbers, bert_labels(2)).labels.tolist() == [[1, 1], [0, 1]]


def test_rows_without_places_for_all_classes_are_told() -> None:
    rows = Rows([{"input_ids": [4, 5], "labels": [0]}, {"input_ids": [4, 5], "labels": [0, 2]}])
    with pytest.raises(DataError, match="several lengths"):
        prepared(rows)
    with pytest.raises(DataError, match=r"3 classes.*2 places"):
        prepared((torch.ones(2, 4).long(), torch.ones(2, 2)))


def test_a_column_per_class_has_to_be_whole() -> None:
    with pytest.raises(DataError, match=r"none for \['not'\]"):
        prepared(several(3, "columns").remove_columns("not"))


# The network -------------------------------------------------------------------------------------


def test_the_network_says_the_task() -> None:
    assert task_for(bert_labels()).name == "multi-label-classification"
    assert task_for(bert_labels(1)).name == "multi-label-classification"
    assert task_for(bert(3), "multilabel").name == "multi-label-classification"
    with pytest.raises(ConfigError, match="several labels per example, and the task says"):
        task_for(bert_labels(), "classification")
    with pytest.raises(ConfigError, match="one label per example, and the task says"):
        task_for(bert(3, problem_type="single_label_classification"), "multi-label-classification")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(bert_mlm(), tmp_path_factory.mktemp("networks") / "encoder")


@pytest.mark.parametrize("form", ["names", "integers", "numbers"])
def test_data_load_the_network_that_they_need(encoder: Path, form: str) -> None:
    net, _ = load_network(encoder, several(12, form))
    assert isinstance(net, BertForSequenceClassification)
    assert net.config.problem_type == MULTI
    assert net.config.num_labels == 3
    assert (sorted(net.config.label2id) == sorted(LABELS)) == (form == "names")


@pytest.mark.parametrize("labels", [[["good"], []], [[0], []], [[1.0], [0.0]]])
def test_one_class_is_enough(encoder: Path, labels: list[Any]) -> None:
    rows = [{"text": "film", "labels": row} for row in labels]
    net, tokens = load_network(encoder, rows)
    assert net.config.num_labels == 1
    assert prepare(rows, net, MultiLabel(), tokens).labels.tolist() == [[1], [0]]


@pytest.mark.parametrize("task", [None, "multi-label-classification"])
def test_missing_labels_are_told_and_need_no_prediction(encoder: Path, task: str | None) -> None:
    rows = [{"text": "film", "labels": row} for row in (None, ["good"], ["bad"])]
    net, _ = load_network(encoder, rows, task=task)
    with pytest.raises(DataError, match="1 examples have no label, the first is example 0"):
        prepared(rows, net)
    with pytest.raises(DataError, match="no example has a class"):
        load_network(encoder, [{**row, "labels": []} for row in rows], task=task)
    missing = [{**row, "labels": None} for row in rows]
    assert prepared(missing, net, need_labels=False).labels is None


def test_columns_of_0_and_1_by_name_are_asked_about(encoder: Path) -> None:
    for task in (None, "multi-label-classification"):
        with pytest.raises(DataError, match=r"\['good', 'bad', 'not'\].*remove_columns"):
            load_network(encoder, several(3, "columns"), task=task)


# The prediction ----------------------------------------------------------------------------------


def prediction_of(probs: Any, targets: Any) -> MultiLabelPrediction:
    draws, y = torch.tensor(probs), torch.tensor(targets)
    scores = (y * draws.log() + (1 - y) * (1 - draws).log()).sum(-1)
    return MultiLabelPrediction(y, scores, draws)


def test_the_uncertainty_of_each_label_splits() -> None:
    made = prediction_of([[[0.9, 0.5]], [[0.1, 0.5]]], [[1, 0]])
    half, sure = np.log(2), -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    np.testing.assert_allclose(made.label_entropy, [[half, half]], rtol=1e-6)
    np.testing.assert_allclose(made.label_aleatoric, [[sure, half]], rtol=1e-6)
    np.testing.assert_allclose(made.epistemic, [half - sure], rtol=1e-5)


def test_metrics_by_hand() -> None:
    made = prediction_of(
        [[[0.9, 0.2], [0.6, 0.7], [0.4, 0.1]]], [[1, 0], [1, 1], [1, 1]]
    )  # of 5 labels 3 are found, and nothing else is
    found = evaluate(made)
    assert found["micro_f1"] == pytest.approx(2 * 3 / (2 * 3 + 2))
    assert found["macro_f1"] == pytest.approx((2 * 2 / 5 + 2 / 3) / 2)
    assert found["exact_match"] == pytest.approx(2 / 3)
    assert found["label_auroc"] == pytest.approx(0.5)  # of the second label: the first is constant
    errors = [0.1, 0.2, 0.4, 0.3, 0.6, 0.9]
    assert found["brier"] == pytest.approx(2 * np.mean(np.square(errors)))
    assert found["nll"] == pytest.approx(-np.log(1 - np.array(errors)).sum() / 3)
    assert {*found} == {*MultiLabelPrediction.higher_is_better}
    assert reliability_table(made)["count"].sum() == 6


def test_it_works_end_to_end(posterior: Posterior, tmp_path: Path) -> None:
    data = several(8, seed=2)
    prediction = posterior.predict(data, 4, seed=0)
    table = prediction.to_pandas()
    assert [*table][:4] == ["prob_good", "prob_bad", "prob_not", "predicted"]
    assert [{*row} for row in table["target"]] == [{*row} for row in data["labels"]]
    idata = posterior.to_arviz(8, data=data, log_likelihood=True, seed=0)
    assert idata["observed_data"]["y"].dims == ("example", "class")
    assert [*idata["posterior_predictive"]["probs"].coords["class"].values] == LABELS
    assert idata["log_likelihood"]["y"].shape == (1, 8, 8)
    report = report_on(posterior, data, num_samples=3, seed=0)
    assert "<h3>Reliability</h3>" in report.html
    assert "least sure label" in report.html
    assert not report_on(posterior, data.remove_columns("labels"), num_samples=2).metrics
    posterior.save(tmp_path / "saved")
    loaded = pyrolora.load(tmp_path / "saved", bert_labels())
    again = loaded.predict(data, 4, seed=0)
    torch.testing.assert_close(again.draws, prediction.draws)
    posterior.to_peft(tmp_path / "adapter")
    back = pyrolora.from_peft(tmp_path / "adapter", bert_labels(), tokenizer=tokenizer())
    torch.testing.assert_close(back.predict(data, 0).draws, posterior.predict(data, 0).draws)
    with pytest.raises(ConfigError, match="one class per row"):
        Conformal(prediction)


def test_padding_changes_nothing(posterior: Posterior) -> None:
    data = several(6, seed=3)
    whole = posterior.predict(data, 3, seed=0, batch_size=6)
    single = posterior.predict(data, 3, seed=0, batch_size=1)
    torch.testing.assert_close(whole.draws, single.draws, atol=1e-6, rtol=1e-5)


def test_the_curvature_of_a_laplace_fit_is_used(tmp_path: Path) -> None:
    options = {"tokenizer": tokenizer(), "adapter": AdapterConfig(r=1), "epochs": 1, "seed": 0}
    fitted = pyrolora.fit(bert_labels(), several(8), "laplace", eval_data=several(4), **options)
    assert fitted.predict(several(4), 3).epistemic.shape == (4,)


def test_from_a_shell(tmp_path: Path) -> None:
    model = saved(bert_labels(), tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in several(8).to_list()))
    run, table = tmp_path / "run", tmp_path / "table.jsonl"
    fit = ("--model", model, "--guide", "map", "--epochs", 1, "--output-dir", run)
    done("fit", rows, *fit, "--eval-data", rows)
    assert 0 <= done("evaluate", run, rows, "--json").json["micro_f1"] <= 1
    done("predict", run, rows, "--output", table)
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    assert len(lines) == 8
    assert isinstance(lines[0]["predicted"], list)
