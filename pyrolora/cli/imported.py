"""``pyrolora --import MODULE``: guides and tasks from outside of the package."""

from __future__ import annotations

import importlib
import importlib.metadata
import shlex
from typing import Annotated

import typer

from pyrolora.cli.output import program, tell


def _stop(asked: bool) -> None:
    """Print the version of the package, where it is asked for, and end the command."""
    if asked:
        tell(f"pyrolora {importlib.metadata.version('pyrolora')}")
        raise typer.Exit


def imported(
    modules: Annotated[
        list[str] | None,
        typer.Option(
            "--import",
            metavar="MODULE",
            help="Import this Python module first, which registers guides or tasks of its own "
            "(pyrolora.guides.register, pyrolora.tasks.register). May be repeated; stands before "
            "the command.",
            show_default=False,
        ),
    ] = None,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and stop.", is_eager=True, callback=_stop
        ),
    ] = False,
) -> None:
    """Import the modules that register what a command names, or what a run was fitted with."""
    for name in modules or ():
        try:
            importlib.import_module(name)
        except (ImportError, TypeError) as error:  # TypeError: a relative name
            raise typer.BadParameter(
                f"cannot import {name!r}: {error}; give the name of a module that Python finds "
                "('my_package.counts'), with its folder in PYTHONPATH if it is not installed"
            ) from error


def again(context: typer.Context) -> str:
    """Return how the next command begins: the program, and the modules that this one imported."""
    modules = (context.parent.params if context.parent else {}).get("modules") or ()
    return " ".join([program(), *(f"--import {shlex.quote(name)}" for name in modules)])
