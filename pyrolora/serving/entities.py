"""Answers of `/classify`: a class per text, a tag per word, or a number, each as an entity."""

from __future__ import annotations

from typing import Any

import torch

from pyrolora.predictive import RegressionPrediction, TagPrediction
from pyrolora.serving.answers import MASS, class_rows, draws_of, number
from pyrolora.serving.errors import UnsupportedError
from pyrolora.serving.verbs import Classify, Labels

VALUE = "value"
"""The entity of a regression, whose score is the predictive mean."""


def entities(
    prediction: Labels, settings: Classify, text: str, tokenizer: Any
) -> list[dict[str, Any]]:
    """Return what is predicted of one text as LoRAX's entities."""
    if isinstance(prediction, RegressionPrediction):
        return [_value(prediction, settings, text)]
    if isinstance(prediction, TagPrediction):
        return _tags(prediction, settings, text, tokenizer)
    return class_rows(prediction, settings, text)


def _value(prediction: RegressionPrediction, settings: Classify, text: str) -> dict[str, Any]:
    """Return the number of a text; spreads are standard deviations, in units of the target."""
    low, high = prediction.interval(MASS)
    about = {
        name: number(getattr(prediction, name)[0])
        for name in ("std", "aleatoric", "epistemic", "entropy")
    }
    return {
        "entity": VALUE,
        "score": number(prediction.mean[0]),
        "index": 0,
        "word": text,
        "start": 0,
        "end": len(text),
        "uncertainty": {
            **draws_of(settings),
            **about,
            "agreement": None,
            "low": number(low[0]),
            "high": number(high[0]),
        },
    }


def _tags(
    prediction: TagPrediction, settings: Classify, text: str, tokenizer: Any
) -> list[dict[str, Any]]:
    """Return the likeliest tag of every word, which is that of its first token, as in the fit."""
    row_of = {place: row for row, place in enumerate(prediction.position.tolist())}
    words = [(row_of[place], place, span) for place, span in words_of(tokenizer, text)]
    rows = torch.tensor([row for row, _, _ in words], dtype=torch.long)
    chosen = prediction.select(rows)
    classes = chosen.predicted
    names = prediction.classes or [str(k) for k in range(prediction.probs.shape[-1])]
    numbers = {name: getattr(chosen, name) for name in ("entropy", "aleatoric", "epistemic")}
    low, high = chosen.interval(MASS)
    agreement = (chosen.draws.argmax(-1) == classes).float().mean(0)
    found = []
    for i, (_, place, (start, end)) in enumerate(words):
        k = int(classes[i])
        about = {name: number(values[i]) for name, values in numbers.items()}
        found.append(
            {
                "entity": names[k],
                "score": number(chosen.probs[i, k]),
                "index": place,
                "word": text[start:end],
                "start": start,
                "end": end,
                "uncertainty": {
                    **draws_of(settings),
                    **about,
                    "agreement": number(agreement[i]) if len(chosen.draws) > 1 else None,
                    "low": number(low[i, k]),
                    "high": number(high[i, k]),
                },
            }
        )
    return found


def words_of(tokenizer: Any, text: str) -> list[tuple[int, tuple[int, int]]]:
    """Return the words of a text, as the tokenizer splits it.

    Each has the place of its first token, and where it stands in the text.

    Raises
    ------
    UnsupportedError
        For a tokenizer that does not say which words its tokens are of.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedError(
            "the tokenizer of this posterior does not say where its tokens stand in a text; tags "
            "of words need a fast one (tokenizers' own)",
            "model",
        )
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    first: dict[int, int] = {}
    spans: dict[int, tuple[int, int]] = {}
    for place, word in enumerate(encoded.word_ids(0)):
        if word is None:  # a special token
            continue
        start, end = encoded["offset_mapping"][place]
        first.setdefault(word, place)
        begin, _ = spans.get(word, (start, end))
        spans[word] = (begin, end)
    return [(place, spans[word]) for word, place in first.items()]
