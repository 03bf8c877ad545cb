"""Tables of a report: scores with their meanings, and the examples that are worth a look."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyrolora.predictive.standard_errors import Difference
from pyrolora.report.examples import Examples
from pyrolora.tasks import Prediction

SHOWN = 5
"""The number of examples in a table."""

MEANINGS: dict[str, tuple[str, str]] = {
    "accuracy": ("accuracy", "Share of right answers. Higher is better."),
    "nll": (
        "negative log-likelihood",
        "Nats per answer, or per token of texts. Lower is better.",
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
        "The mean risk over all shares of examples that are answered, the most certain first. "
        "Lower is better.",
    ),
    "exact_match": (
        "exact matches",
        "Share of examples whose whole answer is right. Higher is better.",
    ),
    "micro_f1": ("F1 over all labels", "Of all labels taken together. Higher is better."),
    "macro_f1": ("mean F1 of the labels", "Rare labels weigh as much. Higher is better."),
    "label_auroc": (
        "AUROC of the labels",
        "How well the probability of a label tells who has it: 0.5 is chance, 1 perfect.",
    ),
    "entity_f1": (
        "F1 of the entities",
        "Of whole entities, from the first to the last token. Higher is better.",
    ),
    "rmse": ("root mean squared error", "In units of the target. Lower is better."),
    "crps": (
        "CRPS",
        "Distance of the whole predictive distribution from the target, in its units. Lower is "
        "better.",
    ),
    "coverage": ("coverage", "Share of the targets inside the 90 % intervals: 0.9 is right."),
    "perplexity": ("perplexity", "exp(nats per token). Lower is better."),
    "ood_auroc": (
        "AUROC of other data",
        "How well the uncertainty tells the outside data from these: 0.5 is chance, 1 perfect.",
    ),
}


@dataclass(frozen=True)
class Table:
    """A table with a heading and a sentence below it."""

    title: str
    note: str
    rows: pd.DataFrame


DIRECTIONS = {True: "Higher is better.", False: "Lower is better.", None: ""}
"""How to read a metric of which no more is known than its direction."""


@dataclass(frozen=True)
class Estimate:
    """A metric's standard error, and its difference from that without the adapters, if known."""

    error: float
    difference: Difference | None = None

    def judged(self) -> str:
        """Return the difference in words: value, standard error, and whether it is chance."""
        if self.difference is None or not math.isfinite(self.difference.error):
            return "not known"
        words = "more than chance" if self.difference.more_than_chance else "may be chance"
        return f"{self.difference.value:+.3f} ± {self.difference.error:.3f}, {words}"


def metrics_table(
    metrics: Mapping[str, float],
    estimates: Mapping[str, Estimate],
    higher_is_better: Mapping[str, bool | None],
) -> pd.DataFrame:
    """Return a row per metric: its name, value, standard error, gain, and how to read it."""
    compared = any(one.difference is not None for one in estimates.values())
    rows = []
    for name, value in metrics.items():
        unknown = name.replace("_", " "), DIRECTIONS[higher_is_better.get(name)]
        title, text = MEANINGS.get(name, unknown)
        row: dict[str, Any] = {"metric": title, "value": value}
        if name in estimates:
            row["standard error"] = estimates[name].error
            if compared:
                row["against the network without adapters"] = estimates[name].judged()
        rows.append({**row, "how to read it": text})
    return pd.DataFrame(rows)


def example_tables(prediction: Prediction, examples: Examples) -> list[Table]:
    """Return the examples that are worth a look: confident errors, the most and least certain.

    Confident errors are those of the highest `Prediction.surprise`, where there is one.
    """
    order = _descending(prediction.uncertainty)
    tables = [
        _table("Most certain", "The lowest uncertainty of all.", order[::-1], prediction, examples),
        _table("Least certain", "The highest uncertainty of all.", order, prediction, examples),
    ]
    surprise = prediction.surprise
    if surprise is None:
        return tables
    order = _descending(surprise)
    note = prediction.surprise_note.format(count=len(order), total=len(surprise))
    return [_table("Confident errors", note, order, prediction, examples), *tables]


def _table(
    title: str, note: str, order: Sequence[int], prediction: Prediction, examples: Examples
) -> Table:
    """Return the table of the first rows in ``order``."""
    chosen = torch.tensor(order[:SHOWN], dtype=torch.long)
    if not len(chosen):
        return Table(title, note, pd.DataFrame())
    numbers = prediction.examples[chosen].tolist()
    columns = prediction.select(chosen).columns(
        lambda row, number: examples.label(numbers[row], number)
    )
    texts = [examples.text(number) for number in numbers]
    return Table(title, note, pd.DataFrame({"example": numbers, "text": texts, **columns}))


def _descending(values: Tensor) -> list[int]:
    """Return the numbers of the rows, highest value first, but for those not finite."""
    numbers = values.double().numpy()
    order = np.argsort(-numbers, kind="stable")
    return [int(i) for i in order if np.isfinite(numbers[i])]
