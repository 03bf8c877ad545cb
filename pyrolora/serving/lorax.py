"""LoRAX's REST interface."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse

from pyrolora.serving.answering import Answered, Answering
from pyrolora.serving.answers import Continuation, continuations, number
from pyrolora.serving.asking import Draws, Sampling
from pyrolora.serving.bodies import StrictRoute
from pyrolora.serving.entities import entities as entities_of
from pyrolora.serving.errors import UnsupportedError
from pyrolora.serving.fields import MOST_STOPS, Numbers, Samples, Seed, Strict, Temperature, Text
from pyrolora.serving.streaming import Early, Stream, unbroken

FINISH = {"end": "eos_token", "stop": "stop_sequence", "length": "length"}
_IGNORED: dict[str, tuple[Any, ...]] = {
    "adapter_source": (None, "local"),
    "merged_adapters": (None,),
    "api_token": (None,),
    "apply_chat_template": (None, False),
    "best_of": (None, 1),
    "truncate": (None,),
    "watermark": (None, False),
    "decoder_input_details": (None, False),
    "ignore_eos_token": (None, False),
    "response_format": (None,),
}


class Parameters(Strict):
    """Settings of a continuation."""

    neutral: ClassVar = _IGNORED
    adapter_id: str | None = None
    num_samples: Samples | None = None
    seed: Seed | None = None
    draws: Numbers | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    do_sample: bool = False
    temperature: Annotated[Temperature, Field(le=100)] | None = None
    top_k: Annotated[int, Field(gt=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    stop: Annotated[list[Text], Field(max_length=MOST_STOPS)] | None = None
    return_full_text: bool | None = None
    details: bool = False
    return_k_alternatives: Annotated[int, Field(gt=0, le=20)] | None = None

    def sampling(self) -> Sampling:
        """Return the settings of the text; as in LoRAX, an option of sampling asks for it."""
        names = ("do_sample", "top_k", "top_p", "typical_p")
        asked = [name for name in names if getattr(self, name) not in (None, False)]
        if self.temperature == 0 and asked:
            raise UnsupportedError(
                f"parameters.{asked[0]}: samples tokens, and temperature 0 takes the likeliest; "
                "give one of them",
                asked[0],
            )
        sampled = bool(asked or self.temperature)
        options: dict[str, Any] = {}
        if self.repetition_penalty is not None:
            options["repetition_penalty"] = self.repetition_penalty
        if sampled:
            options |= {
                "temperature": self.temperature or 1.0,
                "top_k": self.top_k or 0,
                "top_p": self.top_p or 1.0,
                "typical_p": self.typical_p or 1.0,
            }
        if self.return_k_alternatives is not None and not self.details:
            raise UnsupportedError(
                "parameters.return_k_alternatives: stand among the details; say details: true",
                "return_k_alternatives",
            )
        return Sampling(
            self.max_new_tokens,
            options=tuple(sorted(options.items())),
            stops=tuple(self.stop or ()),
            sampled=sampled,
            alternatives=(self.return_k_alternatives or 0) if self.details else None,
        )


class GenerateRequest(Strict):
    """A prompt."""

    neutral: ClassVar = {"parameters": (None,), "stream": (False,)}
    inputs: Text
    parameters: Parameters = Parameters()


class EitherRequest(GenerateRequest):
    """A prompt whose answer may be streamed."""

    neutral: ClassVar = {"parameters": (None,)}
    stream: bool = False


class StreamRequest(GenerateRequest):
    """A prompt whose answer is streamed."""

    neutral: ClassVar = {"parameters": (None,), "stream": (True,)}


class ClassifyParameters(Strict):
    """A posterior, and its draws."""

    neutral: ClassVar = _IGNORED
    adapter_id: str | None = None
    num_samples: Samples | None = None
    seed: Seed | None = None
    draws: Numbers | None = None


class ClassifyRequest(Strict):
    """A text."""

    neutral: ClassVar = {"parameters": (None,), "stream": (None, False)}
    inputs: Text
    parameters: ClassifyParameters = ClassifyParameters()


class ClassifyBatchRequest(ClassifyRequest):
    """Several texts."""

    inputs: Annotated[list[Text], Field(min_length=1)]  # type: ignore[assignment]


def routes(service: Answering) -> APIRouter:
    """Return the routes of the interface."""
    router = APIRouter(tags=["LoRAX"], route_class=StrictRoute)

    def asked(body: GenerateRequest) -> tuple[Any, ...]:
        fields = body.parameters
        draws = Draws(fields.num_samples, fields.seed, fields.draws)
        return fields.adapter_id, lambda _: [body.inputs], draws, fields.sampling()

    async def written(request: Request, body: GenerateRequest) -> tuple[Answered, Continuation]:
        answered = await service.write(request, *asked(body))
        (one,) = await run_in_threadpool(continuations, answered, 0)
        return answered, one

    def whole(body: GenerateRequest, answered: Answered, one: Continuation) -> dict[str, Any]:
        full = body.inputs if body.parameters.return_full_text else ""
        answer: dict[str, Any] = {"generated_text": full + one.text}
        if body.parameters.details:
            answer["details"] = {
                **_details(answered, one),
                "prefill": [],
                "tokens": _tokens(answered, one),
            }
        return {**answer, "uncertainty": one.uncertainty}

    @router.post("/generate")
    async def generate(request: Request, body: GenerateRequest) -> Response:
        return JSONResponse(whole(body, *await written(request, body)))

    @router.post("/generate_stream")
    async def generate_stream(request: Request, body: StreamRequest) -> Response:
        return await streamed(request, body)

    async def streamed(request: Request, body: GenerateRequest) -> Response:
        body.parameters.details = True  # every event of a stream has its token
        events = _events(body, await service.stream(request, *asked(body)))
        return StreamingResponse(unbroken(request.url.path, events), media_type="text/event-stream")

    @router.post("/")
    async def either(request: Request, body: EitherRequest) -> Response:
        if body.stream:
            return await streamed(request, body)
        return JSONResponse([whole(body, *await written(request, body))])

    async def entities(
        request: Request, asked: ClassifyParameters, texts: list[str]
    ) -> list[list[dict[str, Any]]]:
        draws = Draws(asked.num_samples, asked.seed, asked.draws)
        found = await service.classify(request, asked.adapter_id, texts, draws)
        return [
            entities_of(prediction, found.settings, text, found.tokenizer)
            for prediction, text in zip(found.predictions, texts, strict=True)
        ]

    @router.post("/classify")
    async def classify(request: Request, body: ClassifyRequest) -> Response:
        return JSONResponse((await entities(request, body.parameters, [body.inputs]))[0])

    @router.post("/classify_batch")
    async def classify_batch(request: Request, body: ClassifyBatchRequest) -> Response:
        return JSONResponse(await entities(request, body.parameters, body.inputs))

    return router


def _details(answered: Answered, one: Continuation) -> dict[str, Any]:
    return {
        "finish_reason": FINISH[one.finish],
        "prompt_tokens": len(answered.prompts[0]),
        "generated_tokens": len(one.ids),
        "seed": answered.settings[0].seed,
    }


def _tokens(answered: Answered, one: Continuation) -> list[dict[str, Any]]:
    scores = one.scores
    assert scores is not None
    tokens = []
    for t, (token, part) in enumerate(zip(one.ids, one.parts, strict=True)):
        others = list(zip(scores.ids[t].tolist(), scores.scores[t].tolist(), strict=True))
        uncertain = {n: v for n, v in one.uncertainty["tokens"][t].items() if n != "text"}
        chosen = float(scores.chosen[t])
        tokens.append(_token(answered.tokenizer, token, part, chosen, others, uncertain))
    return tokens


def _token(
    tokenizer: Any,
    token: int,
    part: str,
    logprob: float,
    others: list[tuple[int, float]],
    uncertain: dict[str, Any],
) -> dict[str, Any]:
    special = token in {*tokenizer.all_special_ids}
    about: dict[str, Any] = {
        "id": token,
        "text": tokenizer.decode([token]) if special else part,
        "logprob": number(logprob),
        "special": special,
    }
    if others:
        about["alternative_tokens"] = [
            {"id": other, "text": tokenizer.decode([other]), "logprob": number(score)}
            for other, score in others
        ]
    return {**about, "uncertainty": uncertain}


async def _events(body: GenerateRequest, stream: Stream) -> AsyncIterator[str]:
    """Yield an event per token; the last has the whole text and its uncertainty."""
    sent = 0
    async for item in stream:
        if isinstance(item, Early):
            sent += 1
            new = item.token
            others = list(zip(new.ids, new.logprobs, strict=True))
            about = (new.id, item.part, new.logprob, others, item.uncertainty)
            yield _event(_token(stream.tokenizer, *about))
            continue
        (one,) = await run_in_threadpool(continuations, item, 0)
        nothing = {"id": 0, "text": "", "logprob": 0.0, "special": True}
        *before, last = _tokens(item, one)[sent:] or [nothing]
        for token in before:
            yield _event(token)
        full = body.inputs if body.parameters.return_full_text else ""
        yield _event(last, full + one.text, _details(item, one), uncertainty=one.uncertainty)


def _event(token: dict[str, Any], text: str | None = None, details: Any = None, **more: Any) -> str:
    event = {"token": token, "generated_text": text, "details": details, **more}
    return f"data: {json.dumps(event)}\n\n"
