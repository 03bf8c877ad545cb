"""OpenAI's REST interface: models, completions, chat completions."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response, StreamingResponse

from pyrolora import defaults
from pyrolora.serving.answers import Continuation, continuations, number
from pyrolora.serving.errors import UnknownPosteriorError, UnsupportedError
from pyrolora.serving.fields import Samples, Seed, Strict, Text
from pyrolora.serving.service import Answered, Draws, Sampling, Service, chat_prompt

FINISH = {"end": "stop", "stop": "stop", "length": "length"}
OWNER = "pyrolora"
NEW_TOKENS = 16
"""Of a completion that does not say, as in OpenAI's interface."""
_IGNORED: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "user": (None,),
    "stream_options": (None,),
}


class StreamOptions(Strict):
    """Whether the last event has the numbers of tokens."""

    neutral: ClassVar = {"include_obfuscation": (None, False)}
    include_usage: bool = False


class Writing(Strict):
    """What both kinds of completions have."""

    neutral: ClassVar = _IGNORED
    model: str
    num_samples: Samples | None = None
    seed: Seed | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] = 1
    stop: Text | list[Text] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def draws(self) -> Draws:
        return Draws(self.num_samples, self.seed)

    def sampling(self, usual_length: int, alternatives: int | None) -> Sampling:
        """The settings of the text: sampled from the whole law unless the temperature is 0."""
        temperature = 1.0 if self.temperature is None else self.temperature
        options: dict[str, Any] = {}
        if temperature:
            options = {"temperature": temperature, "top_k": 0, "top_p": self.top_p or 1.0}
        elif self.top_p not in (None, 1):
            raise UnsupportedError(
                "top_p chooses among sampled tokens; at temperature 0 leave it out", "top_p"
            )
        return Sampling(
            self.max_tokens or usual_length,
            tuple(sorted(options.items())),
            sampled=bool(temperature),
            choices=self.n,
            alternatives=alternatives,
        )


