"""Requests that the server refuses, each with its status."""

from __future__ import annotations

from collections.abc import Collection

from pyrolora.errors import PyroLoraError, listed


class RefusalError(PyroLoraError):
    """A request that is not answered.

    Attributes
    ----------
    status
        The status of the HTTP response.
    kind
        The error type, in the words of LoRAX and OpenAI.
    field
        The field of the request that is at fault, if it is one.
    retry_after
        Seconds after which a client may try again, or None.
    """

    status = 400
    kind = "validation"
    retry_after: int | None = None

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class UnsupportedError(RefusalError):
    """A field, or a value of it, that the answer would have to ignore."""

    status = 422


class UnknownPosteriorError(RefusalError):
    """A name that is no posterior of the directory."""

    status = 404
    kind = "not_found"

    def __init__(self, name: str, names: Collection[str]) -> None:
        super().__init__(
            f"there is no posterior {name[:100]!r}; there are: {listed(names, most=20)}", "model"
        )


class DamagedPosteriorError(RefusalError):
    """A folder that cannot be loaded."""

    status = 422


class OtherBaseError(RefusalError):
    """A posterior that was fitted on another network than the served one."""

    status = 422


class TooLongError(RefusalError):
    """A text, or a body, above its limit."""

    status = 413


class KeyRefusedError(RefusalError):
    """A request without the key of the server."""

    status = 401
    kind = "authentication"


class BusyError(RefusalError):
    """More requests than the queue holds, or posteriors than the memory does."""

    status = 429
    kind = "overloaded"
    retry_after = 1


class ClosingError(RefusalError):
    """A request that came while the server was shutting down."""

    status = 503
    kind = "overloaded"
    retry_after = 10


class LateError(RefusalError):
    """A request that was not answered within its time."""

    status = 504
    kind = "generation"


class ClientGoneError(RefusalError):
    """A client that hung up; nobody reads the answer."""

    status = 499
