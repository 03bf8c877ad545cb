"""Texts of a language model, token by token, with the entropy of each token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyrolora.columns import LABELS
from pyrolora.data import prepare
from pyrolora.report.examples import Examples
from pyrolora.report.facts import Subject
from pyrolora.tasks import Prediction

TEXTS = 2
"""The number of texts that are shown token by token."""


@dataclass(frozen=True)
class ShadedText:
    """A text, token by token.

    Attributes
    ----------
    title
        The heading.
    tokens
        Each token with its entropy in nats, and that over ``top``; both are None where a token is
        not predicted.
    top
        The highest entropy of all texts.
    """

    title: str
    tokens: list[tuple[str, float | None, float | None]]
    top: float


def shaded_texts(
    posterior: Subject, prediction: Prediction, examples: Examples, draws: Mapping[str, Any]
) -> list[ShadedText]:
    """Return the texts of the highest uncertainty, predicted again by the same ``draws``.

    Each is predicted alone: without padding it has as many entropies as tokens, but for the first
    tokens, which nothing predicts.
    """
    order = prediction.uncertainty.nan_to_num(-1).argsort(descending=True)[:TEXTS].tolist()
    texts = []
    for i in prediction.examples[order].tolist():
        example = examples.only(i)
        alone = posterior.predict(example, batch_size=1, **draws)
        assert alone.token_entropy is not None
        ids = prepare(
            example,
            posterior.base,
            posterior.task,
            posterior.tokenizer,
            need_labels=False,
            to_learn=False,
        ).examples[0][LABELS if posterior.task.writes == "apart" else "input_ids"]
        values = alone.token_entropy[0].tolist()
        first = [math.nan] * (len(ids) - len(values))
        texts.append((i, _words(ids, posterior.tokenizer), first + values))
    top = max((v for _, _, values in texts for v in values if math.isfinite(v)), default=0.0)
    return [
        ShadedText(
            f"example {i}",
            [
                (word, value, value / (top or 1)) if math.isfinite(value) else (word, None, None)
                for word, value in zip(words, values, strict=True)
            ],
            top,
        )
        for i, words, values in texts
    ]


def _words(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Return each token as text."""
    if tokenizer is None:
        return [f"{int(number)} " for number in ids]
    return [tokenizer.decode([int(number)]) if number >= 0 else "…" for number in ids]
