"""Answers of OpenAI's interface, whole and as events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import torch
from starlette.concurrency import run_in_threadpool

from pyrolora.serving.answering import Answered
from pyrolora.serving.answers import Continuation, continuations, number
from pyrolora.serving.openai_fields import Writing
from pyrolora.serving.streaming import Early, Stream
from pyrolora.serving.text import UNFINISHED, TokenScores

FINISH = {"end": "stop", "stop": "stop", "length": "length"}


class Completion:
    """A completion as one object, or as an event per token."""

    prefix, whole, event = "cmpl", "text_completion", "text_completion"

    def __init__(self, body: Writing) -> None:
        self.body = body
        self._same = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": body.model,
        }

    def choices(self, answered: Answered) -> list[Continuation]:
        """Return the continuations of all prompts, one prompt after the other."""
        prompts = range(len(answered.prompts))
        return [one for prompt in prompts for one in continuations(answered, prompt)]

    def usage(self, answered: Answered, choices: Sequence[Continuation]) -> dict[str, int]:
        prompt = sum(map(len, answered.prompts))
        written = sum(len(one.ids) for one in choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
        }

    def answer(self, answered: Answered) -> dict[str, Any]:
        """Return the whole answer."""
        choices = self.choices(answered)
        objects = [
            {
                "index": index,
                **self.content(one),
                "logprobs": self.logprobs(answered.tokenizer, one, range(len(one.ids))),
                "finish_reason": FINISH[one.finish],
                "uncertainty": one.uncertainty,
            }
            for index, one in enumerate(choices)
        ]
        usage = self.usage(answered, choices)
        return {**self._same, "object": self.whole, "choices": objects, "usage": usage}

    async def events(self, stream: Stream) -> AsyncIterator[str]:
        """Yield the answer as server-sent events: tokens as they come, then choice after choice."""
        begun: dict[int, list[Early]] = {}
        async for item in stream:
            if isinstance(item, Early):
                index = item.prompt * stream.choices + item.continuation
                begun.setdefault(index, []).append(item)
                one = _begun(begun[index], self.body.scores)
                yield self._token_event(stream.tokenizer, index, one, len(one.ids) - 1)
                continue
            choices = await run_in_threadpool(self.choices, item)
            for index, one in enumerate(choices):
                for t in range(len(begun.get(index, ())), len(one.ids)):
                    yield self._token_event(stream.tokenizer, index, one, t)
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
                yield self._event(usage=self.usage(item, choices))
        yield "data: [DONE]\n\n"

    def _token_event(self, tokenizer: Any, index: int, one: Continuation, t: int) -> str:
        return self._event(
            {
                "index": index,
                **self.piece(one.parts[t], first=t == 0),
                "logprobs": self.logprobs(tokenizer, one, range(t, t + 1)),
                "finish_reason": None,
                "uncertainty": one.uncertainty["tokens"][t],
            }
        )

    def _event(self, *choices: dict[str, Any], **more: Any) -> str:
        event = {**self._same, "object": self.event, "choices": choices, **more}
        return f"data: {json.dumps(event)}\n\n"

    def content(self, one: Continuation) -> dict[str, Any]:
        """Return the text of a choice."""
        return {"text": one.text}

    def piece(self, part: str | None, *, first: bool) -> dict[str, Any]:
        """Return the text of an event."""
        return {"text": part or ""}

    def logprobs(self, tokenizer: Any, one: Continuation, places: range) -> dict[str, Any] | None:
        """Return log-probabilities of the tokens at these places, if they were asked for."""
        scores, decode = one.scores, tokenizer.decode
        if scores is None:
            return None
        offsets = [sum(map(len, one.parts[:t])) for t in places]
        alternatives = [_by_text(tokenizer, scores, t) for t in places]
        return {
            "tokens": [decode([one.ids[t]]) for t in places],
            "token_logprobs": [number(scores.chosen[t]) for t in places],
            "top_logprobs": alternatives if scores.ids.shape[-1] else None,
            "text_offset": offsets,
        }


class Chat(Completion):
    """A chat completion."""

    prefix, whole, event = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def content(self, one: Continuation) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": one.text, "refusal": None}}

    def piece(self, part: str | None, *, first: bool) -> dict[str, Any]:
        delta = {"role": "assistant"} if first else {}
        return {"delta": delta if part is None else {**delta, "content": part}}

    def logprobs(self, tokenizer: Any, one: Continuation, places: range) -> dict[str, Any] | None:
        scores, decode = one.scores, tokenizer.decode
        if scores is None:
            return None

        def scored(token: int, score: Any) -> dict[str, Any]:
            text = decode([token])
            whole = UNFINISHED not in text  # otherwise a part of a character, without a text
            content = list(text.encode()) if whole else None
            return {"token": text, "logprob": number(score), "bytes": content}

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


def _by_text(tokenizer: Any, scores: TokenScores, t: int) -> dict[str, float | None]:
    """Return log-probabilities by the texts of tokens, or their names where texts are equal."""
    found: dict[str, float | None] = {}
    for token, score in zip(scores.ids[t].tolist(), scores.scores[t], strict=True):
        text = tokenizer.decode([token])
        if text in found:
            text = tokenizer.convert_ids_to_tokens(token)
        found[text] = number(score)
    return found


def _begun(tokens: Sequence[Early], scored: bool) -> Continuation:
    """Return the part of a continuation that is written, its end unknown."""
    parts = [one.part for one in tokens]
    new = [one.token for one in tokens]
    scores = TokenScores(
        torch.tensor([one.logprob for one in new]),
        torch.tensor([one.ids for one in new], dtype=torch.long).reshape(len(new), -1),
        torch.tensor([one.logprobs for one in new]).reshape(len(new), -1),
    )
    about = {"tokens": [{"text": one.part, **one.uncertainty} for one in tokens]}
    ids = [one.id for one in new]
    return Continuation("".join(parts), ids, parts, "length", about, scores if scored else None)
