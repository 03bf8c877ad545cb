"""The application: both interfaces, the page, and what is about the server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from pyrolora.errors import ConfigError, DataError
from pyrolora.serving import lorax, openai
from pyrolora.serving.answering import Answering
from pyrolora.serving.errors import RefusalError, UnsupportedError
from pyrolora.serving.guard import Guard
from pyrolora.serving.page import HEADERS, PAGE
from pyrolora.serving.replies import invalid, refused

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def create_app(
    service: Answering, *, key: str | None = None, hosts: Collection[str] | None = LOOPBACK
) -> FastAPI:
    """Return the ASGI application of a server.

    Parameters
    ----------
    service
        Has the posteriors and the queue; it is closed with the application.
    key
        The key that clients have to send; None: none.
    hosts
        Names that clients may call the server by; None: any.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.finish()

    app = FastAPI(
        title="pyrolora", version=version("pyrolora"), lifespan=life, docs_url=None, redoc_url=None
    )
    app.include_router(openai.routes(service))
    app.include_router(lorax.routes(service))
    _add_own_routes(app, service)
    _add_errors(app)
    paths = {getattr(route, "path", "") for route in app.routes} | set(app.openapi()["paths"])
    app.add_middleware(
        Guard,
        metrics=service.metrics,
        routes=paths,
        limits=service.limits,
        key=key,
        hosts=hosts,
    )
    return app


def _add_own_routes(app: FastAPI, service: Answering) -> None:
    @app.get("/", include_in_schema=False)
    def page() -> Response:
        return Response(PAGE, media_type="text/html", headers=HEADERS)

    @app.get("/health")
    def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/info")
    def info() -> Response:
        return JSONResponse(_info(service))

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _info(service: Answering) -> dict[str, Any]:
    limits = service.limits
    return {
        "version": version("pyrolora"),
        "max_concurrent_requests": limits.queue,
        "max_best_of": 1,
        "max_new_tokens": limits.new_tokens,
        "max_num_samples": limits.draws,
        "max_choices": limits.choices,
        "max_texts": limits.texts,
        **service.facts(),
    }


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RefusalError)
    def refuse(request: Request, error: RefusalError) -> Response:
        return refused(request.url.path, error)

    @app.exception_handler(RequestValidationError)
    def refuse_fields(request: Request, error: RequestValidationError) -> Response:
        return refused(request.url.path, invalid(error.errors()))

    @app.exception_handler(HTTPException)
    def refuse_path(request: Request, error: HTTPException) -> Response:
        refusal = RefusalError(str(error.detail))
        refusal.status = error.status_code
        return refused(request.url.path, refusal)

    @app.exception_handler(ConfigError)
    @app.exception_handler(DataError)
    def refuse_value(request: Request, error: Exception) -> Response:
        return refused(request.url.path, UnsupportedError(str(error)))
