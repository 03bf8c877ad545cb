"""An object that answers requests, and its answers, whatever runs the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request

from pyrolora.posterior import Posterior
from pyrolora.serving.asking import Draws, Sampling
from pyrolora.serving.errors import UnsupportedError
from pyrolora.serving.limits import Limits
from pyrolora.serving.metrics import Metrics
from pyrolora.serving.streaming import Stream
from pyrolora.serving.verbs import Classify, Labels, Write, Written


@dataclass(frozen=True)
class Classified:
    """Predictions of the texts of a request, their settings, and the posterior's tokenizer."""

    settings: Classify
    predictions: list[Labels]
    tokenizer: Any


@dataclass(frozen=True)
class Answered:
    """Continuations of a request, and the means to read them.

    Attributes
    ----------
    settings, prompts, written
        Per prompt the settings, the tokens, and its continuations.
    tokenizer
        Of the posterior.
    ends
        The ids that end a text.
    """

    settings: list[Write]
    prompts: list[list[int]]
    written: list[Written]
    tokenizer: Any
    ends: frozenset[int]


class Names(Protocol):
    """The posteriors that there are."""

    def names(self) -> list[str]:
        """Return their names, sorted."""
        ...

    def task(self, name: str) -> str | None:
        """Return the task of one of them; None where it cannot be told."""
        ...


class Answering(Protocol):
    """An object that answers the requests of both interfaces."""

    @property
    def registry(self) -> Names: ...
    @property
    def limits(self) -> Limits: ...
    @property
    def metrics(self) -> Metrics: ...

    async def classify(
        self, request: Request, name: str | None, texts: Sequence[str], draws: Draws
    ) -> Classified:
        """Return the classes of texts."""
        ...

    async def write(
        self,
        request: Request,
        name: str | None,
        prompts: Callable[[Posterior], Sequence[str]],
        draws: Draws,
        sampling: Sampling,
    ) -> Answered:
        """Return continuations of prompts."""
        ...

    async def stream(
        self,
        request: Request,
        name: str | None,
        prompts: Callable[[Posterior], Sequence[str]],
        draws: Draws,
        sampling: Sampling,
    ) -> Stream:
        """Return the answer of `write` as a stream, when the first of it can be sent."""
        ...

    async def finish(self) -> None:
        """End when what has begun is answered."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return what ``/info`` says beside the version and the limits."""
        ...


def named(name: str | None, default: str | None, names: Sequence[str]) -> str:
    """Return the name of the posterior that a request means.

    Raises
    ------
    UnsupportedError
        When it names none, and there are several.
    """
    if name is not None or default is not None:
        return str(default if name is None else name)
    if len(names) != 1:
        raise UnsupportedError(
            f"name one of the posteriors, of which there are {len(names)}: {', '.join(names[:20])}",
            "adapter_id",
        )
    return names[0]
