"""Models that come with the library, for trying it without a model hub."""

from __future__ import annotations

from pathlib import Path

from pyrolora.errors import UnknownNameError

# In an installed package the models lie inside it, in a clone beside it.
_CLONE = Path(__file__).parents[1]
_ROOTS = (
    Path(__file__).parent / "_models",
    *([_CLONE / "models"] if (_CLONE / "pyproject.toml").is_file() else []),
)


def available() -> list[str]:
    """Return the names of the embedded models."""
    return sorted({config.parent.name for root in _ROOTS for config in root.glob("*/config.json")})


def folder(name: str) -> Path:
    """Return the folder of an embedded model, which ``pyrolora.fit`` and transformers take.

    Raises
    ------
    UnknownNameError
        When there is none of that name.
    """
    if name not in available():
        raise UnknownNameError(
            f"unknown embedded model {name!r}; there are: {', '.join(available()) or 'none'}"
        )
    return next(root / name for root in _ROOTS if (root / name / "config.json").is_file())
