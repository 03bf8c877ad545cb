"""How the API reads the package: what a name in a docstring refers to, and defaults by value."""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe

from pyrolora import defaults

NAME = re.compile(r"(?<!`)`([A-Za-z_][\w.]*)`(?!`)")


class Names(griffe.Extension):
    """Make references of names in single backticks; as in numpydoc, double ones hold other code."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Change all docstrings, once every name is known."""
        refer(pkg)


def refer(found: griffe.Object | griffe.Alias) -> None:
    """Make references in an object's docstring, and in those of its members."""
    if found.is_alias:
        return
    if found.docstring:
        found.docstring.value = NAME.sub(
            lambda match: reference(found, match.group(1)), found.docstring.value
        )
    for member in found.members.values():
        refer(member)


def reference(scope: griffe.Object | griffe.Alias, name: str) -> str:
    """Return a link to what the name means in that scope; plain code, if it is on no page."""
    first, dot, rest = name.partition(".")
    try:
        target = scope.resolve(first) + dot + rest
    except griffe.NameResolutionError:
        target = name if first == "pyrolora" else f"pyrolora.{name}"
    return f'<autoref identifier="{target}" optional><code>{name}</code></autoref>'


class Values(griffe.Extension):
    """Show the values of defaults in signatures, not the names of their constants."""

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
