"""Signatures show the values of defaults, not the names of their constants."""

from __future__ import annotations

import ast
from typing import Any

import griffe

from pyrolora import defaults


class Values(griffe.Extension):
    """An extension of griffe, which reads the package for the API."""

    def on_attribute_instance(
        self, *, node: Any, attr: griffe.Attribute, agent: Any, **kwargs: Any
    ) -> None:
        """Replace the default of a dataclass's field."""
        attr.value = value(attr.value)

    def on_function_instance(
        self, *, node: Any, func: griffe.Function, agent: Any, **kwargs: Any
    ) -> None:
        """Replace the defaults of a function's parameters."""
        for parameter in func.parameters:
            parameter.default = value(parameter.default)


def value(default: Any) -> Any:
    """Return the value of `defaults.NAME`, and anything else as it is."""
    found = getattr(defaults, str(default).removeprefix("defaults."), None)
    known = isinstance(default, griffe.Expr) and str(default).startswith("defaults.")
    return repr(found) if known and ast.literal_eval(repr(found)) == found else default
