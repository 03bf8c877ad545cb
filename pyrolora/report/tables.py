"""The tables of a report: scores with what they mean, and the examples that are worth a look."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from pyrolora.predictive import (
    ClassPrediction,
    Prediction,
    RegressionPrediction,
    TokenPrediction,
)
from pyrolora.report.examples import Examples

SHOWN = 5
"""Examples of a table."""

MEANINGS: dict[str, tuple[str, str]] = {
    "accuracy": ("accuracy", "Share of right answers."),
    "nll": (
        "negative log-likelihood",
        "Nats for each answer; of texts, for each token. Lower is better.",
    ),
    "ece": (
        "calibration error",
        "Mean gap between confidence and accuracy, over bins. Lower is better.",
    ),
    "brier": ("Brier score", "Squared error of the probabilities, from 0 to 2. Lower is better."),
    "error_auroc": (
        "AUROC of errors",
        "How well the entropy tells wrong answers from right ones: 0.5 is chance, 1 perfect.",
    ),
    "aurc": (
        "area under risk-coverage",
        "The risk when only the most certain are answered, over all shares. Lower is better.",
    ),
    "rmse": ("root mean squared error", "In units of the target. Lower is better."),
    "crps": (
        "CRPS",
        "Distance of the whole predictive law to the target, in its units. Lower is better.",
    ),
    "coverage": ("coverage", "Share of the targets inside the 90 % intervals: 0.9 is right."),
    "perplexity": ("perplexity", "exp(nats a token). Lower is better."),
    "ood_auroc": (
        "AUROC of other data",
        "How well the uncertainty tells the outside data from these: 0.5 is chance, 1 perfect.",
    ),
}


@dataclass(frozen=True)
class Table:
    """A heading, a sentence below it, and rows."""

    title: str
    note: str
    rows: pd.DataFrame


def metrics_table(metrics: Mapping[str, float]) -> pd.DataFrame:
    """A row a metric: its name, its value, how to read it."""
    named = [(MEANINGS.get(name, (name.replace("_", " "), "")), v) for name, v in metrics.items()]
    return pd.DataFrame(
        [
            {"metric": title, "value": value, "how to read it": text}
            for (title, text), value in named
        ]
    )


@singledispatch
def example_tables(prediction: Prediction, examples: Examples) -> list[Table]:
    """The errors that were made with confidence, if there are labels; the most certain examples and
    the least certain ones."""
    raise TypeError(f"no table for {type(prediction).__name__}")


@example_tables.register
def _(prediction: ClassPrediction, examples: Examples) -> list[Table]:
    confidence, predicted = prediction.probs.amax(-1), prediction.predicted
    entropy, mutual = prediction.entropy, prediction.epistemic

    def row(i: int) -> dict[str, Any]:
        found: dict[str, Any] = {"example": i, "text": examples.text(i)}
        if prediction.targets is not None:
            found["target"] = examples.label(i, int(prediction.targets[i]))
        return {
            **found,
            "predicted": examples.label(i, int(predicted[i])),
            "probability": float(confidence[i]),
            "entropy": float(entropy[i]),
            "mutual information": float(mutual[i]),
        }

    tables = _by_certainty(prediction, row)
    if prediction.loss is not None:
        wrong = prediction.loss.numpy() > 0
        order = [i for i in _descending(confidence) if wrong[i]]
        note = f"{wrong.sum()} of {len(wrong)} answers are wrong; these are the surest of them."
        tables.insert(0, _table("Confident errors", note, order, row))
    return tables


@example_tables.register
def _(prediction: RegressionPrediction, examples: Examples) -> list[Table]:
    low, high = prediction.interval(0.9)
    mean, std, between = prediction.mean, prediction.std, prediction.epistemic
    errors = None if prediction.targets is None else prediction.targets - mean

    def row(i: int) -> dict[str, Any]:
        found: dict[str, Any] = {"example": i, "text": examples.text(i)}
        if prediction.targets is not None and errors is not None:
            found["target"] = float(prediction.targets[i])
            found["error in sd"] = float(errors[i] / std[i])
        return {
            **found,
            "mean": float(mean[i]),
            "90 % interval": f"{low[i]:.3g} to {high[i]:.3g}",
            "sd": float(std[i]),
            "sd between draws": float(between[i]),
        }

    tables = _by_certainty(prediction, row)
    if errors is not None:
        order = _descending((errors / std).abs())
        note = "The targets that lie furthest from the mean, in predictive standard deviations."
        tables.insert(0, _table("Confident errors", note, order, row))
    return tables


@example_tables.register
def _(prediction: TokenPrediction, examples: Examples) -> list[Table]:
    mutual, entropy = prediction.epistemic.nanmean(-1), prediction.uncertainty
    loss = prediction.loss

    def row(i: int) -> dict[str, Any]:
        found: dict[str, Any] = {"example": i, "text": examples.text(i)}
        if loss is not None:
            found["nats a token"] = float(loss[i])
        return {
            **found,
            "entropy": float(entropy[i]),
            "mutual information": float(mutual[i]),
            "tokens": int(prediction.num_tokens[i]),
        }

    tables = _by_certainty(prediction, row)
    if loss is not None:
        order = _descending(loss - entropy)
        note = "The texts that cost most nats a token above what their entropy expects."
        tables.insert(0, _table("Confident errors", note, order, row))
    return tables


def _by_certainty(prediction: Prediction, row: Callable[[int], dict[str, Any]]) -> list[Table]:
    order = _descending(prediction.uncertainty)
    return [
        _table("Most certain", "The lowest uncertainty of all.", order[::-1], row),
        _table("Least certain", "The highest uncertainty of all.", order, row),
    ]


def _table(
    title: str, note: str, order: Sequence[int], row: Callable[[int], dict[str, Any]]
) -> Table:
    return Table(title, note, pd.DataFrame([row(int(i)) for i in order[:SHOWN]]))


def _descending(values: Tensor) -> list[int]:
    """Numbers of the examples, the highest value first; without those that have none."""
    numbers = values.double().numpy()
    order = np.argsort(-numbers, kind="stable")
    return [int(i) for i in order if np.isfinite(numbers[i])]
