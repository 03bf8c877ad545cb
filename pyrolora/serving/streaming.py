"""Answers that begin before they are whole: tokens as the only draw writes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pyrolora.predictive import NewToken
from pyrolora.serving.errors import RefusalError
from pyrolora.serving.guard import failed
from pyrolora.serving.replies import refused
from pyrolora.serving.text import UNFINISHED, first_stop


@dataclass(frozen=True)
class Early:
    """A token that is sent before its text is whole.

    Attributes
    ----------
    prompt, continuation
        The numbers of the prompt, and of its continuation.
    part
        What the token adds to the text.
    token
        The token, with its law.
    """

    prompt: int
    continuation: int
    part: str
    token: NewToken

    @property
    def uncertainty(self) -> dict[str, float]:
        """The entropies of the token in nats; a draw alone has no epistemic one."""
        entropy = self.token.entropy
        return {"entropy": entropy, "aleatoric": entropy, "epistemic": 0.0}


class Unfolding:
    """The text of one continuation while its tokens come.

    A token is ready when nothing that follows can change what it adds to the text: a character of
    several tokens belongs to the last of them, and a text ends before its stop string. The last
    token is never ready, nor, where there are stop strings, the newest: they are sent with the
    whole answer.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._tokens: list[NewToken] = []
        self._parts: list[str] = []
        self._sent = 0

    def push(self, token: NewToken) -> list[tuple[str, NewToken]]:
        """Take the next token, and return those that are ready with what they add.

        A text that is written again, since the first attempt failed, goes on where it was.
        """
        del self._tokens[token.place :], self._parts[token.place :]
        self._tokens.append(token)
        shown = "".join(self._parts)
        whole = self._tokenizer.decode([t.id for t in self._tokens], skip_special_tokens=True)
        ready = whole.startswith(shown) and not whole.endswith(UNFINISHED)
        self._parts.append(whole[len(shown) :] if ready else "")
        if token.last:
            return []
        until = self._safe()
        made = [(self._parts[t], self._tokens[t]) for t in range(self._sent, until)]
        self._sent = max(self._sent, until)
        return made

    def _safe(self) -> int:
        """Return the number of tokens that no stop string can take back."""
        if not self._stops:
            return len(self._parts)
        text = "".join(self._parts)
        if first_stop(text, self._stops) is not None:
            return self._sent
        held = max(_beginning(text, stop) for stop in self._stops)
        size, safe = 0, 0
        for number, part in enumerate(self._parts[:-1], start=1):
            size += len(part)
            if size > len(text) - held:
                break
            safe = number if part else safe  # tokens without a text go with the next that has one
        return safe


def _beginning(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` with which ``stop`` begins."""
    most = min(len(text), len(stop) - 1)
    return next((size for size in range(most, 0, -1) if text.endswith(stop[:size])), 0)


class Telling:
    """Follows the continuations of one prompt, and sends the tokens that are ready.

    Parameters
    ----------
    prompt
        The number of the prompt in its request.
    tokenizer, stops
        Of the posterior, and of the request.
    alternatives
        How many of the likeliest tokens are sent with each.
    send
        Called in the thread that writes.
    """

    def __init__(
        self,
        prompt: int,
        tokenizer: Any,
        stops: Sequence[str],
        alternatives: int,
        send: Callable[[Early], None],
    ) -> None:
        self.alternatives = alternatives
        self._prompt = prompt
        self._new = lambda: Unfolding(tokenizer, stops)
        self._texts: dict[int, Unfolding] = {}
        self._send = send

    def __call__(self, continuation: int, token: NewToken) -> None:
        if continuation not in self._texts:
            self._texts[continuation] = self._new()
        for part, ready in self._texts[continuation].push(token):
            self._send(Early(self._prompt, continuation, part, ready))


class Stream:
    """The tokens of an answer as they come, and the whole answer at the end.

    Attributes
    ----------
    tokenizer
        Of the posterior.
    choices
        The number of continuations per prompt.
    """

    def __init__(self, tokenizer: Any, choices: int, queue: asyncio.Queue[Any]) -> None:
        self.tokenizer = tokenizer
        self.choices = choices
        self._queue = queue
        self._first: Any = None

    async def begin(self) -> Stream:
        """Wait until something can be sent.

        Raises
        ------
        Exception
            Whatever kept the answer from beginning.
        """
        self._first = await self._queue.get()
        if isinstance(self._first, Exception):
            raise self._first
        return self

    async def __aiter__(self) -> AsyncIterator[Any]:
        item = self._first
        while True:
            if isinstance(item, Exception):
                raise item
            yield item
            if not isinstance(item, Early):
                return
            item = await self._queue.get()


async def at_once(answered: Any, choices: int) -> Stream:
    """Return a whole answer as a stream."""
    queue: asyncio.Queue[Any] = asyncio.Queue()
    queue.put_nowait(answered)
    return await Stream(answered.tokenizer, choices, queue).begin()


def steady(tokenizer: Any) -> bool:
    """Return whether later tokens leave the text of earlier ones as it is.

    A tokenizer that cleans spaces up takes some of them back.
    """
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    cleans = getattr(tokenizer, "clean_up_tokenization_spaces", False)
    return not (cleans or getattr(decoder, "cleanup", False))


async def unbroken(path: str, events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yield events, and in place of an error the event that names it in the interface's words."""
    try:
        async for event in events:
            yield event
    except Exception as error:
        response = refused(path, error) if isinstance(error, RefusalError) else failed(path, error)
        yield f"data: {bytes(response.body).decode()}\n\n"
