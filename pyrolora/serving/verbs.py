"""The two things that a posterior is asked for: classes of a text, and continuations of one.

Rows of several posteriors share a pass; each gets what its posterior gives for that row alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.utils.data import Dataset

from pyrolora import defaults
from pyrolora.posterior import Posterior
from pyrolora.predictive import (
    Ask,
    ClassPrediction,
    Follower,
    Generation,
    MultiLabelPrediction,
    Question,
    RegressionPrediction,
    generate_mixed,
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

    length: ClassVar[int] = 0

    @property
    def passes(self) -> int:
        """How often a row goes through the network."""
        return max(self.num_samples, 1)

    def question(self, posterior: Posterior, rows: Sequence[Columns], drawn: Drawn) -> Question:
        """Return what these draws of the posterior are asked."""
        predictor = posterior.predictor
        factors = drawn.factors(posterior, self.num_samples, self.seed, self.draws)
        prepared = predictor.prepare(Rows(rows), need_labels=False)
        return Question(predictor, factors, prepared, [len(row["input_ids"]) for row in rows])


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
    stops
        The texts that end a continuation.
    sampled
        Whether tokens are sampled.
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
    stops: tuple[str, ...] = ()
    sampled: bool = False
    choices: int = 1
    alternatives: int | None = None

    @property
    def length(self) -> int:
        return self.max_new_tokens

    @property
    def passes(self) -> int:
        """How many rows of the network a prompt is."""
        return max(self.num_samples, 1) * self.several

    @property
    def follows(self) -> bool:
        """Whether the tokens are the answer's as soon as they are written, by the only draw."""
        return self.num_samples <= 1

    def ask(
        self,
        posterior: Posterior,
        row: Columns,
        drawn: Drawn,
        wanted: Callable[[], bool] = lambda: True,
        follower: Follower | None = None,
    ) -> Ask:
        """Return what these draws of the posterior are asked to write."""
        options = {
            "do_sample": self.sampled,
            "max_new_tokens": self.max_new_tokens,
            "num_return_sequences": self.several,
            **({"stop_strings": [*self.stops]} if self.stops else {}),
            **dict(self.options),
        }
        return Ask(
            posterior.predictor,
            row["input_ids"],
            self.num_samples,
            self.seed,
            self.draws,
            options,
            *drawn.drawn(posterior, self.num_samples, self.seed, self.draws),
            wanted,
            follower,
        )

    def written(self, posterior: Posterior, asked: Ask, generation: Generation) -> Written:
        """Return the answer among the continuations."""
        order = chosen(generation, self.choices, sampled=self.sampled)
        scores = None
        if self.alternatives is not None:
            scores = token_scores(
                posterior,
                asked.prompt,
                [generation.sequences[0, k][generation.mask[0, k]] for k in order],
                asked.factors,
                alternatives=self.alternatives,
            )
        return Written(generation, order, scores)


@dataclass(frozen=True)
class ToWrite:
    """A prompt of a request.

    Attributes
    ----------
    posterior, settings, row
        The posterior, what it is asked, and the tokens.
    wanted, follower
        As in `Ask`.
    """

    posterior: Posterior
    settings: Write
    row: Columns
    wanted: Callable[[], bool] = lambda: True
    follower: Follower | None = None


def written(prompts: Sequence[ToWrite], drawn: Drawn) -> list[Written | None]:
    """Return the continuations of every prompt, which posteriors of one family are asked for.

    None for those that nobody wants any more.
    """
    asked = [
        one.settings.ask(one.posterior, one.row, drawn, one.wanted, one.follower) for one in prompts
    ]
    return [
        None if made is None else one.settings.written(one.posterior, ask, made)
        for one, ask, made in zip(prompts, asked, generate_mixed(asked), strict=True)
    ]


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
