"""Bounds of one request, and of all of them together."""

from __future__ import annotations

from dataclasses import dataclass

from pyrolora.checks import whole_number
from pyrolora.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """Bounds of a server.

    Attributes
    ----------
    body
        Bytes of a request's body.
    texts
        Texts of one request.
    new_tokens
        Tokens that one continuation may have.
    draws
        Draws that one request may take.
    choices
        Continuations that one request may be answered with.
    queue
        Requests' rows that may wait.
    timeout
        Seconds until a request is given up.
    window
        Seconds that a row waits for others to share its batch.
    batch_tokens
        Tokens of a batch, over all draws.
    """

    body: int = 1_000_000
    texts: int = 64
    new_tokens: int = 512
    draws: int = 64
    choices: int = 16
    queue: int = 256
    timeout: float = 60.0
    window: float = 0.005
    batch_tokens: int = 65_536

    def __post_init__(self) -> None:
        for name in ("body", "texts", "new_tokens", "draws", "choices", "queue", "batch_tokens"):
            whole_number(name, getattr(self, name), at_least=1)
        if not 0 < self.timeout < float("inf"):
            raise ConfigError(f"timeout must be a number of seconds above 0, got {self.timeout}")
        if not 0 <= self.window < float("inf"):
            raise ConfigError(f"window must be a number of seconds from 0, got {self.window}")
