"""Servers that run in the process of the tests."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

import pyrolora
from pyrolora.serving.limits import Limits
from pyrolora.serving.registry import Registry
from pyrolora.serving.service import Service


@dataclass(frozen=True)
class Shop:
    """A directory of posteriors, and the folder of their network."""

    directory: Path
    base: Any


SLOW = 60.0
"""Seconds that an answer may take on a machine with other work."""


def post(url: str, **options: Any) -> httpx.Response:
    return httpx.post(url, **{"timeout": SLOW, **options})


def get(url: str, **options: Any) -> httpx.Response:
    return httpx.get(url, **{"timeout": SLOW, **options})


@contextmanager
def running(app: Any) -> Iterator[str]:
    """A server of ``app`` on a free port, in a thread; gives its address."""
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


@dataclass(frozen=True)
class Live:
    """A server that runs, and what it serves."""

    url: str
    shop: Shop
    service: Service

    def alone(self, name: str) -> pyrolora.Posterior:
        """The posterior of that name, loaded beside the server."""
        return pyrolora.load(self.shop.directory / name, self.shop.base)


def served(shop: Shop, limits: Limits | None = None, **options: Any) -> Service:
    return Service(Registry(shop.directory, shop.base), limits, **options)
