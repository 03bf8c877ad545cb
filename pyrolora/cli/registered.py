"""Help that names what the registries hold, looked up when the help is asked for."""

from __future__ import annotations

import textwrap
from typing import Any

from typer.core import TyperCommand


class RegisteredHelp(TyperCommand):
    """A command whose help says ``{tasks}``, ``{guides}``, ``{post_hoc}`` and ``{priors}``.

    The registries import torch, for which the list of commands does not wait.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from pyrolora import guides, tasks

        kinds = {name: guides.as_guide(name) for name in guides.available()}
        names = {
            "tasks": tasks.available(),
            "guides": [*kinds],
            "post_hoc": [name for name, guide in kinds.items() if guide.supports.post_hoc],
            "priors": [name for name, guide in kinds.items() if guide.supports.prior],
        }
        listed = {part: ", ".join(some) for part, some in names.items()}
        for parameter in self.params:
            text = getattr(parameter, "help", None)
            if text:
                parameter.help = text.format(**listed)  # type: ignore[attr-defined]
        # In a block of its own, since paragraphs are broken at hyphens, as names of tasks have.
        listed["tasks"] = "\n".join(textwrap.wrap(listed["tasks"], 76, break_on_hyphens=False))
        self.help = self.help and self.help.format(**listed)
        super().format_help(ctx, formatter)
