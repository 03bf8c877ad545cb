"""The texts of a language model, token by token, with the entropy of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyrolora.data import prepare
from pyrolora.report.examples import Examples
from pyrolora.report.facts import Subject
from pyrolora.tasks import Prediction

TEXTS = 2
"""Texts whose tokens are shown one by one."""


@dataclass(frozen=True)
class ShadedText:
    """A text token by token: each with its entropy in nats, and with that over the highest of all
    (None where a token is not predicted)."""

    title: str
    tokens: list[tuple[str, float | None, float | None]]
    top: float


def shaded_texts(
    posterior: Subject, prediction: Prediction, examples: Examples, num_samples: int, seed: int
) -> list[ShadedText]:
    """The texts of the highest entropy, by the same draws again, each alone: without padding, its
    tokens and their entropies are the same in number, but for the first that nothing predicts."""
    order = prediction.uncertainty.nan_to_num(-1).argsort(descending=True)[:TEXTS].tolist()
    read = []
    for i in prediction.examples[order].tolist():
        only = examples.only(i)
        alone = posterior.predict(only, num_samples, batch_size=1, seed=seed)
        assert alone.token_entropy is not None
        ids = prepare(
            only,
            posterior.base,
            posterior.task,
            posterior.tokenizer,
            need_labels=False,
            to_learn=False,
        ).examples[0]["input_ids"]
        values = alone.token_entropy[0].tolist()
        first = [math.nan] * (len(ids) - len(values))
        read.append((i, _words(ids, posterior.tokenizer), first + values))
    top = max((v for _, _, values in read for v in values if math.isfinite(v)), default=0.0)
    return [
        ShadedText(
            f"example {i}",
            [
                (word, value, value / (top or 1)) if math.isfinite(value) else (word, None, None)
                for word, value in zip(words, values, strict=True)
            ],
            top,
        )
        for i, words, values in read
    ]


def _words(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Each token as text."""
    if tokenizer is None:
        return [f"{int(number)} " for number in ids]
    return [tokenizer.decode([int(number)]) for number in ids]
