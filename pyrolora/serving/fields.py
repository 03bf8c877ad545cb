"""Fields of requests: each is obeyed or refused by its name."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MOST_STOPS = 16
"""Stop strings of a request."""

COLDEST = 0.01
"""Least temperature of sampling: logits that are divided by less are infinite soon."""


def _not_too_cold(temperature: float) -> float:
    """Refuse temperatures that are neither 0, the likeliest token, nor one to sample at."""
    if 0 < temperature < COLDEST:
        raise ValueError(f"0 takes the likeliest token, and sampling needs at least {COLDEST}")
    return temperature


Temperature = Annotated[float, Field(ge=0), AfterValidator(_not_too_cold)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Samples = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]


class Strict(BaseModel):
    """A part of a request.

    ``neutral`` has fields of the interface that are not obeyed here, with the values that ask for
    nothing, which clients may send; any other value of them is refused, as an unknown field is.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if not cls._asks_nothing(name, value)}

    @classmethod
    def _asks_nothing(cls, name: str, value: Any) -> bool:
        return any(
            value == nothing and isinstance(value, bool) == isinstance(nothing, bool)
            for nothing in cls.neutral.get(name, ())
        )
