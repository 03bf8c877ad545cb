"""Waiting for an answer until the time is over or the client hangs up."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from starlette.requests import Request

from pyrolora.serving.errors import ClientGoneError, LateError
from pyrolora.serving.limits import Limits


async def in_time(request: Request, work: asyncio.Future[Any], limits: Limits, until: float) -> Any:
    """Return the result of ``work``; cancel it when the time is over or the client hangs up.

    Parameters
    ----------
    request
        The request, whose body has been read.
    work
        What is waited for.
    limits
        Has the time, for the error.
    until
        The end of the time, by ``time.monotonic``.

    Raises
    ------
    ClientGoneError
        When the client hung up.
    LateError
        When the time is over.
    """
    gone: asyncio.Future[Any] = asyncio.ensure_future(hung_up(request))
    try:
        await asyncio.wait(
            {work, gone},
            timeout=max(until - time.monotonic(), 0),
            return_when=asyncio.FIRST_COMPLETED,
        )
        if work.done():
            return work.result()
        if gone.done():
            raise ClientGoneError("the client hung up")
        raise LateError(f"the request was not answered within {limits.timeout:g} seconds")
    finally:
        for waiting in (work, gone):
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await waiting


async def hung_up(request: Request) -> None:
    """Return when the client is gone; the body has been read by then."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
