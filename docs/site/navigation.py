"""The order of the pages: `nav` of mkdocs.yml, whose patterns stand for the rest of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def leaves(nav: Any) -> list[str]:
    """Return the files of a navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [leaf for entry in entries for leaf in leaves(entry)]


def expanded(nav: Any, named: frozenset[str] | None = None) -> Any:
    """Return a navigation with the files of each pattern that it does not name elsewhere."""
    named = frozenset(leaves(nav)) if named is None else named
    if isinstance(nav, dict):
        return {title: expanded(entry, named) for title, entry in nav.items()}
    if isinstance(nav, str):
        return nav
    entries: list[Any] = []
    for entry in nav:
        if isinstance(entry, str) and "*" in entry:
            found = {path.relative_to(ROOT).as_posix() for path in ROOT.glob(entry)}
            entries += sorted(found - named)
        else:
            entries.append(expanded(entry, named))
    return entries
