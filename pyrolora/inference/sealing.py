"""The list of a checkpoint's parts, each with its digest: what is missing or changed is found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from pyrolora.errors import CheckpointError
from pyrolora.files import flush, opened, read_strict_json, write_whole

PARTS_FILE = "parts.json"


def seal(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write the list of the parts of a folder: all of its files, or those of ``names``.

    The disk has all parts before the list has its name, so that a folder with a list is whole, even
    after the machine has lost its power. The digests tell damage; they are no signature.

    Raises
    ------
    SaveError
        When the list cannot be written.
    """
    if names is None:
        names = sorted(file.name for file in folder.iterdir() if file.name != PARTS_FILE)
    parts = {}
    for name in names:
        flush(folder / name)
        parts[name] = digest(folder / name)
    write_whole(folder / PARTS_FILE, json.dumps({"sha256": parts}, indent=2).encode())


def unseal(folder: Path) -> None:
    """Remove the list, after which the folder is not taken for whole."""
    (folder / PARTS_FILE).unlink(missing_ok=True)


def is_sealed(folder: Path) -> bool:
    """Return whether the folder has a list of parts, be it true or not."""
    return (folder / PARTS_FILE).exists()


def check_seal(folder: Path, needed: Iterable[str] = ()) -> None:
    """Raise `CheckpointError` unless every listed part is there with its digest.

    ``needed`` are names that the list has to have.
    """
    file = folder / PARTS_FILE
    if not file.exists():
        raise CheckpointError(
            f"there is no file {file}, which is written last: the fit ended while it wrote the "
            "checkpoint, or an older pyrolora wrote it"
        )
    content = read_strict_json(file)
    parts = content.get("sha256") if isinstance(content, dict) else None
    if not isinstance(parts, dict):
        raise CheckpointError(f"{file} is no list of parts")
    for name in needed:
        if name not in parts:
            raise CheckpointError(f"{file} does not list {name}")
    for name, expected in parts.items():
        if Path(name).name != name:
            raise CheckpointError(f"{file} lists {name!r}, which is no name of a file")
        if digest(folder / name) != expected:
            raise CheckpointError(
                f"{folder / name} is not the file that was written (its SHA-256 differs)"
            )


def digest(file: Path) -> str:
    """Return the SHA-256 of a regular file."""
    with opened(file) as (stream, _):
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
