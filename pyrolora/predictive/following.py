"""Rows of a pass that requests share: each is chosen, followed and ended by its own rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from pyrolora.predictive.decoding import StopStrings
from pyrolora.tasks.prediction import entropy_of

USUAL_TOP_K = 50
"""The ``top_k`` of transformers' sampling where nothing is said."""


@dataclass(frozen=True)
class NewToken:
    """A token that has just been written by the only draw there is.

    Attributes
    ----------
    place
        Its place in the continuation, from 0.
    id
        The token.
    last
        Whether it ends its continuation.
    logprob, entropy
        log p of the token, and H[p], in nats, with p the law of the draw whatever the decoding.
    ids, logprobs
        The likeliest tokens, as many as the follower asked for, and their log p.
    """

    place: int
    id: int
    last: bool
    logprob: float
    entropy: float
    ids: list[int]
    logprobs: list[float]


class Follower(Protocol):
    """Is told of every token at once, in the thread that writes."""

    alternatives: int
    """How many of the likeliest tokens it wants to know."""

    def __call__(self, continuation: int, token: NewToken) -> None:
        """Take the next token of the continuation with this number."""


@dataclass(eq=False)
class Part:
    """The rows of one request in a pass.

    Attributes
    ----------
    rows
        Their numbers, draw after draw, and for each draw continuation after continuation.
    length
        The most tokens of each.
    ends
        The ids that end a text.
    stops
        The texts that end it, if there are any.
    sampling
        The settings of sampled tokens; None: the likeliest token is taken.
    generator
        The random numbers of sampled tokens.
    wanted
        Whether anybody waits for the text.
    follower
        Is told of each token; None: nobody is.
    """

    rows: Tensor
    length: int
    ends: set[int]
    stops: StopStrings | None
    sampling: GenerationConfig | None
    generator: torch.Generator | None
    wanted: Callable[[], bool]
    follower: Follower | None

    @cached_property
    def warpers(self) -> LogitsProcessorList:
        """The changes to the logits before tokens are sampled, in transformers' order."""
        settings: Any = self.sampling
        made = LogitsProcessorList()
        if settings.temperature not in (None, 1.0):
            made.append(TemperatureLogitsWarper(settings.temperature))
        top_k = USUAL_TOP_K if settings.top_k is None else settings.top_k
        if top_k:
            made.append(TopKLogitsWarper(top_k))
        if settings.top_p is not None and settings.top_p < 1:
            made.append(TopPLogitsWarper(settings.top_p))
        if settings.typical_p is not None and settings.typical_p < 1:
            made.append(TypicalLogitsWarper(settings.typical_p))
        return made


class Choosing(LogitsProcessor):
    """Samples the tokens of each request with its own settings and random numbers.

    The pass takes the likeliest token of each row, which is made the sampled one. A request's rows
    are sampled together, so that its random numbers are used as in a pass that it has for itself.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = [part for part in parts if part.sampling is not None]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for part in self.parts:
            warped = part.warpers(input_ids[part.rows], scores[part.rows])
            chosen = torch.multinomial(warped.softmax(-1), 1, generator=part.generator)
            certain = torch.full_like(warped, -torch.inf).scatter_(1, chosen, 0)
            scores = scores.index_copy(0, part.rows, certain)
        return scores


class Following(StoppingCriteria):
    """Ends each row by the rule of its request, and tells of new tokens.

    Parameters
    ----------
    parts
        The requests.
    before
        The number of tokens of the padded prompts.
    logits
        Returns the logits (rows, vocabulary) of the newest tokens.
    """

    def __init__(self, parts: Sequence[Part], before: int, logits: Callable[[], Tensor]) -> None:
        self.parts = parts
        self.before = before
        self.logits = logits
        self.done: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.done is None:
            self.done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        written = input_ids[:, self.before :]
        for part in self.parts:
            if not part.wanted():
                self.done[part.rows] = True
                continue
            before = self.done[part.rows]
            after = before | self._ended(part, written[part.rows], before)
            if part.follower is not None:
                self._tell(part, written[part.rows], before, after)
            self.done[part.rows] = after
        return self.done

    def _ended(self, part: Part, written: Tensor, before: Tensor) -> Tensor:
        """Return which rows end with their newest token."""
        ended = torch.isin(written[:, -1], written.new_tensor(sorted(part.ends)))
        if written.shape[1] >= part.length:
            return torch.ones_like(ended)
        if part.stops is not None:
            for row in (~(before | ended)).nonzero().flatten().tolist():
                ended[row] = part.stops.end(written[row].tolist())
        return ended

    def _tell(self, part: Part, written: Tensor, before: Tensor, after: Tensor) -> None:
        assert part.follower is not None
        if bool(before.all()):
            return
        place, newest = written.shape[1] - 1, written[:, -1]
        logs = self.logits()[part.rows].float().log_softmax(-1)
        chosen = logs.gather(-1, newest[:, None]).squeeze(-1).tolist()
        entropies = entropy_of(logs.exp()).tolist()
        best = logs.topk(min(part.follower.alternatives, logs.shape[-1]), dim=-1)
        for k, token in enumerate(newest.tolist()):
            if not before[k]:
                new = NewToken(
                    place,
                    token,
                    bool(after[k]),
                    chosen[k],
                    entropies[k],
                    best.indices[k].tolist(),
                    best.values[k].tolist(),
                )
                part.follower(k, new)
