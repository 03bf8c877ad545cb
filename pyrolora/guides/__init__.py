"""Guides: one method a file, each a Pyro model/guide pair over the adapter factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pyrolora.errors import ConfigError, UnknownNameError
from pyrolora.guides.dropout import Dropout
from pyrolora.guides.engines import Curvature, Fit
from pyrolora.guides.ensemble import Ensemble
from pyrolora.guides.flat import Flat
from pyrolora.guides.full import Full
from pyrolora.guides.laplace import Laplace
from pyrolora.guides.lowrank import LowRank
from pyrolora.guides.map import MAP
from pyrolora.guides.meanfield import MeanField
from pyrolora.guides.montec import MonteCLoRA
from pyrolora.guides.nuts import NUTS
from pyrolora.guides.options import Guide, Variational
from pyrolora.guides.plates import averaged, spread
from pyrolora.guides.program import Program
from pyrolora.guides.swag import SWAG
from pyrolora.guides.tfb import TFB
from pyrolora.guides.wrapping import WrappingProgram
from pyrolora.options import check_options, short

_REGISTRY: dict[str, type[Guide]] = {
    kind.name: kind
    for kind in (
        *(MAP, MonteCLoRA, Flat, MeanField, LowRank),
        *(Laplace, TFB, SWAG, Ensemble, Dropout, NUTS, Full),
    )
}


def available() -> list[str]:
    """The names of all guides."""
    return list(_REGISTRY)


def guide_class(name: str) -> type[Guide]:
    """The class of options of the guide called ``name``."""
    if name not in _REGISTRY:
        raise UnknownNameError(
            f"unknown guide {short(name)!r}; choose one of {', '.join(available())}"
        )
    return _REGISTRY[name]


def as_guide(guide: str | Guide) -> Guide:
    """A guide with its default options from a name, or the guide itself. Of a guide around another
    one the name joins both: ``"flat+montec"``."""
    if isinstance(guide, Guide):
        return guide
    if isinstance(guide, str):
        return from_options(guide, {})
    raise ConfigError(
        f"guide must be one of {', '.join(available())} or a guide object such as "
        f"pyrolora.guides.MonteCLoRA(...), got {guide!r}"
    )


def from_options(name: str, options: Mapping[str, Any]) -> Guide:
    """The guide of that name (``"montec"``, ``"flat+montec"``); ``options["inner"]`` are those of
    the inner one."""
    outer, joined, inner = name.partition("+")
    kind, options = guide_class(outer), dict(options)
    nested = options.pop("inner", {}) if joined else {}
    check_options(kind, options, f"{outer}.")
    if joined:
        if "inner" not in {field.name for field in dataclasses.fields(kind)}:
            raise ConfigError(f"{outer!r} is not a guide around another one, got {name!r}")
        if not isinstance(nested, Mapping):
            raise ConfigError(f"{outer}.inner: expected the options of {inner!r}")
        options["inner"] = from_options(inner, nested)
    return kind(**options)


def full_name(guide: Guide) -> str:
    """What `from_options` calls the guide."""
    inner = getattr(guide, "inner", None)
    return guide.name if inner is None else f"{guide.name}+{full_name(inner)}"


__all__ = [
    "MAP",
    "NUTS",
    "SWAG",
    "TFB",
    "Curvature",
    "Dropout",
    "Ensemble",
    "Fit",
    "Flat",
    "Full",
    "Guide",
    "Laplace",
    "LowRank",
    "MeanField",
    "MonteCLoRA",
    "Program",
    "Variational",
    "WrappingProgram",
    "as_guide",
    "available",
    "averaged",
    "from_options",
    "full_name",
    "guide_class",
    "spread",
]
