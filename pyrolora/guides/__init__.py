"""Guides: one method a file, each a Pyro model/guide pair over the adapter factors."""

from __future__ import annotations

from pyrolora.errors import ConfigError, UnknownNameError
from pyrolora.guides.base import Guide, Program
from pyrolora.guides.map import MAP
from pyrolora.guides.montec import MonteCLoRA

_REGISTRY: dict[str, type[Guide]] = {kind.name: kind for kind in (MAP, MonteCLoRA)}


def available() -> list[str]:
    """The names of all guides."""
    return list(_REGISTRY)


def guide_class(name: str) -> type[Guide]:
    """The class of options of the guide called ``name``."""
    if name not in _REGISTRY:
        raise UnknownNameError(f"unknown guide {name!r}; choose one of {', '.join(available())}")
    return _REGISTRY[name]


def as_guide(guide: str | Guide) -> Guide:
    """A guide with its default options from a name, or the guide itself."""
    if isinstance(guide, Guide):
        return guide
    if isinstance(guide, str):
        return guide_class(guide)()
    raise ConfigError(
        f"guide must be one of {', '.join(available())} or a guide object such as "
        f"pyrolora.guides.MonteCLoRA(...), got {guide!r}"
    )


__all__ = ["MAP", "Guide", "MonteCLoRA", "Program", "as_guide", "available", "guide_class"]
