"""One fit at a time in a folder."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pyrolora.errors import ConfigError

LOCK_FILE = ".lock"
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
_held: dict[Path, tuple[int, int]] = {}  # folder -> thread, and how often it holds the lock
_streams: set[int] = set()
_guard = threading.Lock()


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made, for the block; a thread may hold it several times.

    The kernel locks the file ``.lock``: the lock ends with the process that holds it, however that
    ends. The file says who holds it. (On a file system without locks nothing is locked.)

    Raises
    ------
    ConfigError
        When another process, or another thread, holds it; the message says which.
    """
    place, me = Path(folder).resolve(), threading.get_ident()
    new = not place.exists()
    with _guard:
        owner, count = _held.get(place, (me, 0))
        if owner != me:
            raise _refusal(place, {"pid": os.getpid(), "host": socket.gethostname()})
        stream = None if count else _locked_file(place, folder)
        _streams.update(() if stream is None else (stream,))
        _held[place] = me, count + 1  # a second file of the same process would wait for the first
    try:
        yield
    finally:
        with _guard:
            _held[place] = me, count
            if not count:
                del _held[place]
        if stream is not None:
            with suppress(OSError):  # a disk that can no longer be written to
                (place / LOCK_FILE).unlink(missing_ok=True)  # while it is locked: see `_is_there`
            _streams.discard(stream)
            os.close(stream)
            with suppress(OSError):  # a folder that is not empty stays
                if new:
                    place.rmdir()


def _forget() -> None:
    """Close the files in a forked process, such as one that loads data.

    It would keep the lock when its parent is killed.
    """
    for stream in _streams:
        os.close(stream)
    _streams.clear()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _locked_file(folder: Path, output_dir: str | Path) -> int:
    """Return the descriptor of the folder's lock file, with this process in it."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stream = os.open(folder / LOCK_FILE, _FLAGS, 0o644)
        except FileNotFoundError:
            continue  # its holder has just removed the folder, which was empty
        except OSError as error:
            raise ConfigError(
                f"output_dir={str(output_dir)!r} cannot be made a folder that is written to: "
                f"{error}; choose another"
            ) from error
        try:
            _lock(stream, folder)
        except BaseException:
            os.close(stream)
            raise
        if _is_there(stream, folder / LOCK_FILE):
            break
        os.close(stream)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    who = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
    with suppress(OSError):  # on a full disk it does not say who, and locks all the same
        os.ftruncate(stream, 0)
        os.pwrite(stream, json.dumps(who).encode(), 0)
    return stream


def _lock(stream: int, folder: Path) -> None:
    import fcntl  # only Unix has it

    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise _refusal(folder, _holder(stream)) from None
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise ConfigError(
                f"{folder} cannot be locked for a fit: {error}; choose another"
            ) from error


def _is_there(stream: int, path: Path) -> bool:
    """Return whether the locked file still has its name: its last holder removes it."""
    try:
        return os.path.samestat(os.fstat(stream), path.stat())
    except FileNotFoundError:
        return False


def _holder(stream: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(stream, 4096, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _refusal(folder: Path, holder: dict[str, Any]) -> ConfigError:
    pid, host, since = (holder.get(name) for name in ("pid", "host", "since"))
    who = f"process {pid} on {host}" if isinstance(pid, int) else "another process"
    when = f" since {since}" if isinstance(since, str) and since.isprintable() else ""
    return ConfigError(
        f"{folder} is in use: {who} fits in it{when}; wait for it, or choose another output_dir"
    )
