"""The best model is the best by the metric's own direction, and a metric has to be known."""

from __future__ import annotations

import pytest
import torch
from problems import arguments, bert_tags, llama, mlp, tagged, tokenizer, tokens
from transformers import EarlyStoppingCallback

import pyrolora
from pyrolora.errors import ConfigError
from pyrolora.predictive import (
    ClassPrediction,
    RegressionPrediction,
    TagPrediction,
    TokenPrediction,
    evaluate,
)
from pyrolora.tasks import available

OPTIONS = {"adapter": pyrolora.AdapterConfig(r=1)}
CLASSES = (torch.randn(16, 4, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3)
NUMBERS = (CLASSES[0], CLASSES[0].sum(-1))


def fitted(tmp_path, metric, data=CLASSES, task="classification", callbacks=(), **changes):
    """Trained on labels, scored on others: from epoch to epoch the model gets worse."""
    options = {
        "max_steps": -1,
        "num_train_epochs": 4,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
        "learning_rate": 0.1,
        **changes,
    }
    labels = data[1].flip(0) if task == "classification" else -data[1]
    return pyrolora.fit(
        mlp(outputs=3 if task == "classification" else 1),
        data,
        "map",
        eval_data=(data[0], labels),
        task=task,
        training=arguments(tmp_path, **options),
        callbacks=callbacks,
        **OPTIONS,
    )


def kept_and_all(posterior, metric, data, labels):
    name = metric.removeprefix("eval_").replace("loss", "nll")
    scores = [entry[f"eval_{name}"] for entry in posterior.history if f"eval_{name}" in entry]
    return posterior.evaluate((data, labels), 0)[name], scores


@pytest.mark.parametrize("metric", ["nll", "eval_nll", "loss", "eval_loss", "ece", "brier", "aurc"])
def test_the_lowest_is_kept_where_lower_is_better(metric, tmp_path):
    posterior = fitted(tmp_path, metric)
    kept, scores = kept_and_all(posterior, metric, CLASSES[0], CLASSES[1].flip(0))
    assert kept == pytest.approx(min(scores), abs=1e-6)
    assert max(scores) > min(scores) + 1e-3


@pytest.mark.parametrize("metric", ["rmse", "crps", "nll"])
def test_the_lowest_error_of_a_regression_is_kept(metric, tmp_path):
    posterior = fitted(tmp_path, metric, NUMBERS, "regression")
    kept, scores = kept_and_all(posterior, metric, NUMBERS[0], -NUMBERS[1])
    assert kept == pytest.approx(min(scores), rel=1e-5)
    assert max(scores) > min(scores) + 1e-3


def test_the_highest_is_kept_where_higher_is_better(tmp_path):
    posterior = fitted(tmp_path, "accuracy")
    kept, scores = kept_and_all(posterior, "accuracy", CLASSES[0], CLASSES[1].flip(0))
    assert kept == max(scores) > min(scores)


def test_training_stops_when_the_metric_gets_worse_and_the_best_alone_is_saved(tmp_path):
    changes = {"num_train_epochs": 20, "save_strategy": "best"}
    posterior = fitted(tmp_path, "nll", callbacks=EarlyStoppingCallback(2), **changes)
    kept, scores = kept_and_all(posterior, "nll", CLASSES[0], CLASSES[1].flip(0))
    assert len(scores) < 20
    assert scores.index(min(scores)) == len(scores) - 3
    assert kept == pytest.approx(min(scores), abs=1e-6)


def test_a_rate_that_waits_for_a_plateau_follows_the_metric(tmp_path):
    """At patience 0 the rate falls after each evaluation that is no better than the best."""
    changes = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0}}
    modes = []

    class Mode(EarlyStoppingCallback):
        def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
            modes.append(lr_scheduler.mode)

    for metric in ("accuracy", "nll"):
        fitted(tmp_path, metric, callbacks=Mode(9), num_train_epochs=1, **changes)
    assert set(modes[:4]) == {"max"}
    assert set(modes[4:]) == {"min"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "f1"}, "none of loss, accuracy, nll, ece, brier, error_auroc, aurc"),
        ({"metric": "rmse"}, "none of loss, accuracy"),
        ({"metric": "accuracy", "greater_is_better": False}, "has the highest 'accuracy'"),
        ({"metric": "loss", "greater_is_better": True}, "has the lowest 'loss'"),
        (
            {"metric": None, "load_best_model_at_end": False, "save_strategy": "best"},
            "set metric_for_best_model",
        ),
        (
            {
                "metric": None,
                "load_best_model_at_end": False,
                "callbacks": [EarlyStoppingCallback()],
            },
            "set metric_for_best_model",
        ),
        (
            {
                "metric": "nll",
                "load_best_model_at_end": False,
                "eval_strategy": "no",
                "callbacks": [EarlyStoppingCallback()],
            },
            "set eval_strategy",
        ),
    ],
)
def test_what_has_no_best_is_refused_before_the_training(changes, message, tmp_path, steps):
    with pytest.raises(ConfigError, match=message):
        fitted(tmp_path, **changes)
    assert not steps


def test_coverage_is_no_metric_of_the_best(tmp_path):
    with pytest.raises(ConfigError, match="none of loss, rmse, nll, crps, aurc"):
        fitted(tmp_path, "coverage", NUMBERS, "regression")


def test_every_metric_has_its_direction():
    posteriors = {
        ClassPrediction: (mlp(), CLASSES, {"task": "classification", **OPTIONS}),
        RegressionPrediction: (mlp(outputs=1), NUMBERS, {"task": "regression", **OPTIONS}),
        TagPrediction: (
            bert_tags(id2label={0: "O", 1: "B-X", 2: "I-X"}),
            tagged(4),
            {"tokenizer": tokenizer(), **OPTIONS},
        ),
        TokenPrediction: (llama(), tokens(4).remove_columns("labels"), OPTIONS),
    }
    for kind, (network, data, options) in posteriors.items():
        posterior = pyrolora.fit(network, data, "map", epochs=1, **options)
        found = posterior.predictor.predict(data, 0, 4, None, need_labels=True)
        assert type(found) is kind
        assert [*evaluate(found)] == [*kind.higher_is_better]
    assert len(available()) == 13  # a new task may bring a kind of prediction
