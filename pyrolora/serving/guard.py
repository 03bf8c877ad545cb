"""Checks before the routes: hosts, the key, sizes; and a last word on unexpected errors."""

from __future__ import annotations

import hmac
import logging
import time
import uuid
from collections.abc import Collection
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pyrolora.serving.errors import KeyRefusedError, RefusalError, TooLongError
from pyrolora.serving.limits import Limits
from pyrolora.serving.metrics import Metrics
from pyrolora.serving.replies import refused

logger = logging.getLogger(__name__)

OPEN = frozenset({("GET", "/"), ("GET", "/health")})
"""Requests that need no key: the page, which holds no data, and the health check."""
OTHER = "other"


class Guard:
    """Checks every request before the application sees its body.

    Parameters
    ----------
    app
        The application.
    metrics
        Counts requests by route and status.
    routes
        The paths that metrics name; others are counted together.
    limits
        Has the most bytes of a body.
    key
        What ``Authorization: Bearer`` has to hold; None: no key is asked for.
    hosts
        Names that the ``Host`` header may have; None: any. On the loopback this keeps web pages
        out that make their own name point to 127.0.0.1.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        routes: Collection[str],
        limits: Limits,
        key: str | None,
        hosts: Collection[str] | None,
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.routes = routes
        self.limits = limits
        self.key = key
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self.app(scope, self._bounded(receive), watched)
            else:
                await refused(scope["path"], refusal)(scope, receive, watched)
        except Exception as error:
            response = failed(scope["path"], error)
            if status:
                raise
            await response(scope, receive, watched)
        finally:
            route = self._route(scope["path"])
            self.metrics.requests.labels(route, str(status or 499)).inc()
            self.metrics.latency.labels(route).observe(time.perf_counter() - start)

    def _refusal(self, scope: Scope) -> RefusalError | None:
        headers = Headers(scope=scope)
        host = _host(headers.get("host", ""))
        if self.hosts is not None and host not in self.hosts:
            refusal = RefusalError(
                f"this server is not called {host[:100]!r}; ask it by the address it listens on"
            )
            refusal.status = 421
            return refusal
        if (scope["method"], scope["path"]) not in OPEN and not self._has_key(headers):
            return KeyRefusedError(
                "this server asks for its key: send the header 'Authorization: Bearer KEY'"
            )
        size = headers.get("content-length", "0")
        if not size.isdecimal() or int(size[:20]) > self.limits.body:
            return self._too_large()
        content = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and content != "application/json":
            refusal = RefusalError(
                f"send JSON, with the header 'Content-Type: application/json', got {content!r:.80}"
            )
            refusal.status = 415
            return refusal
        return None

    def _has_key(self, headers: Headers) -> bool:
        if self.key is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip(" \t").encode("latin-1"), self.key.encode())
        return same and scheme.lower() == "bearer"

    def _too_large(self) -> TooLongError:
        return TooLongError(
            f"the body has more than {self.limits.body:,} bytes, which is the limit of this server"
        )

    def _bounded(self, receive: Receive) -> Receive:
        """Return a ``receive`` that stops at the limit of a body, whatever its header says."""
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.limits.body:
                raise HTTPException(413, str(self._too_large()))
            return message

        return bounded

    def _route(self, path: str) -> str:
        if path in self.routes:
            return path
        return "/v1/models/{name}" if path.startswith("/v1/models/") else OTHER


def failed(path: str, error: Exception) -> Response:
    """Log an error of the server, and return a response with its number in the log."""
    number = uuid.uuid4().hex
    logger.error("error %s at %s", number, path, exc_info=error)
    refusal: Any = RefusalError(
        f"the server failed to answer; its log has the reason under {number}"
    )
    refusal.status, refusal.kind = 500, "generation"
    return refused(path, refusal)


def _host(header: str) -> str:
    """Return the name in a ``Host`` header, without the port."""
    if header.startswith("["):
        return header[: header.find("]") + 1].lower()
    return header.partition(":")[0].lower()
