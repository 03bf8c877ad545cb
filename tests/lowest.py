"""Print the lower bounds of the package's dependencies as constraints: ``name==lowest``.

``make lowest`` installs them in an environment of its own and runs some tests there.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).parent.parent / "pyproject.toml"
EXTRAS = ("peft", "serve")
"""The extras that add to what the package does; the others are for its development."""


def requirements(extras: tuple[str, ...] = EXTRAS) -> Iterator[str]:
    """Yield the requirements of the package and of these extras."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    yield from project["dependencies"]
    for extra in extras:
        yield from project["optional-dependencies"][extra]


def lowest(requirement: str) -> str:
    """Return ``name==version`` for a requirement ``name>=version,...``."""
    bound = re.fullmatch(r"([\w.-]+)>=([\d.]+)(,\S+)?", requirement)
    if bound is None:
        raise ValueError(
            f"{requirement!r} has no lower bound that can be tested; write name>=version"
        )
    return f"{bound[1]}=={bound[2]}"


if __name__ == "__main__":
    print("\n".join(map(lowest, requirements())))
