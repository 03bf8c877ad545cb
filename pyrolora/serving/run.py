"""Run a server until it is told to end."""

from __future__ import annotations

import logging
from typing import Any

import uvicorn

from pyrolora.serving.answering import Answering
from pyrolora.serving.app import LOOPBACK, create_app

GRACE = 60
"""Seconds that requests have to end after the signal."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    return host == "localhost" or host == "::1" or host.startswith("127.")


def run(service: Answering, *, host: str, port: int, key: str | None) -> None:
    """Serve until SIGINT or SIGTERM; requests that have begun are finished."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    hosts = (*LOOPBACK, host) if is_loopback(host) else None
    app: Any = create_app(service, key=key, hosts=hosts)
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="warning",
        timeout_graceful_shutdown=GRACE,
        server_header=False,
    )
