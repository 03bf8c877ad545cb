"""Metrics of a running server for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "pyrolora_requests",
            "Requests that were answered.",
            ["route", "status"],
            registry=self.registry,
        )
        self.latency = Histogram(
            "pyrolora_request_seconds",
            "Seconds from a request to the end of its answer.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.batch = Histogram(
            "pyrolora_batch_rows", "Rows of a batch.", buckets=ROWS, registry=self.registry
        )
        self._queue = self._gauge("pyrolora_queue_length", "Rows that wait for their batch.")
        self._loaded = self._gauge("pyrolora_posteriors_loaded", "Posteriors in memory.")
        self._bytes = self._gauge("pyrolora_posterior_bytes", "Bytes of posteriors in memory.")

    def watch(
        self, queue: Callable[[], int], loaded: Callable[[], int], size: Callable[[], int]
    ) -> None:
        """Read the gauges from these functions."""
        self._queue.set_function(queue)
        self._loaded.set_function(loaded)
        self._bytes.set_function(size)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self.registry)
