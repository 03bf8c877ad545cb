"""Bodies of requests: JSON by the standard, in which nothing stands twice."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pyrolora.files import strict_json


class StrictRequest(Request):
    """A request whose body is read strictly; of a name given twice no value is dropped."""

    async def json(self) -> Any:
        try:
            return strict_json(await self.body())
        except RecursionError as error:
            raise HTTPException(422, "the body is nested too deeply") from error
        except ValueError as error:
            raise HTTPException(422, f"the body is no JSON: {error}") from error


class StrictRoute(APIRoute):
    """A route that reads bodies strictly."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        original = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await original(StrictRequest(request.scope, request.receive))

        return handler
