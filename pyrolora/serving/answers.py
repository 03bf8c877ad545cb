"""Results as JSON: the uncertainty of classes and of texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import combinations
from typing import Any, Literal

from pyrolora.predictive import Generation
from pyrolora.serving.answering import Answered
from pyrolora.serving.text import TokenScores, first_stop, pieces
from pyrolora.serving.verbs import Classes, Classify, Write

MASS = 0.9
"""The probability that an interval of a class probability holds."""

Finish = Literal["end", "stop", "length"]


def number(value: Any) -> float | None:
    """Return a number for JSON, which has no NaN and no infinity."""
    value = float(value)
    return value if math.isfinite(value) else None


def draws_of(settings: Classify | Write) -> dict[str, Any]:
    """Return which draws an answer is of."""
    about: dict[str, Any] = {"num_samples": settings.num_samples, "seed": settings.seed}
    return about if settings.draws is None else {**about, "draws": list(settings.draws)}


# Classes ----------------------------------------------------------------------------------------


def class_rows(prediction: Classes, settings: Classify, text: str) -> list[dict[str, Any]]:
    """Return the classes of one text as LoRAX's entities, the likeliest first.

    Each has the interval of its probability over draws in its ``uncertainty``, beside the numbers
    of the text.
    """
    probs = prediction.probs[0]
    names = prediction.classes or [str(k) for k in range(len(probs))]
    low, high = (bound[0] for bound in prediction.interval(MASS))
    about = class_uncertainty(prediction, settings)
    return [
        {
            "entity": names[k],
            "score": number(probs[k]),
            "index": k,
            "word": text,
            "start": 0,
            "end": len(text),
            "uncertainty": {**about, "low": number(low[k]), "high": number(high[k])},
        }
        for k in probs.argsort(descending=True, stable=True).tolist()
    ]


def class_uncertainty(prediction: Classes, settings: Classify) -> dict[str, Any]:
    """Return entropies in nats, and the share of draws that choose the predicted classes."""
    draws = prediction.draws[:, 0]
    same = (prediction.decided(draws) == prediction.predicted[0]).reshape(len(draws), -1).all(-1)
    return {
        **draws_of(settings),
        "entropy": number(prediction.entropy[0]),
        "aleatoric": number(prediction.aleatoric[0]),
        "epistemic": number(prediction.epistemic[0]),
        "agreement": number(same.float().mean()) if len(draws) > 1 else None,
    }


# Texts ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Continuation:
    """One continuation, cut at the first stop string.

    Attributes
    ----------
    text
        Without the stop string, and without tokens that are no text.
    ids, parts
        The tokens, and what each adds to the text.
    finish
        What ended it: the token for it, a stop string, or the length.
    uncertainty
        See `uncertainty_of`.
    scores
        Of the tokens, if they were asked for.
    """

    text: str
    ids: list[int]
    parts: list[str]
    finish: Finish
    uncertainty: dict[str, Any]
    scores: TokenScores | None


@dataclass(frozen=True)
class _Cut:
    """A continuation's tokens up to a stop string."""

    ids: list[int]
    parts: list[str]
    stopped: bool

    @property
    def text(self) -> str:
        return "".join(self.parts)


def continuations(answered: Answered, prompt: int) -> list[Continuation]:
    """Return the continuations of one prompt that answer the request."""
    written, settings = answered.written[prompt], answered.settings[prompt]
    generation, stops = written.generation, settings.stops
    cuts = [
        _cut(answered.tokenizer, row[mask].tolist(), stops)
        for row, mask in zip(generation.sequences[0], generation.mask[0], strict=True)
    ]
    agreement = _agreement(generation, cuts)
    answers = []
    for place, k in enumerate(written.order):
        one = cuts[k]
        ended = bool(one.ids) and one.ids[-1] in answered.ends
        short = int(generation.num_tokens[0, k]) < settings.max_new_tokens
        finish: Finish = "stop" if one.stopped else "end" if ended or short else "length"
        about = {
            **draws_of(settings),
            **({} if written.notes is None else written.notes[k]),
            **uncertainty_of(generation, k, one.parts),
            "agreement": agreement,
            "continuations": _others(generation, cuts, one.text),
        }
        scores = None if written.scores is None else written.scores[place]
        answers.append(Continuation(one.text, one.ids, one.parts, finish, about, scores))
    return answers


def uncertainty_of(generation: Generation, k: int, parts: Sequence[str]) -> dict[str, Any]:
    """Return entropies in nats of the tokens of continuation ``k``, and their means."""
    size = len(parts)
    values = {
        name: getattr(generation, name)[0, k, :size]
        for name in ("entropy", "aleatoric", "epistemic")
    }
    means = {name: number(v.mean()) if size else None for name, v in values.items()}
    tokens = [
        {"text": part, **{name: number(v[t]) for name, v in values.items()}}
        for t, part in enumerate(parts)
    ]
    return {**means, "tokens": tokens}


def _cut(tokenizer: Any, ids: list[int], stops: Sequence[str]) -> _Cut:
    parts = pieces(tokenizer, ids)
    place = first_stop("".join(parts), stops)
    if place is None:  # it may have ended with the name of a token that is no text
        return _Cut(ids, parts, stopped=any(stop in tokenizer.decode(ids) for stop in stops))
    kept: list[str] = []
    while place > 0:
        part = parts[len(kept)]
        kept.append(part[:place])
        place -= len(part)
    return _Cut(ids[: len(kept)], kept, stopped=True)


def _agreement(generation: Generation, cuts: Sequence[_Cut]) -> float | None:
    """Return `Generation.agreement` of the continuations up to their stop strings.

    Draws often write the same, and a pair of texts is compared once: many draws of long texts
    would take minutes otherwise.
    """
    compared: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
    ratios = []
    writers = zip(cuts, generation.draw.tolist(), strict=True)
    for (one, draw), (other, other_draw) in combinations(writers, 2):
        if draw == other_draw:
            continue
        pair = tuple(one.ids), tuple(other.ids)
        if pair not in compared:
            same = pair[0] == pair[1]
            compared[pair] = 1.0 if same else SequenceMatcher(None, *pair, False).ratio()
        ratios.append(compared[pair])
    return sum(ratios) / len(ratios) if ratios else None


def _others(generation: Generation, cuts: Sequence[_Cut], text: str) -> list[dict[str, Any]]:
    """Return each text that draws wrote in place of ``text``, with the numbers of these draws."""
    found: dict[str, list[int]] = {}
    for cut, draw in zip(cuts, generation.draw.tolist(), strict=True):
        if cut.text != text and draw not in found.setdefault(cut.text, []):
            found[cut.text].append(draw)
    return [{"text": other, "draws": draws} for other, draws in found.items()]
