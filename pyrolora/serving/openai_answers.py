"""Answers of OpenAI's interface, whole and as events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

from pyrolora.serving.answers import Continuation, continuations, number
from pyrolora.serving.openai_fields import Writing
from pyrolora.serving.service import Answered
from pyrolora.serving.text import UNFINISHED, TokenScores

FINISH = {"end": "stop", "stop": "stop", "length": "length"}


class Completion:
    """A completion as one object, or as an event per token."""

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
        """Return the whole answer."""
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
        """Yield the answer as server-sent events, choice after choice."""
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
        """Return the text of a choice."""
        return {"text": one.text}

    def piece(self, part: str | None, *, first: bool) -> dict[str, Any]:
        """Return the text of an event."""
        return {"text": part or ""}

    def logprobs(self, one: Continuation, places: range) -> dict[str, Any] | None:
        """Return log-probabilities of the tokens at these places, if they were asked for."""
        scores, decode = one.scores, self.answered.tokenizer.decode
        if scores is None:
            return None
        offsets = [sum(map(len, one.parts[:t])) for t in places]
        alternatives = [self._by_text(scores, t) for t in places]
        return {
            "tokens": [decode([one.ids[t]]) for t in places],
            "token_logprobs": [number(scores.chosen[t]) for t in places],
            "top_logprobs": alternatives if scores.ids.shape[-1] else None,
            "text_offset": offsets,
        }

    def _by_text(self, scores: TokenScores, t: int) -> dict[str, float | None]:
        """Return log-probabilities by the texts of tokens, or their names where texts are equal."""
        tokenizer = self.answered.tokenizer
        found: dict[str, float | None] = {}
        for token, score in zip(scores.ids[t].tolist(), scores.scores[t], strict=True):
            text = tokenizer.decode([token])
            if text in found:
                text = tokenizer.convert_ids_to_tokens(token)
            found[text] = number(score)
        return found


class Chat(Completion):
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
