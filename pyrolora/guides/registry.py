"""The registry of guides: names, classes, and guides from names and options."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pyrolora.adapters import AdapterBank, LayerSpec
from pyrolora.adapters.config import AdapterConfig
from pyrolora.checks import is_redefined
from pyrolora.errors import ConfigError, UnknownNameError
from pyrolora.guides.options import Guide
from pyrolora.guides.supports import Supports
from pyrolora.json_values import as_json
from pyrolora.options import check_options, short
from pyrolora.seeding import seeded

GuideClass = TypeVar("GuideClass", bound=type[Guide])

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,79}")

_REGISTRY: dict[str, type[Guide]] = {}


def register(kind: GuideClass) -> GuideClass:
    """Make a guide known by its ``name``: to `pyrolora.fit`, and to `pyrolora.load`.

    A posterior that was saved with it loads in any process that has registered it. Serves as a
    decorator, too; the same class statement may be run again, as in a notebook.

    Parameters
    ----------
    kind
        A frozen dataclass on `Guide`, whose options all have defaults.

    Returns
    -------
    type
        ``kind``.

    Raises
    ------
    ConfigError
        For a name that is taken or no name, and for a class that lacks a part: an abstract method,
        a default, or, in its program, a method of a capability that it states.
    """
    check_class(kind)
    known = _REGISTRY.get(kind.name)
    if known is not None and not is_redefined(known, kind):
        raise ConfigError(
            f"there is a guide {kind.name!r} already, {known.__qualname__}, got "
            f"{kind.__qualname__}; give it another name"
        )
    _REGISTRY[kind.name] = kind
    return kind


def check_class(kind: Any) -> None:
    """Raise `ConfigError` for a class that cannot be registered, naming the part that it lacks."""
    if not (isinstance(kind, type) and issubclass(kind, Guide)):
        raise ConfigError(f"a guide must be a class on pyrolora.guides.Guide, got {kind!r}")
    named = f"the guide {kind.__qualname__}"
    name = getattr(kind, "name", None)
    if not isinstance(name, str) or NAME.fullmatch(name) is None:
        raise ConfigError(
            f"{named} needs a name of letters, digits, _ and -, got {name!r}; set the class "
            "attribute name"
        )
    if inspect.isabstract(kind):
        missing = ", ".join(sorted(kind.__abstractmethods__))
        raise ConfigError(f"{named} lacks {missing}; define what pyrolora.guides.Guide leaves open")
    parameters: Any = kind.__dict__.get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise ConfigError(
            f"{named} is no frozen dataclass, and its options could not be saved; decorate it with "
            "@dataclass(frozen=True, kw_only=True)"
        )
    required = [f.name for f in dataclasses.fields(kind) if f.init and not _has_default(f)]
    if required:
        raise ConfigError(
            f"{named} has no default for {', '.join(required)}, and its name alone stands for all "
            "defaults; give one"
        )
    _check_program(kind, named)


def _has_default(option: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return option.default is not missing or option.default_factory is not missing


def _check_program(kind: type[Guide], named: str) -> None:
    """Build the program of the default options over one small layer."""
    guide = kind()
    if not isinstance(guide.supports, Supports):
        raise ConfigError(
            f"{named} must state what it supports, got {guide.supports!r}; return "
            "pyrolora.guides.Supports(...)"
        )
    if not guide.adapts:
        return
    with seeded(0):
        layer = LayerSpec("layer", in_features=2, out_features=2, rank=1, scaling=1.0)
        try:
            guide.build(AdapterBank([layer], AdapterConfig(r=1)))
        except TypeError as error:  # raised for a program with abstract methods
            raise ConfigError(
                f"the program of {named} cannot be made: {error}; define what "
                "pyrolora.guides.Program leaves open"
            ) from error


def available() -> list[str]:
    """Return the names of all guides."""
    return list(_REGISTRY)


def guide_class(name: str) -> type[Guide]:
    """Return the class of options of the guide called ``name``."""
    if name not in _REGISTRY:
        raise UnknownNameError(
            f"unknown guide {short(name)!r}; choose one of {', '.join(available())}, or register "
            "another with pyrolora.guides.register (from a shell: pyrolora --import MODULE ...)"
        )
    return _REGISTRY[name]


def unregistered(name: str) -> str | None:
    """Return the guide in ``name``, ``"x"`` or ``"flat+x"``, that is to be registered first."""
    return next((n for n in name.split("+") if n not in _REGISTRY and NAME.fullmatch(n)), None)


def as_guide(guide: str | Guide) -> Guide:
    """Return a guide object as it is, or the guide of that name with its default options.

    The name of a guide around another one joins both: ``"flat+montec"``.
    """
    if isinstance(guide, Guide):
        if _REGISTRY.get(guide.name) is type(guide) and not unregistered(full_name(guide)):
            _check_storable(guide)
        return guide
    if isinstance(guide, str):
        return from_options(guide, {})
    raise ConfigError(
        f"guide must be one of {', '.join(available())} or a guide object such as "
        f"pyrolora.guides.MonteCLoRA(...), got {guide!r}"
    )


def _check_storable(guide: Guide) -> None:
    """Raise `ConfigError`, before a fit, for options with which a folder would not load again."""
    stored: dict[str, Any] = {}
    for name, value in dataclasses.asdict(guide).items():
        try:
            stored[name] = json.loads(as_json(value))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"the options of {guide.name!r} are saved as JSON, got {name}={value!r}: {error}; "
                "make the option of numbers, texts, lists and dicts with texts for keys"
            ) from error
    again = from_options(full_name(guide), stored)
    if again != guide:
        raise ConfigError(
            f"{guide!r} would come back from a folder as {again!r}; let the __post_init__ of "
            f"{type(guide).__qualname__} make one of the other (of a tuple, JSON makes a list)"
        )


def from_options(name: str, options: Mapping[str, Any]) -> Guide:
    """Return the guide of that name (``"montec"``, ``"flat+montec"``) with these options.

    ``options["inner"]`` are those of the inner guide.
    """
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
    """Return the name by which `from_options` makes the guide."""
    inner = getattr(guide, "inner", None)
    return guide.name if inner is None else f"{guide.name}+{full_name(inner)}"
