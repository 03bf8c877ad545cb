"""Refusals in the words of each interface."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from starlette.responses import JSONResponse, Response

from pyrolora.serving.errors import RefusalError

OPENAI_KINDS = {
    "validation": "invalid_request_error",
    "not_found": "invalid_request_error",
    "authentication": "authentication_error",
    "overloaded": "rate_limit_error",
    "generation": "server_error",
}

ALTERNATIVE = re.compile(r"(constrained-)?str$|list\[")
"""What pydantic adds to the place of a value that may have one of several types."""


def refused(path: str, error: RefusalError) -> Response:
    """Return the response to a refused request: below ``/v1`` in OpenAI's form, else LoRAX's."""
    message = str(error)
    if path.startswith("/v1/"):
        code = "model_not_found" if error.kind == "not_found" else None
        body: Any = {
            "error": {
                "message": message,
                "type": OPENAI_KINDS[error.kind],
                "param": error.field,
                "code": code,
            }
        }
    else:
        body = {"error": message, "error_type": error.kind}
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body, error.status, headers)


def invalid(problems: Sequence[Any]) -> RefusalError:
    """Make one error of pydantic's about the fields of a request."""
    said = []
    fields = []
    for problem in problems[:5]:
        body, *place = (str(part) for part in problem["loc"])
        if body != "body":
            place.insert(0, body)
        if problem["type"] != "extra_forbidden":
            place = [*place[:1], *(part for part in place[1:] if not ALTERNATIVE.match(part))]
        field = ".".join(place)
        fields.append(field)
        reason = problem["msg"]
        if problem["type"] == "extra_forbidden":
            reason = "this server does not obey it, so leave it out"
        said.append(f"{field or 'the body'}: {reason}")
    error = RefusalError("; ".join(said), fields[0] if fields else None)
    error.status = 422
    return error
