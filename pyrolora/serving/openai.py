"""OpenAI's REST interface: models, completions, chat completions."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse

from pyrolora.posterior import Posterior
from pyrolora.serving.answering import Answering
from pyrolora.serving.asking import Sampling, chat_prompt
from pyrolora.serving.bodies import StrictRoute
from pyrolora.serving.errors import UnknownPosteriorError
from pyrolora.serving.openai_answers import Chat, Completion
from pyrolora.serving.openai_fields import NEW_TOKENS, ChatRequest, CompletionRequest
from pyrolora.serving.streaming import unbroken
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
        return await answer(request, Completion(body), lambda _: body.prompts, sampling)

    @router.post("/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        messages = [message.plain() for message in body.messages]
        prompts = partial(_chat_prompts, messages)
        return await answer(request, Chat(body), prompts, body.asked())

    async def answer(
        request: Request, completion: Completion, prompts: Any, sampling: Sampling
    ) -> Response:
        body = completion.body
        asked = (request, body.model, prompts, body.draws, sampling)
        if body.stream:
            events = completion.events(await service.stream(*asked))
            return StreamingResponse(
                unbroken(request.url.path, events), media_type="text/event-stream"
            )
        answered = await service.write(*asked)
        return JSONResponse(await run_in_threadpool(completion.answer, answered))

    return router


def _chat_prompts(messages: list[dict[str, str]], posterior: Posterior) -> list[str]:
    return [chat_prompt(posterior, messages)]
