"""From a request's fields to the results of its rows: posterior, tokens, queue, time."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from pyrolora import defaults
from pyrolora.errors import DataError
from pyrolora.posterior import Posterior
from pyrolora.predictive import ClassPrediction
from pyrolora.serving.batching import Batcher, Job
from pyrolora.serving.errors import (
    BusyError,
    ClientGoneError,
    LateError,
    UnsupportedError,
)
from pyrolora.serving.limits import Limits
from pyrolora.serving.metrics import Metrics
from pyrolora.serving.registry import Lease, Registry
from pyrolora.serving.text import encoded
from pyrolora.serving.verbs import Classify, Columns, Write, Written
from pyrolora.tasks import CausalLM, Classification, MultipleChoice

SEEDS = 2**32


@dataclass(frozen=True)
class Draws:
    """Which draws a request asks for; None: those of the server."""

    num_samples: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Sampling:
    """How a request wants its text.

    Attributes
    ----------
    options
        Of transformers' ``generate``, beside the length.
    sampled
        Whether tokens are sampled; otherwise the likeliest is taken.
    alternatives
        As in `Write`.
    """

    max_new_tokens: int
    options: tuple[tuple[str, Any], ...] = ()
    sampled: bool = False
    choices: int = 1
    alternatives: int | None = None


@dataclass(frozen=True)
class Classified:
    """Predictions of the texts of a request, and the settings that they were made with."""

    settings: Classify
    predictions: list[ClassPrediction]


@dataclass(frozen=True)
class Answered:
    """Continuations of the prompts of a request, and what it takes to read them."""

    settings: Write
    written: list[Written]
    prompts: list[list[int]]
    tokenizer: Any
    ends: frozenset[int]


@dataclass(eq=False)
class _Row:
    """The payload of a job."""

    lease: Lease
    settings: Classify | Write
    columns: Columns


class Service:
    """What the routes call: every text becomes a row of the queue.

    Parameters
    ----------
    registry
        The posteriors.
    limits
        Of requests and of the queue.
    default
        The posterior of requests that name none; None: the only one there is.
    num_samples, seed
        Of requests that do not say.
    """

    def __init__(
        self,
        registry: Registry,
        limits: Limits | None = None,
        *,
        default: str | None = None,
        num_samples: int | None = None,
        seed: int = defaults.SEED,
    ) -> None:
        self.registry = registry
        self.limits = limits or Limits()
        self.default = default
        self.num_samples = num_samples
        self.seed = seed
        self.metrics = Metrics()
        self._entering = 0
        self.batcher = Batcher(
            _run,
            window=self.limits.window,
            budget=self.limits.batch_tokens,
            most=self.limits.queue,
            observe=self.metrics.batch.observe,
        )
        self.metrics.watch(
            lambda: len(self.batcher), lambda: len(registry.loaded()), lambda: registry.bytes
        )

    def close(self) -> None:
        """Finish what is queued, and let the posteriors go."""
        self.batcher.close()
        self.registry.close()

    def named(self, name: str | None) -> str:
        """The posterior that a request means.

        Raises
        ------
        UnsupportedError
            When it names none, and there are several.
        """
        if name is not None:
            return name
        if self.default is not None:
            return self.default
        names = self.registry.names()
        if len(names) != 1:
            raise UnsupportedError(
                f"name one of the posteriors, of which there are {len(names)}: "
                f"{', '.join(names[:20])}",
                "adapter_id",
            )
        return names[0]

    async def classify(
        self, request: Request, name: str | None, texts: Sequence[str], draws: Draws
    ) -> Classified:
        """Return the classes of texts."""
        self._check_count("inputs", len(texts), self.limits.texts, "texts")

        def rows(lease: Lease) -> list[_Row]:
            posterior = lease.posterior
            task = posterior.task
            if not isinstance(task, Classification) or isinstance(task, MultipleChoice):
                raise UnsupportedError(
                    f"the posterior {lease.name!r} is of the task {task.name!r}, and classes are "
                    "those of a classification; of a causal language model ask for text",
                    "model",
                )
            settings = Classify(*self._draws(posterior, draws, defaults.NUM_SAMPLES))
            return [_Row(lease, settings, encoded(posterior, text)) for text in texts]

        made, results = await self._answers(request, name, rows)
        settings = made[0].settings
        assert isinstance(settings, Classify)
        return Classified(settings, results)

    async def write(
        self,
        request: Request,
        name: str | None,
        prompts: Callable[[Posterior], Sequence[str]],
        draws: Draws,
        sampling: Sampling,
    ) -> Answered:
        """Return continuations of prompts, which may depend on the posterior's tokenizer."""
        limits, most = self.limits, sampling.max_new_tokens
        self._check_count("max_tokens", most, limits.new_tokens, "new tokens")
        self._check_count("n", sampling.choices, limits.choices, "choices")

        def rows(lease: Lease) -> list[_Row]:
            posterior = lease.posterior
            if not isinstance(posterior.task, CausalLM):
                raise UnsupportedError(
                    f"the posterior {lease.name!r} is of the task {posterior.task.name!r}, and "
                    "only a causal language model writes text; ask for classes at /classify",
                    "model",
                )
            settings = self._settings(posterior, draws, sampling)
            texts = prompts(posterior)
            self._check_count("prompt", len(texts), limits.texts, "texts")
            return [_Row(lease, settings, encoded(posterior, t, reserved=most)) for t in texts]

        made, results = await self._answers(request, name, rows)
        posterior = made[0].lease.posterior
        settings = made[0].settings
        assert isinstance(settings, Write)
        prompt_ids = [row.columns["input_ids"] for row in made]
        return Answered(settings, results, prompt_ids, posterior.tokenizer, _ends(posterior))

    def _settings(self, posterior: Posterior, draws: Draws, sampling: Sampling) -> Write:
        if draws.seed is None and sampling.sampled:  # the answer says which one it was
            draws = Draws(draws.num_samples, secrets.randbelow(SEEDS))
        num_samples, seed = self._draws(posterior, draws, defaults.GENERATE_SAMPLES)
        writers = max(num_samples, 1)
        options = sampling.options
        if sampling.sampled:
            several = -(-sampling.choices // writers)
            options += (("num_return_sequences", several),) if several > 1 else ()
        elif sampling.choices > writers:
            raise UnsupportedError(
                f"{sampling.choices} choices were asked for, and each of the {writers} draws "
                "writes its likeliest one; take more draws (num_samples) or a temperature above 0",
                "n",
            )
        return Write(
            num_samples,
            seed,
            sampling.max_new_tokens,
            options,
            sampled=sampling.sampled,
            choices=sampling.choices,
            alternatives=sampling.alternatives,
        )

    def _draws(self, posterior: Posterior, draws: Draws, usual: int) -> tuple[int, int]:
        number = self.num_samples if draws.num_samples is None else draws.num_samples
        if number is None:
            number = posterior.model.program.usual_draws(usual)
        self._check_count("num_samples", number, self.limits.draws, "draws")
        return number, self.seed if draws.seed is None else draws.seed

    def _check_count(self, field: str, count: int, most: int, what: str) -> None:
        if count > most:
            raise UnsupportedError(
                f"{count} {what} were asked for, and the server allows {most}", field
            )

    async def _answers(
        self, request: Request, name: str | None, rows: Callable[[Lease], list[_Row]]
    ) -> tuple[list[_Row], list[Any]]:
        """Load the posterior, make the rows, and wait for the results of all of them."""
        if self._entering + len(self.batcher) >= self.limits.queue:
            raise BusyError(
                f"the queue holds {self.limits.queue} rows and is full; try again later"
            )
        self._entering += 1
        try:
            made = await asyncio.to_thread(self._enter, self.named(name), rows)
        finally:
            self._entering -= 1
        jobs = [_job(row) for row in made]
        try:
            self.batcher.submit(jobs)
        except BaseException:
            for row in made:
                row.lease.release()
            raise
        return made, await self._finished(request, [job.future for job in jobs])

    def _enter(self, name: str, rows: Callable[[Lease], list[_Row]]) -> list[_Row]:
        lease = self.registry.lease(name)
        try:
            made = rows(lease)
            for row in made[1:]:
                row.lease = lease.again()
        except BaseException:
            lease.release()
            raise
        return made

    async def _finished(self, request: Request, futures: list[Future[Any]]) -> list[Any]:
        """Wait for all results; give up when the time is over or the client hangs up."""
        everything: asyncio.Future[Any] = asyncio.gather(*map(asyncio.wrap_future, futures))
        gone: asyncio.Future[Any] = asyncio.ensure_future(_hung_up(request))
        try:
            await asyncio.wait(
                {everything, gone},
                timeout=self.limits.timeout,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if everything.done():
                return list(everything.result())
            if gone.done():
                raise ClientGoneError("the client hung up")
            raise LateError(f"the request was not answered within {self.limits.timeout:g} seconds")
        finally:
            for task in (everything, gone):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task
            for future in futures:
                future.cancel()


async def _hung_up(request: Request) -> None:
    """Return when the client is gone; the body has been read by then."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _job(row: _Row) -> Job:
    settings = row.settings
    draws = max(settings.num_samples, 1)
    length = len(row.columns["input_ids"])
    if isinstance(settings, Write):
        draws *= dict(settings.options).get("num_return_sequences", 1)
        length += settings.max_new_tokens
    apart = None if settings.shares else object()
    job = Job((id(row.lease.posterior), settings, apart), length * draws, row)
    job.future.add_done_callback(lambda _: row.lease.release())
    return job


def _run(rows: Sequence[_Row]) -> list[Any]:
    """Run the rows of one batch, which have the same posterior and settings."""
    first = rows[0]
    return first.settings.run(first.lease.posterior, [row.columns for row in rows])


def _ends(posterior: Posterior) -> frozenset[int]:
    """The ids that end a text."""
    base: Any = posterior.base
    ends = base.generation_config.eos_token_id
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


def chat_prompt(posterior: Posterior, messages: Sequence[dict[str, str]]) -> str:
    """The text of a conversation, by the tokenizer's template."""
    tokenizer = posterior.tokenizer
    if getattr(tokenizer, "chat_template", None) is None:
        raise UnsupportedError(
            "the tokenizer of this posterior has no chat template; use /v1/completions", "model"
        )
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template may refuse roles, in its own words
        raise DataError(f"the chat template refuses these messages: {error}") from error
    return str(text)
