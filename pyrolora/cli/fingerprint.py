"""Fingerprints of a run's data and model: whether they are those of an earlier run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets


def fingerprint(source: str, data: datasets.Dataset) -> str:
    """Return a digest of the file, or the fingerprint that ``datasets`` keeps."""
    path = Path(source)
    if path.is_file():
        with path.open("rb") as stream:
            return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()
    return f"datasets:{data._fingerprint}"


def place(name: str) -> str:
    """Return a path as it holds from every folder; a name that is none stays."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def sizes_of_files(model: str) -> dict[str, int]:
    """Return the sizes of a model's files, by which another model in its folder is noticed."""
    if not Path(model).is_dir():
        return {}
    return {item.name: item.stat().st_size for item in sorted(Path(model).iterdir())}
