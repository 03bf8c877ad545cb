"""Tasks by their names, and a task that somebody else defines."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from counting import CountPrediction, Counts
from problems import arguments, bert, mlp, reviews, tokenizer
from torch import Tensor, nn

import pyrolora
from pyrolora.errors import ConfigError, DataError, UnknownNameError
from pyrolora.report import report_on
from pyrolora.tasks import (
    CausalLM,
    Classification,
    MaskedLM,
    MultiLabel,
    MultipleChoice,
    QuestionAnswering,
    Regression,
    RegressionPrediction,
    Task,
    TokenClassification,
    available,
    register,
    registry,
    task_class,
    task_for,
)

DATA = (torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12.0) % 3)


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry as it was, after each test."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


def laplacian(**parts: Any) -> type[Task]:
    """Regression with Laplace's law of the noise, of scale 1."""

    def law(self: Task, output: Tensor, batch: Any) -> dist.TorchDistribution:
        return dist.Laplace(output, torch.ones(()))

    def curvature(self: Task, output: Tensor, batch: Any) -> Iterator[Tensor]:
        yield torch.ones_like(output)

    body = {"name": "robust-regression", "law": law, "curvature": curvature, "tempers": False}
    return type("Laplacian", (Regression,), {**body, **parts})


def with_options(self: Task, scale: float = 1.0) -> None:
    """An option, which the folder of a posterior does not have."""
    super(Regression, self).__init__()


class Half(CountPrediction):
    """A prediction without a part that everything asks for."""

    loss = property(abstractmethod(lambda self: None))


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        ("classification Classification text-classification image-classification", Classification),
        ("audio_classification SEQ_CLS seq-cls", Classification),
        ("regression Regression", Regression),
        ("text-generation Text_Generation CAUSAL_LM causal-lm", CausalLM),
        ("fill-mask fill_mask", MaskedLM),
        ("multiple-choice multiple_choice", MultipleChoice),
        ("multi-label-classification multi_label multilabel", MultiLabel),
        ("question-answering QUESTION_ANS qa", QuestionAnswering),
        ("token-classification TOKEN_CLS ner token_classification", TokenClassification),
    ],
)
def test_a_task_has_the_names_that_people_know(names: str, kind: type[Task]) -> None:
    assert kind.name in available()
    for name in names.split():
        assert task_class(name) is kind


def test_the_canonical_name_is_what_a_posterior_has() -> None:
    options = {"epochs": 1, "tokenizer": tokenizer(), "adapter": pyrolora.AdapterConfig(r=1)}
    posterior = pyrolora.fit(bert(), reviews(6), "map", task="SEQ_CLS", **options)
    assert posterior.task.name == "classification"
    assert posterior.to_arviz(2)["posterior"].attrs["task"] == "classification"


@pytest.mark.parametrize("name", ["poisson", "", "depth-estimation", "masked_lm"])
def test_a_name_that_does_not_exist_lists_those_that_do(name: str) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown task.*regression.*token-classification"):
        task_for(mlp(), name)


@pytest.mark.parametrize("value", [Regression, 3, ["regression"]])
def test_anything_but_a_name_or_an_object_is_refused(value: Any) -> None:
    words = r"make an object of it, Regression\(\)" if value is Regression else "a Task object, got"
    with pytest.raises(ConfigError, match=words):
        task_for(mlp(), value)


def test_an_object_is_copied() -> None:
    task = Regression()
    made = task_for(mlp(), task)
    made.assign("noise_scale", torch.tensor(3.0))
    assert task.param("noise_scale").item() == 1


def test_an_object_of_an_unregistered_task_fits() -> None:
    task = laplacian()()
    options = {"epochs": 1, "adapter": pyrolora.AdapterConfig(r=1), "seed": 0}
    posterior = pyrolora.fit(mlp(4, 1), DATA, "meanfield", task=task, **options)
    prediction = posterior.predict(DATA, 3, seed=0)
    assert isinstance(prediction, RegressionPrediction)
    expected = dist.Laplace(prediction.draws, 1.0).log_prob(DATA[1])
    torch.testing.assert_close(prediction.log_likelihood, expected)
    assert "robust-regression" not in available()


