"""The queue: who shares a batch, who waits, who is turned away."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from typing import Any

import pytest

from pyrolora.serving.batching import Batcher, Job
from pyrolora.serving.errors import BusyError, ClosingError

SOON = 5.0


class Network:
    """Stands for the network: records batches, and waits at a gate."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.running = threading.Event()

    def __call__(self, payloads: Sequence[Any]) -> list[Any]:
        self.batches.append(list(payloads))
        self.running.set()
        assert self.gate.wait(SOON)
        if "bad" in payloads:
            raise ValueError("a bad row")
        return [f"answer to {payload}" for payload in payloads]


@pytest.fixture
def network() -> Network:
    return Network()


def batcher(network: Network, **options: Any) -> Batcher:
    return Batcher(network, **{"window": 0.05, "budget": 100, "most": 10, **options})


def blocked(network: Network, queue: Batcher) -> Job:
    """A job that runs, and waits at the gate."""
    network.gate.clear()
    network.running.clear()
    job = Job("first", 1, "first")
    queue.submit([job])
    assert network.running.wait(SOON)
    return job


def test_jobs_of_one_key_share_a_batch(network: Network) -> None:
    queue = batcher(network)
    jobs = [Job("key", 5, k) for k in range(4)]
    for job in jobs:
        queue.submit([job])
    assert [job.future.result(SOON) for job in jobs] == [f"answer to {k}" for k in range(4)]
    assert network.batches == [[0, 1, 2, 3]]
    queue.close()


def test_other_keys_have_batches_of_their_own_in_the_order_of_arrival(network: Network) -> None:
    queue = batcher(network)
    blocked(network, queue)
    jobs = [Job(key, 5, f"{key}{k}") for k in range(2) for key in "ab"]
    queue.submit(jobs)
    network.gate.set()
    queue.close()
    assert network.batches == [["first"], ["a0", "a1"], ["b0", "b1"]]


def test_a_batch_has_the_tokens_of_the_budget_padding_counted(network: Network) -> None:
    queue = batcher(network)
    blocked(network, queue)
    queue.submit([Job("k", 30, "a"), Job("k", 40, "b"), Job("k", 10, "c"), Job("k", 500, "d")])
    network.gate.set()
    queue.close()
    assert network.batches == [["first"], ["a", "b"], ["c"], ["d"]]


def test_a_full_batch_does_not_wait_for_the_window(network: Network) -> None:
    queue = batcher(network, window=60.0)
    job = Job("k", 60, "a")
    queue.submit([job])
    job.future.result(SOON)
    queue.close()


def test_beyond_the_bound_jobs_are_turned_away_all_or_none(network: Network) -> None:
    queue = batcher(network, most=2)
    blocked(network, queue)
    queue.submit([Job("k", 1, "a")])
    with pytest.raises(BusyError, match="1 requests wait already, and the queue holds 2"):
        queue.submit([Job("k", 1, "b"), Job("k", 1, "c")])
    queue.submit([Job("k", 1, "d")])
    assert len(queue) == 2
    network.gate.set()
    queue.close()
    assert network.batches[1:] == [["a", "d"]]


def test_a_cancelled_job_frees_its_place(network: Network) -> None:
    queue = batcher(network, most=1)
    blocked(network, queue)
    gone = Job("k", 1, "gone")
    queue.submit([gone])
    assert gone.future.cancel()
    assert len(queue) == 0
    stays = Job("k", 1, "stays")
    queue.submit([stays])
    network.gate.set()
    assert stays.future.result(SOON) == "answer to stays"
    with pytest.raises(CancelledError):
        gone.future.result(0)
    queue.close()
    assert ["gone"] not in network.batches


def test_a_bad_row_fails_alone(network: Network) -> None:
    queue = batcher(network)
    jobs = [Job("k", 1, payload) for payload in ("a", "bad", "b")]
    queue.submit(jobs)
    assert jobs[0].future.result(SOON) == "answer to a"
    with pytest.raises(ValueError, match="a bad row"):
        jobs[1].future.result(SOON)
    assert jobs[2].future.result(SOON) == "answer to b"
    queue.close()


def test_closing_finishes_what_is_queued_and_takes_no_more(network: Network) -> None:
    queue = batcher(network, window=60.0)
    jobs = [blocked_job := Job("k", 1, "a"), Job("l", 1, "b")]
    queue.submit(jobs)
    queue.close()
    assert blocked_job.future.result(0) == "answer to a"
    assert jobs[1].future.result(0) == "answer to b"
    with pytest.raises(ClosingError):
        queue.submit([Job("k", 1, "c")])


def test_answered_jobs_are_not_kept(network: Network) -> None:
    import gc
    import weakref

    queue = batcher(network)
    job = Job("k", 1, "a")
    queue.submit([job])
    job.future.result(SOON)
    kept = weakref.ref(job)
    del job
    deadline = time.monotonic() + SOON
    while kept() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert kept() is None
    queue.close()
