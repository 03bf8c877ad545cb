"""A gateway to vLLM: one request becomes one per draw, and every draw scores every continuation."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from starlette.requests import Request

from pyrolora.data.media.media import tokenizer_of
from pyrolora.predictive.decoding import StopStrings, until_end
from pyrolora.predictive.ranking import chosen
from pyrolora.serving.answering import Answered, named
from pyrolora.serving.asking import Asking, Draws, Sampling, seeded
from pyrolora.serving.errors import (
    BusyError,
    UnknownPosteriorError,
    UnsupportedError,
)
from pyrolora.serving.limits import Limits
from pyrolora.serving.metrics import Metrics
from pyrolora.serving.streaming import Stream, at_once
from pyrolora.serving.text import tokenized
from pyrolora.serving.verbs import Write, Written
from pyrolora.serving.vllm.asked import Asked, numbers_of, vllm_options
from pyrolora.serving.vllm.engine import (
    ALL,
    Engine,
    EngineError,
    EngineRefusalError,
    Model,
    TokenLogs,
    together,
)
from pyrolora.serving.vllm.exported import Adapter, Exported
from pyrolora.serving.vllm.scores import coarse, generation, token_scores, whole
from pyrolora.serving.waiting import in_time
from pyrolora.tasks import CausalLM

SEEDS = 2**63

logger = logging.getLogger(__name__)


class Catalogue:
    """The names of the posteriors of a gateway."""

    def __init__(self, posteriors: Sequence[Exported]) -> None:
        self.posteriors = {posterior.name: posterior for posterior in posteriors}

    def names(self) -> list[str]:
        return sorted(self.posteriors)

    def task(self, name: str) -> str | None:
        return CausalLM.name if name in self.posteriors else None


class Gateway:
    """Answers requests by the draws that an engine serves, as `Service` does by those in memory.

    Every draw writes its continuations in the engine; then every draw scores all of them there, and
    the uncertainty is computed here of these scores.

    Parameters
    ----------
    engine
        The engine.
    posteriors
        The posteriors, which `ready` has seen.
    base
        The engine's base model.
    limits
        Of requests; ``queue`` is the most texts under way.
    default
        The posterior of requests that name none; None: the only one there is.
    num_samples
        Draws of requests that do not say; None: all that were exported.
    top
        The tokens per place whose log-probabilities the engine is asked for; -1: all.
    """

    def __init__(
        self,
        engine: Engine,
        posteriors: Sequence[Exported],
        base: Model,
        limits: Limits | None = None,
        *,
        default: str | None = None,
        num_samples: int | None = None,
        top: int = ALL,
    ) -> None:
        self.engine = engine
        self.registry = Catalogue(posteriors)
        self.base = base
        self.limits = limits or Limits()
        self.default = default
        self.num_samples = num_samples
        self.top = top
        self.metrics = Metrics()
        self._asking = Asking(self.limits, num_samples, 0)
        self._texts = 0
        self.metrics.watch(lambda: self._texts, lambda: len(posteriors), lambda: 0)

    async def finish(self) -> None:
        """Close the connections to the engine."""
        await self.engine.close()

    def facts(self) -> dict[str, Any]:
        """Return what ``/info`` says of the gateway."""
        return {
            "model_id": self.base.name,
            "engine": "vllm",
            "top_logprobs": self.top,
            "posteriors": self.registry.names(),
            "draws": {p.name: len(p.adapters) for p in self.registry.posteriors.values()},
        }

    async def classify(
        self, request: Request, name: str | None, texts: Sequence[str], draws: Draws
    ) -> NoReturn:
        """Refuse: adapters of vLLM have no classes."""
        posterior = self._posterior(name)
        raise UnsupportedError(
            f"the posterior {posterior.name!r} is of the task {CausalLM.name!r} and served by "
            "vLLM, which writes text; classes are those of a classification, by 'pyrolora serve' "
            "without --engine",
            "model",
        )

    async def write(
        self,
        request: Request,
        name: str | None,
        prompts: Callable[[Any], Sequence[str]],
        draws: Draws,
        sampling: Sampling,
    ) -> Answered:
        """Return continuations of prompts, which may depend on the posterior's tokenizer."""
        until = time.monotonic() + self.limits.timeout
        posterior = self._posterior(name)
        asked = await asyncio.to_thread(self._asked, posterior, prompts, draws, sampling)
        if self._texts + len(asked) > self.limits.queue:
            raise BusyError(
                f"{self._texts} texts are under way, and the gateway takes {self.limits.queue}; "
                "try again later"
            )
        self._texts += len(asked)
        try:
            work = asyncio.ensure_future(together([self._written(posterior, one) for one in asked]))
            written = await in_time(request, work, self.limits, until)
        except EngineRefusalError as error:  # its words may name folders and models
            logger.error("%s", error)
            raise EngineError(
                f"the engine refused with status {error.code}; the gateway's log has the reason"
            ) from error
        finally:
            self._texts -= len(asked)
        return Answered(
            [one.settings for one in asked],
            [one.ids for one in asked],
            written,
            tokenizer_of(posterior.tokenizer),
            posterior.ends,
        )

    async def stream(
        self,
        request: Request,
        name: str | None,
        prompts: Callable[[Any], Sequence[str]],
        draws: Draws,
        sampling: Sampling,
    ) -> Stream:
        """Return the answer of `write` as a stream, which begins when it is whole."""
        answered = await self.write(request, name, prompts, draws, sampling)
        return await at_once(answered, sampling.choices)

    def _posterior(self, name: str | None) -> Exported:
        names = self.registry.names()
        name = named(name, self.default, names)
        if name not in self.registry.posteriors:
            raise UnknownPosteriorError(name, names)
        return self.registry.posteriors[name]

    def _asked(
        self,
        posterior: Exported,
        prompts: Callable[[Any], Sequence[str]],
        draws: Draws,
        sampling: Sampling,
    ) -> list[Asked]:
        """Return a request's prompts with their settings, within the limits."""
        check, length = self._asking.check, sampling.max_new_tokens
        check("max_tokens", length or 0, self.limits.new_tokens, "new tokens")
        if sampling.alternatives and self.top != ALL:
            raise UnsupportedError(
                "the likeliest tokens under all draws are known where every draw gives its whole "
                "distribution; start the gateway with --top-logprobs -1, or ask for none",
                "logprobs",
            )
        draws = seeded(draws, sampling)
        numbers = numbers_of(posterior, draws, self.num_samples, sampled=sampling.sampled)
        check("draws", len(numbers), self.limits.draws, "draws")
        settings = self._asking.written(len(numbers), draws.seed, numbers, sampling)
        options = vllm_options(settings, posterior.temperature)
        texts = prompts(posterior)
        check("prompt", len(texts), self.limits.texts, "texts")
        limit = self._context(posterior)
        asked = []
        for text in texts:
            ids = tokenized(posterior.tokenizer, text, limit, reserved=length or 1)["input_ids"]
            usual = min(sampling.usual_length, int(min(limit, 2**31)) - len(ids))
            size = length or min(usual, self.limits.new_tokens)
            asked.append(Asked(replace(settings, max_new_tokens=size), ids, options))
        return asked

    def _context(self, posterior: Exported) -> float:
        """Return the most tokens of a text; to be scored it has to leave the engine one place."""
        engine = float("inf") if self.base.context is None else self.base.context - 1
        return min(posterior.context_length, engine)

    async def _written(self, posterior: Exported, asked: Asked) -> Written:
        """Have every draw continue one prompt, and every draw score what all of them wrote."""
        settings = asked.settings
        assert settings.draws is not None
        adapters = posterior.numbered(settings.draws)
        texts = await self._texts_of(posterior, adapters, asked)
        distinct = sorted({tuple(text) for text in texts})
        whole_texts = [[*asked.ids, *text] for text in distinct]
        answers = await together(
            [self.engine.score(adapter.name, whole_texts, self.top) for adapter in adapters]
        )
        return await asyncio.to_thread(
            self._read, posterior, settings, len(asked.ids), texts, distinct, answers
        )

    async def _texts_of(
        self, posterior: Exported, adapters: Sequence[Adapter], asked: Asked
    ) -> list[list[int]]:
        settings = asked.settings
        body = {
            "max_tokens": settings.max_new_tokens,
            "n": settings.several,
            **asked.options,
        }
        requests = []
        for place, adapter in enumerate(adapters):
            # Each draw has random numbers of its own; vLLM counts on for several texts.
            seed = ((settings.seed or 0) + place * settings.several) % SEEDS
            more = {"seed": seed} if settings.sampled else {}
            requests.append(self.engine.write(adapter.name, asked.ids, **body, **more))
        ends = {*posterior.ends}
        stops = StopStrings(settings.stops, tokenizer_of(posterior.tokenizer))
        texts = [
            stops.until(until_end(torch.tensor(text.ids, dtype=torch.long), ends)).tolist()
            for written in await together(requests)
            for text in written
        ]
        if not all(0 < len(text) <= settings.max_new_tokens for text in texts):
            raise EngineError(
                f"the engine wrote {sorted({len(text) for text in texts})} tokens where 1 to "
                f"{settings.max_new_tokens} were asked for"
            )
        return texts

    def _read(
        self,
        posterior: Exported,
        settings: Write,
        start: int,
        texts: Sequence[Sequence[int]],
        distinct: Sequence[tuple[int, ...]],
        answers: Sequence[Sequence[Sequence[TokenLogs | None]]],
    ) -> Written:
        """Return the continuations of one prompt with their uncertainty."""
        scored = {}
        for place, text in enumerate(distinct):
            logs = [_logs_of(answer[place], start, text) for answer in answers]
            scored[text] = (
                whole(logs, text, posterior.vocabulary) if self.top == ALL else coarse(logs, text)
            )
        each = [scored[tuple(text)] for text in texts]
        draw = torch.tensor(settings.draws).repeat_interleave(settings.several)
        made = generation(texts, each, draw, posterior.temperature)
        order = chosen(made, settings.choices, sampled=settings.sampled)
        scores = notes = None
        if settings.alternatives is not None:
            scores = [
                token_scores(each[k], posterior.temperature, settings.alternatives) for k in order
            ]
        if self.top != ALL:
            notes = [
                {"top_logprobs": self.top, "covered": float(one.covered.min())} for one in each
            ]
        return Written(made, order, scores, notes)


def _logs_of(
    places: Sequence[TokenLogs | None], start: int, text: Sequence[int]
) -> list[TokenLogs]:
    """Return the log-probabilities at the places of a continuation's tokens."""
    logs = [place for place in places[start:] if place is not None]
    if len(logs) != len(text) or not all(
        token in place for token, place in zip(text, logs, strict=True)
    ):
        raise EngineError("the engine's prompt_logprobs do not have the tokens of the text")
    return logs
