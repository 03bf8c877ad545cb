"""The two things that a posterior is asked for: classes of a text, and continuations of one.

Rows with equal settings share a pass; each gets what the posterior gives for that row alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor
from torch.utils.data import Dataset

from pyrolora import defaults
from pyrolora.posterior import Posterior
from pyrolora.predictive import (
    ClassPrediction,
    Generation,
    MultiLabelPrediction,
    Question,
    RegressionPrediction,
    predict_mixed,
)
from pyrolora.predictive.ranking import chosen
from pyrolora.serving.drawn import Drawn
from pyrolora.serving.text import TokenScores, token_scores

Columns = dict[str, list[int]]
Classes = ClassPrediction | MultiLabelPrediction
Labels = Classes | RegressionPrediction
"""What is predicted of one text; a `TagPrediction` has a row per token."""


class Rows(Dataset[Columns]):
    """The rows of a batch as a data set of torch.

    A ``datasets.Dataset`` makes fingerprints, a third of the time of a small batch.
    """

    def __init__(self, rows: Sequence[Columns]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Columns:
        return self.rows[index]


@dataclass(frozen=True)
class Classify:
    """Class probabilities under ``num_samples`` draws of ``seed``, or those with numbers."""

    num_samples: int
    seed: int | None
    draws: tuple[int, ...] | None = None

    shares: ClassVar[bool] = True
    length: ClassVar[int] = 0

    @property
    def passes(self) -> int:
        """How often a row goes through the network."""
        return max(self.num_samples, 1)

    def question(self, posterior: Posterior, rows: Sequence[Columns], drawn: Drawn) -> Question:
        """Return what these draws of the posterior are asked."""
        predictor = posterior.predictor
        factors = drawn.factors(posterior, self.num_samples, self.seed, self.draws)
        return Question(predictor, factors, predictor.prepare(Rows(rows), need_labels=False))


def classified(asked: Sequence[tuple[Posterior, Classify, Columns]], drawn: Drawn) -> list[Labels]:
    """Return what is predicted of every row, which posteriors of one family are asked for."""
    places: dict[tuple[int, Classify], list[int]] = {}
    for place, (posterior, settings, _) in enumerate(asked):
        places.setdefault((id(posterior), settings), []).append(place)
    groups = [*places.values()]
    questions = [
        settings.question(posterior, [asked[place][2] for place in group], drawn)
        for group in groups
        for posterior, settings, _ in [asked[group[0]]]
    ]
    answers: dict[int, Labels] = {}
    for group, prediction in zip(groups, predict_mixed(questions), strict=True):
        assert isinstance(prediction, Labels)
        for i, place in enumerate(group):
            answers[place] = prediction.select((prediction.examples == i).nonzero().flatten())
    return [answers[place] for place in range(len(asked))]


@dataclass(frozen=True)
class Write:
    """Continuations by every one of ``num_samples`` draws of ``seed``, which also chooses tokens.

    Attributes
    ----------
    draws
        The numbers of the draws; None: they have none.
    max_new_tokens
        The most tokens of a continuation.
    several
        Continuations per draw.
    options
        Of ``generate``, as pairs of name and value.
    sampled
        Whether tokens are sampled. Rows of such settings run alone: the random numbers of a row
        would depend on its neighbours.
    choices
        How many continuations are answered with.
    alternatives
        How many of the likeliest tokens are scored at every place; None: no token is scored.
    """

    num_samples: int
    seed: int | None
    draws: tuple[int, ...] | None = None
    max_new_tokens: int = defaults.MAX_NEW_TOKENS
    several: int = 1
    options: tuple[tuple[str, Any], ...] = ()
    sampled: bool = False
    choices: int = 1
    alternatives: int | None = None

    @property
    def shares(self) -> bool:
        return not self.sampled

    @property
    def length(self) -> int:
        return self.max_new_tokens

    @property
    def passes(self) -> int:
        """How many rows of the network a prompt is."""
        return max(self.num_samples, 1) * self.several

    def run(self, posterior: Posterior, rows: Sequence[Columns]) -> list[Written]:
        prompts = [row["input_ids"] for row in rows]
        generation = posterior.generate(
            {"input_ids": prompts, "attention_mask": [[1] * len(ids) for ids in prompts]},
            self.num_samples if self.draws is None else None,
            draws=self.draws,
            seed=self.seed,
            do_sample=self.sampled,
            max_new_tokens=self.max_new_tokens,
            num_return_sequences=self.several,
            **dict(self.options),
        )
        return [
            self._written(posterior, ids, alone(generation, i)) for i, ids in enumerate(prompts)
        ]

    def _written(self, posterior: Posterior, prompt: list[int], one: Generation) -> Written:
        order = chosen(one, self.choices, sampled=self.sampled)
        scores = None
        if self.alternatives is not None:
            scores = token_scores(
                posterior,
                prompt,
                [one.sequences[0, k][one.mask[0, k]] for k in order],
                num_samples=self.num_samples,
                seed=self.seed,
                draws=self.draws,
                alternatives=self.alternatives,
            )
        return Written(one, order, scores)


@dataclass(frozen=True)
class Written:
    """The continuations of one prompt, and which of them are the answer.

    Attributes
    ----------
    generation
        Of the one prompt.
    order
        The places of the continuations that are answered with.
    scores
        Of each of these, if they were asked for.
    notes
        Per continuation of the generation, what its uncertainty says beside the numbers.
    """

    generation: Generation
    order: list[int]
    scores: list[TokenScores] | None
    notes: Sequence[dict[str, Any]] | None = None


def alone(generation: Generation, i: int) -> Generation:
    """Return the part of a generation that belongs to prompt ``i``, without others' padding."""
    longest = max(int(generation.mask[i].sum(-1).max()), 1)

    def row(values: Tensor) -> Tensor:
        return values[i : i + 1, :, :longest]

    def own(texts: Any) -> Any:
        return None if texts is None else [texts[i]]

    return replace(
        generation,
        sequences=row(generation.sequences),
        mask=row(generation.mask),
        entropy=row(generation.entropy),
        aleatoric=row(generation.aleatoric),
        log_likelihood=generation.log_likelihood[:, i : i + 1],
        prompts=own(generation.prompts),
        texts=own(generation.texts),
        tokens=own(generation.tokens),
    )
