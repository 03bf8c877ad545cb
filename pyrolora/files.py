"""Safe reading and writing of files that others may have prepared.

They are read only where they are plain files, and written in one move that follows no link. What is
renamed is on the disk before its name is, and the name before anything older is removed.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pyrolora.errors import CheckpointError, PyroLoraError, SaveError

MOST_JSON = 2**26
"""The largest JSON file that is read or written, in bytes: the history of some 400,000 steps."""
SCRATCH = r"\.[0-9a-f]{16}\.part"
"""Names of the files that a write leaves behind when it dies."""

# Errors of Rust (tokenizers, safetensors), of torch.save and of HDF5, which have no class for it.
_OF_DISK = re.compile(
    r"\bos error \d+|No space left|file write failed|PytorchStreamWriter failed|iostream error|"
    r"unexpected pos \d+ vs"
)
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


def shown(value: Any) -> str:
    """Return a value as an error message quotes it: short, and without control characters."""
    text = _repr.repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


@contextmanager
def opened(file: Path) -> Iterator[tuple[IO[bytes], int]]:
    """Open a regular file, or a link to one, for reading; yield it and its size.

    Raises
    ------
    CheckpointError
        For anything else of that name (a folder, a pipe, a device), at once.
    """
    try:
        _check_regular(file, os.stat(file))
        handle = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot read {shown(str(file))}: {_reason(error)}") from error
    with open(handle, "rb") as stream:
        status = os.fstat(handle)
        _check_regular(file, status)
        yield stream, status.st_size


def read_bytes(file: Path, at_most: int) -> bytes:
    """Return the content of a regular file; raise `CheckpointError` above ``at_most`` bytes."""
    with opened(file) as (stream, size):
        if size > at_most:
            raise CheckpointError(
                f"{file} has {size:,} bytes, and files of its kind at most {at_most:,}; it is "
                "damaged, or no file of pyrolora's: restore it from a copy"
            )
        return stream.read(at_most + 1)


def read_strict_json(file: Path) -> Any:
    """Return the value of a JSON file that has what the standard allows (`strict_json`).

    Raises
    ------
    CheckpointError
        For any other file.
    """
    content = read_bytes(file, MOST_JSON)
    try:
        return strict_json(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is damaged, not readable as JSON: {_reason(error)}; restore it from a copy"
        ) from error


def strict_json(content: bytes) -> Any:
    """Parse JSON by the standard: each name once per object, and finite numbers only.

    Raises
    ------
    ValueError, RecursionError
        For anything else, also where `json.loads` would take it.
    """
    return json.loads(
        content.decode("utf-8"),
        object_pairs_hook=_object,
        parse_constant=_no_number,
        parse_float=_float,
    )


def write_whole(file: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, even after a crash, as `replacing` does."""
    with replacing(file) as scratch:
        scratch.write_bytes(content)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a new file in the same folder, which takes the name of ``file`` after the block.

    A link of that name is replaced; the file that it points to stays as it is.

    Raises
    ------
    SaveError
        When it cannot be written: a full disk, a folder without permission. The older file of that
        name stays.
    """
    scratch = file.with_name(f".{secrets.token_hex(8)}.part")
    with writing(file):
        try:
            os.close(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            yield scratch
            flush(scratch)
            scratch.replace(file)
            flush(file.parent)
        except BaseException:
            with suppress(OSError):
                scratch.unlink(missing_ok=True)
            raise


def remove_scratch(folder: Path) -> None:
    """Remove the files that writes to a folder left behind as they died; none may be under way."""
    for item in folder.iterdir():
        if re.fullmatch(SCRATCH, item.name):
            item.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside ``folder``, which takes its name after the block.

    Raises
    ------
    SaveError
        When it cannot be written, or ``folder`` exists and is not empty.
    """
    scratch = folder.with_name(f".{secrets.token_hex(8)}.part")
    with writing(folder):
        try:
            scratch.mkdir()
            yield scratch
            flush_tree(scratch)
            scratch.replace(folder)
            flush(folder.parent)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise `SaveError`, which names ``path``, where the block cannot write.

    That is an `OSError`, or what libraries in other languages make of one.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, PyroLoraError) or not of_disk(error):
            raise
        raise SaveError(
            f"cannot write {path}: {_reason(error)}; make room, or choose another place"
        ) from error


def of_disk(error: Exception) -> bool:
    """Return whether an error says that a file cannot be written."""
    return isinstance(error, OSError) or _OF_DISK.search(str(error)) is not None


def check_writable(folder: Path) -> None:
    """Raise `SaveError` unless a file can be made in the folder, and have content."""
    with replacing(folder / ".writable") as scratch:
        scratch.write_bytes(b"\0" * 4096)  # an empty file can be made on a full disk
    with writing(folder):
        (folder / ".writable").unlink()


def flush(path: Path) -> None:
    """Have the disk keep a file's content, or a folder's list of names."""
    folder = path.is_dir()
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError:
        if not folder:  # some file systems cannot do it for folders
            raise
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """Have the disk keep all files below a folder, and their names."""
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            if not (file := Path(place) / name).is_symlink():
                flush(file)
        flush(Path(place))


def _check_regular(file: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a socket or a device"
        raise CheckpointError(f"{file} is {kind}, where a file is needed; restore it from a copy")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, one in pairs:
        if name in value:
            raise ValueError(f"it has {shown(name)} twice in one object")
        value[name] = one
    return value


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON's")


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {shown(text)} is too large")
    return value


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(getattr(error, "strerror", None) or error)[:200]
