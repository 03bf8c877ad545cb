"""Fields of requests: each is obeyed or refused by its name."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MOST_STOPS = 16
"""Stop strings of a request."""
LEAST_TEMPERATURE = 1e-6
"""Logits that are divided by less overflow."""

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Samples = Annotated[int, Field(ge=0)]
Numbers = Annotated[list[int], Field(min_length=1)]
"""Numbers of draws."""
Text = Annotated[str, Field(min_length=1)]


def _temperature(value: float) -> float:
    if 0 < value < LEAST_TEMPERATURE:
        raise PydanticCustomError(
            "temperature",
            f"Input should be 0, for the likeliest text, or at least {LEAST_TEMPERATURE}",
        )
    return value


Temperature = Annotated[float, Field(ge=0), AfterValidator(_temperature)]


class Strict(BaseModel):
    """A part of a request.

    ``neutral`` has fields of the interface that are not obeyed here, with the values that ask for
    nothing, which clients may send; any other value of them is refused, as an unknown field is.
    Values have the type of their field: ``true`` is no number, and ``"3"`` neither.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)
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
