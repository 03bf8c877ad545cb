"""Requests that share a pass through the network."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pyrolora.serving.errors import BusyError, ClosingError

logger = logging.getLogger(__name__)

Run = Callable[[Sequence[Any]], Sequence[Any]]


@dataclass(eq=False)
class Job:
    """A row that waits for its pass.

    Attributes
    ----------
    key
        Jobs of equal keys may share a batch.
    tokens
        Tokens that the row costs, over all draws.
    payload
        Handed to ``run``.
    future
        Has the result.
    """

    key: Hashable
    tokens: int
    payload: Any
    future: Future[Any] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class Batcher:
    """A queue, and the one thread that runs the network on what is in it.

    The oldest job decides the key of the next batch. Others of that key join it, in their order,
    until the budget of tokens is spent or the oldest has waited for the time window. Thus no key
    can starve another. A cancelled job leaves the queue at once.

    Which rows may share a pass is decided by the keys alone: texts to classify have the key of
    their posterior's family, so that a batch has rows of several posteriors.

    Parameters
    ----------
    run
        From the payloads of a batch to their results, in the same order.
    window
        Seconds that a job waits for company.
    budget
        Most tokens per batch: rows x the longest row. A longer row runs alone.
    most
        Most jobs in the queue.
    observe
        Called with the number of rows of each batch.
    """

    def __init__(
        self,
        run: Run,
        *,
        window: float,
        budget: int,
        most: int,
        observe: Callable[[int], None] = lambda rows: None,
    ) -> None:
        self._run = run
        self._window = window
        self._budget = budget
        self._most = most
        self._observe = observe
        self._waiting: deque[Job] = deque()
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="pyrolora-network", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._waiting)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all of the jobs.

        Raises
        ------
        BusyError
            When the queue has no room for all of them; none is queued then.
        ClosingError
            When the queue was closed.
        """
        with self._changed:
            if self._closed:
                raise ClosingError("the server is shutting down")
            if len(self._waiting) + len(jobs) > self._most:
                raise BusyError(
                    f"{len(self._waiting)} requests wait already, and the queue holds "
                    f"{self._most}; try again later"
                )
            self._waiting.extend(jobs)
            self._changed.notify_all()
        for job in jobs:
            job.future.add_done_callback(partial(self._forget, job))

    def close(self) -> None:
        """Take no more jobs, finish those in the queue, and return."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _forget(self, job: Job, _: Future[Any]) -> None:
        """Free the place of a job that was cancelled."""
        if not job.future.cancelled():
            return
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                self._changed.notify_all()

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            live = [job for job in batch if job.future.set_running_or_notify_cancel()]
            if live:
                self._observe(len(live))
                self._answer(live)
            del batch, live  # or the last jobs, with their posteriors, stay until the next

    def _next(self) -> list[Job] | None:
        """Wait for the next batch and return it; None at the end."""
        with self._changed:
            while True:
                if not self._waiting:
                    if self._closed:
                        return None
                    self._changed.wait()
                    continue
                batch, full = self._batch()
                patience = batch[0].arrived + self._window - time.monotonic()
                if not (full or self._closed or patience <= 0):
                    self._changed.wait(patience)
                    continue
                chosen = {id(job) for job in batch}
                self._waiting = deque(job for job in self._waiting if id(job) not in chosen)
                return batch

    def _batch(self) -> tuple[list[Job], bool]:
        """Return the oldest job with those that may join it, and whether the batch is full."""
        batch: list[Job] = []
        longest = 0
        for job in self._waiting:
            if job.key != self._waiting[0].key:
                continue
            longest = max(longest, job.tokens)
            if batch and longest * (len(batch) + 1) > self._budget:
                return batch, True
            batch.append(job)
        return batch, longest * (len(batch) + 1) > self._budget

    def _answer(self, jobs: Sequence[Job]) -> None:
        try:
            results = self._run([job.payload for job in jobs])
        except BaseException as error:
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
                return
            logger.info("a batch of %d failed, its rows run alone: %s", len(jobs), error)
            for job in jobs:  # the rows that are not at fault have their answers
                self._answer([job])
            return
        for job, result in zip(jobs, results, strict=True):
            job.future.set_result(result)
