"""Requests on their way: a posterior, a place in the queue, an answer in time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from starlette.requests import Request

from pyrolora import defaults
from pyrolora.data.media.media import tokenizer_of
from pyrolora.posterior import Posterior
from pyrolora.serving.answering import Answered, Classified, named
from pyrolora.serving.asking import Asking, Draws, Row, Sampling
from pyrolora.serving.batching import Batcher, Job
from pyrolora.serving.drawn import Drawn
from pyrolora.serving.errors import BusyError
from pyrolora.serving.limits import Limits
from pyrolora.serving.metrics import Metrics
from pyrolora.serving.registry import Lease, Registry
from pyrolora.serving.streaming import Early, Stream, Telling, steady
from pyrolora.serving.verbs import (
    Classify,
    ToWrite,
    Write,
    Written,
    classified,
    written,
)
from pyrolora.serving.waiting import in_time

LOADERS = 32
"""Requests that may wait for a posterior to be loaded while others go on."""


class Service:
    """Answers requests: every text becomes a row of the queue.

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
        self.metrics = Metrics()
        self._asking = Asking(self.limits, num_samples, seed)
        self._entering = 0
        self._streams: set[asyncio.Task[None]] = set()
        self._loaders = ThreadPoolExecutor(LOADERS, "pyrolora-loading")
        self.batcher = Batcher(
            partial(_run, Drawn()),
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
        self._loaders.shutdown()
        self.batcher.close()
        self.registry.close()

    async def finish(self) -> None:
        """Close, while the loop goes on."""
        await asyncio.to_thread(self.close)

    def facts(self) -> dict[str, Any]:
        """Return what ``/info`` says of the posteriors."""
        registry, model = self.registry, self.registry.networks.model
        return {
            "model_id": Path(model).name if isinstance(model, str | Path) else type(model).__name__,
            "max_batch_total_tokens": self.limits.batch_tokens,
            "posteriors": registry.names(),
            "loaded": registry.loaded(),
            "bytes": registry.bytes,
            "budget": registry.budget,
        }

    async def classify(
        self, request: Request, name: str | None, texts: Sequence[str], draws: Draws
    ) -> Classified:
        """Return the classes of texts."""
        rows, results = await self._answers(
            request, name, lambda lease: self._asking.classify(lease, texts, draws)
        )
        settings = rows[0].settings
        assert isinstance(settings, Classify)
        return Classified(settings, results, tokenizer_of(rows[0].lease.posterior.tokenizer))

    async def write(
        self,
        request: Request,
        name: str | None,
        prompts: Callable[[Posterior], Sequence[str]],
        draws: Draws,
        sampling: Sampling,
    ) -> Answered:
        """Return continuations of prompts, which may depend on the posterior's tokenizer."""
        rows, results = await self._answers(
            request, name, lambda lease: self._asking.write(lease, prompts, draws, sampling)
        )
        return _answered(rows, results)

    async def stream(
        self,
        request: Request,
        name: str | None,
        prompts: Callable[[Posterior], Sequence[str]],
        draws: Draws,
        sampling: Sampling,
    ) -> Stream:
        """Return the answer of `write` as a stream, when the first of it can be sent.

        Where one draw writes, that is the first token; otherwise it is the whole answer.
        """
        until = time.monotonic() + self.limits.timeout
        rows = await self._rows(
            request, name, lambda lease: self._asking.write(lease, prompts, draws, sampling), until
        )
        queue: asyncio.Queue[Any] = asyncio.Queue()
        tokenizer = tokenizer_of(rows[0].lease.posterior.tokenizer)
        _follow(rows, tokenizer, queue)
        task = asyncio.create_task(self._pump(request, rows, until, queue))
        self._streams.add(task)
        task.add_done_callback(self._streams.discard)
        return await Stream(tokenizer, sampling.choices, queue).begin()

    async def _pump(
        self, request: Request, rows: list[Row], until: float, queue: asyncio.Queue[Any]
    ) -> None:
        """Put the answer into the queue, or what went wrong, behind the tokens that were sent."""
        try:
            queue.put_nowait(_answered(rows, await self._results(request, rows, until)))
        except Exception as error:
            queue.put_nowait(error)

    async def _answers(
        self, request: Request, name: str | None, make: Callable[[Lease], list[Row]]
    ) -> tuple[list[Row], list[Any]]:
        """Load the posterior, make the rows, and wait for the results of all of them."""
        until = time.monotonic() + self.limits.timeout
        rows = await self._rows(request, name, make, until)
        return rows, await self._results(request, rows, until)

    async def _rows(
        self, request: Request, name: str | None, make: Callable[[Lease], list[Row]], until: float
    ) -> list[Row]:
        """Load the posterior and make the rows."""
        if self._entering + len(self.batcher) >= self.limits.queue:
            raise BusyError(
                f"the queue holds {self.limits.queue} texts and is full; try again later"
            )
        self._entering += 1
        entered = self._loaders.submit(self._enter, name, make)
        try:
            (rows,) = await self._finished(request, [entered], until)
        except BaseException:
            entered.add_done_callback(_release_all)  # it may still be loading
            raise
        finally:
            self._entering -= 1
        return list(rows)

    async def _results(self, request: Request, rows: list[Row], until: float) -> list[Any]:
        """Queue the rows and wait for all results; those that run are cut if nobody waits."""
        jobs = [Job(row.key, row.tokens, row) for row in rows]
        for job in jobs:
            job.future.add_done_callback(_release(job.payload))
        try:
            self.batcher.submit(jobs)
            return await self._finished(request, [job.future for job in jobs], until)
        finally:
            for job in jobs:  # a running one is released when it is done
                job.payload.given_up = True
                job.future.cancel()

    def _enter(self, name: str | None, make: Callable[[Lease], list[Row]]) -> list[Row]:
        lease = self.registry.lease(named(name, self.default, self.registry.names()))
        try:
            rows = make(lease)
            for row in rows[1:]:
                row.lease = lease.again()
        except BaseException:
            lease.release()
            raise
        return rows

    async def _finished(
        self, request: Request, futures: list[Future[Any]], until: float
    ) -> list[Any]:
        """Wait for all results; give up when the time is over or the client hangs up."""
        everything = asyncio.gather(*map(asyncio.wrap_future, futures))
        return list(await in_time(request, everything, self.limits, until))


def _release(row: Row) -> Callable[[Future[Any]], None]:
    return lambda _: row.lease.release()


def _release_all(entered: Future[list[Row]]) -> None:
    """Release what was leased for a request that nobody waits for any more."""
    if not entered.cancelled() and entered.exception() is None:
        for row in entered.result():
            row.lease.release()


def _answered(rows: Sequence[Row], results: list[Written]) -> Answered:
    posterior = rows[0].lease.posterior
    return Answered(
        [row.settings for row in rows if isinstance(row.settings, Write)],
        [row.columns["input_ids"] for row in rows],
        results,
        tokenizer_of(posterior.tokenizer),
        _ends(posterior),
    )


def _follow(rows: Sequence[Row], tokenizer: Any, queue: asyncio.Queue[Any]) -> None:
    """Have tokens put into the queue as they are written, where one draw writes the text."""
    loop = asyncio.get_running_loop()

    def send(token: Early) -> None:
        with contextlib.suppress(RuntimeError):  # the server has ended meanwhile
            loop.call_soon_threadsafe(queue.put_nowait, token)

    for number, row in enumerate(rows):
        settings = row.settings
        if isinstance(settings, Write) and settings.follows and steady(tokenizer):
            alternatives = settings.alternatives or 0
            row.follower = Telling(number, tokenizer, settings.stops, alternatives, send)


def _run(drawn: Drawn, rows: Sequence[Row]) -> list[Any]:
    """Run the rows of one batch, which have equal keys."""
    if isinstance(rows[0].settings, Write):
        return written([_to_write(row) for row in rows], drawn)
    return classified(
        [
            (row.lease.posterior, settings, row.columns)
            for row in rows
            if isinstance(settings := row.settings, Classify)
        ],
        drawn,
    )


def _to_write(row: Row) -> ToWrite:
    assert isinstance(row.settings, Write)
    return ToWrite(
        row.lease.posterior, row.settings, row.columns, lambda: not row.given_up, row.follower
    )


def _ends(posterior: Posterior) -> frozenset[int]:
    """Return the ids that end a text."""
    base: Any = posterior.base
    ends = base.generation_config.eos_token_id
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
