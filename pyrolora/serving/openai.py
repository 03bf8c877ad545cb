"""OpenAI's REST interface: models, completions, chat completions."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse

from pyrolora.serving.asking import chat_prompt
from pyrolora.serving.bodies import StrictRoute
from pyrolora.serving.errors import UnknownPosteriorError
from pyrolora.serving.openai_answers import Chat, Completion
from pyrolora.serving.openai_fields import NEW_TOKENS, ChatRequest, CompletionRequest
from pyrolora.serving.service import Answering
from pyrolora.tasks.registry import find

OWNER = "pyrolora"


def routes(service: Answering) -> APIRouter:
    """Return the routes of the interface."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=StrictRoute)
    started = int(time.time())

    def model(name: str) -> dict[str, Any]:
        task = service.registry.task(name)
        kind = None if task is None else find(task)
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": OWNER,
            "task": task,
            "writes": kind is not None and kind.serves == "text",
        }

    @router.get("/models")
    def models() -> Response:
        names = service.registry.names()
        return JSONResponse({"object": "list", "data": [model(name) for name in names]})

    @router.get("/models/{name}")
    def one_model(name: str) -> Response:
        names = service.registry.names()
        if name not in names:
            raise UnknownPosteriorError(name, names)
        return JSONResponse(model(name))

    @router.post("/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        sampling = body.sampling(NEW_TOKENS, body.logprobs)
        answered = await service.write(
            request, body.model, lambda _: body.prompts, body.draws, sampling
        )
        return _response(await run_in_threadpool(Completion, body, answered))

    @router.post("/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        messages = [message.plain() for message in body.messages]
        answered = await service.write(
            request, body.model, lambda p: [chat_prompt(p, messages)], body.draws, body.asked()
        )
        return _response(await run_in_threadpool(Chat, body, answered))

    return router


def _response(completion: Completion) -> Response:
    if completion.body.stream:
        return StreamingResponse(completion.events(), media_type="text/event-stream")
    return JSONResponse(completion.answer())
