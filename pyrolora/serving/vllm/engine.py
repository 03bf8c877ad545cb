"""A client of vLLM's HTTP interface: models, adapters, continuations, and scores of texts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from pyrolora.errors import ConfigError
from pyrolora.serving.errors import RefusalError

ALL = -1
"""As a number of tokens whose log-probabilities are asked for: the whole vocabulary."""
LEAST_LOG = -9999.0
"""What vLLM writes for the logarithm of 0, which JSON has not."""


class EngineError(RefusalError):
    """An engine that does not answer, or not what was asked."""

    status = 502
    kind = "generation"


class EngineGoneError(EngineError):
    """An engine that cannot be reached."""

    status = 503
    kind = "overloaded"
    retry_after = 10


class EngineRefusalError(EngineError):
    """A request that the engine refuses.

    Attributes
    ----------
    code
        The status of its answer.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Model:
    """A model that the engine serves.

    Attributes
    ----------
    name
        Its name in requests.
    parent
        The name of the base model of an adapter; None for a base model.
    root
        The folder, or the hub id.
    context
        The most tokens, if the engine says it.
    """

    name: str
    parent: str | None
    root: str | None
    context: int | None


@dataclass(frozen=True)
class Text:
    """A continuation: its token ids, the end of text included."""

    ids: list[int]


TokenLogs = Mapping[int, float]
"""Token id -> log p, of the tokens that the engine names at a place."""


class Engine:
    """An engine at a URL.

    Parameters
    ----------
    url
        Where ``vllm serve`` listens, without ``/v1``.
    key
        The engine's API key.
    timeout
        Seconds per request.
    """

    def __init__(self, url: str, *, key: str | None = None, timeout: float = 60.0) -> None:
        self.url = url.rstrip("/")
        try:
            parts = httpx.URL(self.url)
        except (httpx.InvalidURL, TypeError) as error:
            raise ConfigError(f"{url!r} is no URL: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.host:
            raise ConfigError(f"--url takes an address such as http://127.0.0.1:8001, got {url!r}")
        if parts.path.rstrip("/").endswith("/v1"):
            raise ConfigError(f"leave /v1 out of the engine's URL, got {url!r}")
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._options: dict[str, Any] = {
            "base_url": self.url,
            "headers": headers,
            "timeout": timeout,
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=64),
            "trust_env": False,  # a proxy of the environment would be sent every prompt
        }
        self._client: httpx.AsyncClient | None = None

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def models(self) -> list[Model]:
        """Return what the engine serves: the base model and its adapters."""
        answer = await self._ask("GET", "/v1/models")
        try:
            return [
                Model(one["id"], one.get("parent"), one.get("root"), one.get("max_model_len"))
                for one in answer["data"]
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise _strange("/v1/models", error) from error

    async def load(self, name: str, folder: str) -> None:
        """Have the engine load an adapter from a folder that it can read.

        Raises
        ------
        EngineRefusalError
            Of the code 404 where the engine lets nobody load adapters.
        """
        body = {"lora_name": name, "lora_path": folder}
        await self._ask("POST", "/v1/load_lora_adapter", body, text=True)

    async def write(self, model: str, prompt: Sequence[int], **settings: Any) -> list[Text]:
        """Return continuations of a prompt; ``settings`` are vLLM's, such as ``temperature``."""
        body = {"model": model, "prompt": list(prompt), "return_token_ids": True, **settings}
        choices = await self._choices(body)
        try:
            return [Text([int(token) for token in choice["token_ids"]]) for choice in choices]
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(
                "the engine's answer has no token_ids, which vLLM gives from version 0.10.2 on "
                f"({type(error).__name__}); use a later one"
            ) from error

    async def score(
        self, model: str, texts: Sequence[Sequence[int]], top: int
    ) -> list[list[TokenLogs | None]]:
        """Return log-probabilities at every place of texts: the ``top`` tokens, and the actual one.

        Those of the first token are None: nothing predicts it.
        """
        body = {
            "model": model,
            "prompt": [list(ids) for ids in texts],
            "max_tokens": 1,  # nothing less is taken
            "temperature": 0.0,
            "prompt_logprobs": top,
        }
        choices = await self._choices(body)
        try:
            return [
                [None if place is None else _logs(place) for place in choice["prompt_logprobs"]]
                for choice in choices
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _strange("prompt_logprobs", error) from error

    async def _choices(self, body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        answer = await self._ask("POST", "/v1/completions", body)
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        except (KeyError, TypeError) as error:
            raise _strange("/v1/completions", error) from error
        several = not isinstance(body["prompt"][0], int)
        expected = len(body["prompt"]) if several else body.get("n", 1)
        if len(choices) != expected:
            raise EngineError(f"the engine gave {len(choices)} choices, and {expected} were due")
        return choices

    async def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, text: bool = False
    ) -> Any:
        if self._client is None:  # in the loop that uses it
            self._client = httpx.AsyncClient(**self._options)
        try:
            answer = await self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise EngineGoneError(
                f"the engine does not answer ({type(error).__name__}); see whether vllm serve runs"
            ) from error
        if answer.status_code >= 400:
            raise EngineRefusalError(
                f"the engine refused {path} with status {answer.status_code}: {_said(answer)}",
                answer.status_code,
            )
        try:
            # Plainly: these are megabytes, of an engine that the operator chose.
            return None if text else await asyncio.to_thread(json.loads, answer.content)
        except (ValueError, RecursionError) as error:
            raise _strange(path, error) from error


async def together(requests: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Await requests together; where one fails, the others are ended."""
    tasks = [asyncio.ensure_future(request) for request in requests]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _logs(place: Mapping[str, Any]) -> dict[int, float]:
    """Return the log-probabilities of a place; -inf where vLLM writes its least number."""
    logs = {int(token): float(entry["logprob"]) for token, entry in place.items()}
    return {token: float("-inf") if v <= LEAST_LOG else v for token, v in logs.items()}


def _said(answer: httpx.Response) -> str:
    """Return the message of an error; versions of vLLM wrap it differently."""
    try:
        body = answer.json()
        body = body.get("error", body)
        message = body if isinstance(body, str) else body.get("message") or body.get("detail")
    except (ValueError, AttributeError):
        message = answer.text
    return str(message)[:500]


def _strange(place: str, error: Exception) -> EngineError:
    return EngineError(
        f"the engine's answer to {place} is not vLLM's ({type(error).__name__}: {error!s:.100})"
    )