def test_a_class_statement_that_runs_again_is_the_new_class() -> None:
    register(laplacian())
    again = register(laplacian())
    assert isinstance(task_for(mlp(), "robust-regression"), again)


@pytest.mark.parametrize("decorated", [True, False])
def test_a_registered_task_is_known_by_its_names(decorated: bool) -> None:
    kind = laplacian(aliases=("robust",))
    assert (register(kind) if not decorated else register(laplacian(aliases=("robust",)))).name
    assert available()[-1] == "robust-regression"
    options = {"epochs": 1, "adapter": pyrolora.AdapterConfig(r=1), "seed": 0}
    posterior = pyrolora.fit(mlp(4, 1), DATA, "map", task="Robust", **options)
    assert posterior.task.name == "robust-regression"


def test_a_network_calls_for_a_registered_task_that_no_other_reads() -> None:
    class Counts(nn.Module):
        pass

    names = frozenset({"Counts", "BertForSequenceClassification"})
    register(laplacian(classes=names, matches=classmethod(Task.matches.__func__)))
    assert task_for(Counts()).name == "robust-regression"
    assert task_for(bert()).name == "classification"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (laplacian(name="regression"), "'regression' is taken by Regression"),
        (laplacian(name="ner"), "'ner' is taken by TokenClassification"),
        (laplacian(aliases=("causal-lm",)), "'causal-lm' is taken by CausalLM"),
        (laplacian(name="Robust_Regression"), "call it 'robust-regression'"),
        (laplacian(prediction=None), "lacks a prediction"),
        (laplacian(name=None), "lacks a name"),
        (laplacian(prediction=Half), "lacks loss of its prediction, Half; define"),
        (laplacian(__init__=with_options), r"loaded without options, got Laplacian\(scale\)"),
        (type("Empty", (Task,), {}), r"lacks a name, a prediction.*check_labels\(\).*law\(\)"),
        (Regression(), "takes a subclass of pyrolora.tasks.Task"),
        (dict, "takes a subclass of pyrolora.tasks.Task"),
    ],
)
def test_what_cannot_be_registered(kind: Any, words: str) -> None:
    before = available()
    with pytest.raises(ConfigError, match=words):
        register(kind)
    assert available() == before


def test_a_task_without_a_loader_asks_for_the_network(tmp_path: Any) -> None:
    register(laplacian(name="counts", load=classmethod(Task.load.__func__), auto=""))
    bert(1).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"'counts' are not loaded by name.*pass the network"):
        pyrolora.fit(tmp_path, reviews(4), "map", task="counts")


def test_labels_that_a_task_cannot_score_are_its_own_error() -> None:
    with pytest.raises(DataError, match="one number per example"):
        pyrolora.fit(mlp(4, 1), (DATA[0], torch.ones(12, 2)), "map", task=laplacian()())


def test_a_prediction_from_outside_has_its_own_metrics_wherever_metrics_are(tmp_path: Any) -> None:
    register(Counts)
    posterior = pyrolora.fit(
        mlp(4, 1),
        DATA,
        "meanfield",
        task="counts",
        adapter=pyrolora.AdapterConfig(r=1),
        eval_data=DATA,
        training=arguments(
            tmp_path,
            eval_strategy="steps",
            eval_steps=3,
            save_strategy="steps",
            save_steps=3,
            load_best_model_at_end=True,
            metric_for_best_model="mean_deviance",
        ),
    )
    assert any("eval_mean_deviance" in entry for entry in posterior.history)
    scores = posterior.evaluate(DATA, 3, seed=0)
    prediction = posterior.predict(DATA, 3, seed=0)
    assert prediction.loss is not None
    assert scores["mean_deviance"] == pytest.approx(float(prediction.loss.mean()))
    assert {*scores} == {*CountPrediction.higher_is_better}
    assert pyrolora.compare({"it": posterior}, DATA, 3).loc["it", "mean_deviance"] > 0
    page = report_on(posterior, DATA, num_samples=3)
    assert page.metrics["mean_deviance"] > 0
    row = page.html.partition("mean deviance</td>")[2].partition("</tr>")[0]
    assert "Lower is better." in row
    posterior.save(tmp_path / "saved")
    loaded = pyrolora.load(tmp_path / "saved", mlp(4, 1))
    assert loaded.evaluate(DATA, 3, seed=0) == pytest.approx(scores)