class CompletionRequest(Writing):
    """Prompts to go on with."""

    neutral: ClassVar = {
        **_IGNORED,
        "best_of": (None, 1),
        "echo": (None, False),
        "suffix": (None, ""),
    }
    prompt: Text | Annotated[list[Text], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class Part(Strict):
    """A part of a message; only texts are read."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A turn of a conversation."""

    neutral: ClassVar = {"name": (None,), "tool_calls": (None, []), "refusal": (None,)}
    role: Text
    content: str | list[Part]

    def plain(self) -> dict[str, str]:
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": self.role, "content": text}


class ChatRequest(Writing):
    """A conversation to answer."""

    neutral: ClassVar = {
        **_IGNORED,
        "tools": (None, []),
        "tool_choice": (None, "none"),
        "response_format": (None, {"type": "text"}),
        "metadata": (None, {}),
        "store": (None, False),
        "modalities": (None, ["text"]),
        "service_tier": (None, "auto"),
    }
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def asked(self) -> Sampling:
        """The settings of the text."""
        if self.top_logprobs is not None and not self.logprobs:
            raise UnsupportedError("top_logprobs needs logprobs: true", "top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise UnsupportedError(
                "max_tokens and max_completion_tokens say the same; give one", "max_tokens"
            )
        usual = self.max_completion_tokens or defaults.MAX_NEW_TOKENS
        return self.sampling(usual, (self.top_logprobs or 0) if self.logprobs else None)


def routes(service: Service) -> APIRouter:
    """The routes of the interface."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])
    started = int(time.time())

    def model(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": OWNER,
            "task": service.registry.task(name),
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
        return _response(_Completion(body, answered))

    @router.post("/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        messages = [message.plain() for message in body.messages]
        answered = await service.write(
            request, body.model, lambda p: [chat_prompt(p, messages)], body.draws, body.asked()
        )
        return _response(_Chat(body, answered))

    return router


class _Completion:
    """A completion as one object, or as events of a token each."""

    prefix, whole, event = "cmpl", "text_completion", "text_completion"

    def __init__(self, body: Writing, answered: Answered) -> None:
        self.body = body
        self.answered = answered
        self.choices = [
            one
            for prompt in range(len(answered.prompts))
            for one in continuations(answered, prompt, body.stops)
        ]
        self._same = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model,
        }

    def usage(self) -> dict[str, int]:
        prompt = sum(map(len, self.answered.prompts))
        written = sum(len(one.ids) for one in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
        }

    def answer(self) -> dict[str, Any]:
        """The whole answer."""
        choices = [
            {
                "index": index,
                **self.content(one),
                "logprobs": self.logprobs(one, range(len(one.ids))),
                "finish_reason": FINISH[one.finish],
                "uncertainty": one.uncertainty,
            }
            for index, one in enumerate(self.choices)
        ]
        return {**self._same, "object": self.whole, "choices": choices, "usage": self.usage()}

    def events(self) -> Iterator[str]:
        """The answer as server-sent events, choice after choice."""
        for index, one in enumerate(self.choices):
            for t, part in enumerate(one.parts):
                yield self._event(
                    {
                        "index": index,
                        **self.piece(part, first=t == 0),
                        "logprobs": self.logprobs(one, range(t, t + 1)),
                        "finish_reason": None,
                        "uncertainty": one.uncertainty["tokens"][t],
                    }
                )
            yield self._event(
                {
                    "index": index,
                    **self.piece(None, first=not one.parts),
                    "logprobs": None,
                    "finish_reason": FINISH[one.finish],
                    "uncertainty": one.uncertainty,
                }
            )
        options = self.body.stream_options
        if options is not None and options.include_usage:
            yield self._event(usage=self.usage())
        yield "data: [DONE]\n\n"

    def _event(self, *choices: dict[str, Any], **more: Any) -> str:
        event = {**self._same, "object": self.event, "choices": choices, **more}
        return f"data: {json.dumps(event)}\n\n"

    def content(self, one: Continuation) -> dict[str, Any]:
        """The text of a choice."""
        return {"text": one.text}

    def piece(self, part: str | None, *, first: bool) -> dict[str, Any]:
        """The text of an event."""
        return {"text": part or ""}

    def logprobs(self, one: Continuation, places: range) -> dict[str, Any] | None:
        """The log-probabilities of the tokens at these places, if they were asked for."""
        scores, decode = one.scores, self.answered.tokenizer.decode
        if scores is None:
            return None
        offsets = [sum(map(len, one.parts[:t])) for t in places]
        alternatives = [
            {
                decode([token]): number(score)
                for token, score in zip(scores.ids[t].tolist(), scores.scores[t], strict=True)
            }
            for t in places
        ]
        return {
            "tokens": [decode([one.ids[t]]) for t in places],
            "token_logprobs": [number(scores.chosen[t]) for t in places],
            "top_logprobs": alternatives if scores.ids.shape[-1] else None,
            "text_offset": offsets,
        }


class _Chat(_Completion):
    """A chat completion."""

    prefix, whole, event = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def content(self, one: Continuation) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": one.text, "refusal": None}}

    def piece(self, part: str | None, *, first: bool) -> dict[str, Any]:
        delta = {"role": "assistant"} if first else {}
        return {"delta": delta if part is None else {**delta, "content": part}}

    def logprobs(self, one: Continuation, places: range) -> dict[str, Any] | None:
        scores, decode = one.scores, self.answered.tokenizer.decode
        if scores is None:
            return None

        def scored(token: int, score: Any) -> dict[str, Any]:
            text = decode([token])
            return {"token": text, "logprob": number(score), "bytes": list(text.encode())}

        content = [
            {
                **scored(one.ids[t], scores.chosen[t]),
                "top_logprobs": [
                    scored(token, score)
                    for token, score in zip(scores.ids[t].tolist(), scores.scores[t], strict=True)
                ],
            }
            for t in places
        ]
        return {"content": content, "refusal": None}


def _response(completion: _Completion) -> Response:
    if completion.body.stream:
        return StreamingResponse(completion.events(), media_type="text/event-stream")
    return JSONResponse(completion.answer())
