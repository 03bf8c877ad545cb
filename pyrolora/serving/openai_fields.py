"""Requests of OpenAI's interface."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pyrolora import defaults
from pyrolora.serving.asking import Draws, Sampling
from pyrolora.serving.errors import UnsupportedError
from pyrolora.serving.fields import MOST_STOPS, Numbers, Samples, Seed, Strict, Temperature, Text

NEW_TOKENS = 16
"""The length of a completion without ``max_tokens``, as in OpenAI's interface."""
_IGNORED: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "user": (None,),
    "n": (None,),
    "stream": (None,),
    "stream_options": (None,),
}


_OF_OTHERS = (
    *("audio", "function_call", "functions", "moderation", "parallel_tool_calls", "prediction"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "reasoning_effort"),
    *("safety_identifier", "verbosity", "web_search_options"),
)
"""Fields of chats that mean nothing here, and ask for nothing if they are null."""


class StreamOptions(Strict):
    """Options of a stream."""

    neutral: ClassVar = {"include_obfuscation": (None, False)}
    include_usage: bool = False


class Writing(Strict):
    """Fields of both kinds of completions."""

    neutral: ClassVar = _IGNORED
    model: str
    num_samples: Samples | None = None
    seed: Seed | None = None
    numbers: Numbers | None = Field(None, alias="draws")
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Temperature, Field(le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] = 1
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def length(self) -> int | None:
        return self.max_tokens

    @property
    def scores(self) -> bool:
        """Whether tokens are answered with their log-probabilities."""
        return False

    @property
    def draws(self) -> Draws:
        return Draws(self.num_samples, self.seed, self.numbers)

    def sampling(self, usual_length: int, alternatives: int | None) -> Sampling:
        """Return the settings of the text, which is sampled unless the temperature is 0."""
        if self.stream_options is not None and not self.stream:
            raise UnsupportedError("stream_options are those of a stream: true", "stream_options")
        temperature = 1.0 if self.temperature is None else self.temperature
        options: dict[str, Any] = {}
        if temperature:
            options = {"temperature": temperature, "top_k": 0, "top_p": self.top_p or 1.0}
        elif self.top_p not in (None, 1):
            raise UnsupportedError(
                "top_p chooses among sampled tokens; at temperature 0 leave it out", "top_p"
            )
        return Sampling(
            self.length,
            usual_length,
            tuple(sorted(options.items())),
            tuple(self.stops),
            sampled=bool(temperature),
            choices=self.n,
            alternatives=alternatives,
        )


class CompletionRequest(Writing):
    """One or several prompts."""

    neutral: ClassVar = {
        **_IGNORED,
        "best_of": (None, 1),
        "echo": (None, False),
        "suffix": (None, ""),
    }
    prompt: Text | Annotated[list[Text], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def scores(self) -> bool:
        return self.logprobs is not None

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
    """A conversation."""

    neutral: ClassVar = {
        **_IGNORED,
        "tools": (None, []),
        "tool_choice": (None, "none"),
        "response_format": (None, {"type": "text"}),
        "metadata": (None, {}),
        "store": (None, False),
        "modalities": (None, ["text"]),
        "service_tier": (None, "auto"),
        "logprobs": (None,),
        **dict.fromkeys(_OF_OTHERS, (None,)),
    }
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def length(self) -> int | None:
        return self.max_tokens or self.max_completion_tokens

    @property
    def scores(self) -> bool:
        return self.logprobs

    def asked(self) -> Sampling:
        """Return the settings of the text."""
        if self.top_logprobs is not None and not self.logprobs:
            raise UnsupportedError("top_logprobs needs logprobs: true", "top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise UnsupportedError(
                "max_tokens and max_completion_tokens say the same; give one", "max_tokens"
            )
        return self.sampling(
            defaults.MAX_NEW_TOKENS, (self.top_logprobs or 0) if self.logprobs else None
        )
