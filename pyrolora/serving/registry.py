"""Posteriors by name: loaded when asked for, kept within a budget of bytes."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from pyrolora.errors import ConfigError, PyroLoraError
from pyrolora.posterior import Posterior
from pyrolora.serving.errors import (
    BusyError,
    DamagedPosteriorError,
    UnknownPosteriorError,
    UnsupportedError,
)
from pyrolora.serving.networks import Networks
from pyrolora.storage import META_FILE, read_folder

LONGEST_NAME = 255
PATIENCE = 30.0
"""Seconds that a request waits for posteriors in use to make room."""


@dataclass(eq=False)
class _Entry:
    """A posterior in memory, and the family of those whose rows may stand beside its rows."""

    posterior: Posterior
    family: str
    size: int
    stamp: tuple[int, ...]
    users: int = 0
    retired: bool = False


class Lease:
    """A posterior in use; it stays in memory until `release`."""

    def __init__(self, registry: Registry, name: str, entry: _Entry) -> None:
        self._registry = registry
        self._entry = entry
        self._held = True
        self.name = name

    @property
    def posterior(self) -> Posterior:
        return self._entry.posterior

    @property
    def family(self) -> str:
        """Equal for posteriors whose rows may share a pass."""
        return self._entry.family

    def release(self) -> None:
        """Give the posterior back; a second call does nothing."""
        if self._held:
            self._held = False
            self._registry._release(self._entry)

    def again(self) -> Lease:
        """Return another lease of the same posterior."""
        with self._registry._changed:
            self._entry.users += 1
        return Lease(self._registry, self.name, self._entry)

    def __enter__(self) -> Posterior:
        return self.posterior

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.release()


class Registry:
    """The posteriors in the folders of one directory, on one network.

    A posterior is loaded by the first request that names it, once, however many ask at the same
    time. Where the budget is spent, those not in use leave, the least recently used first; a
    request waits while all are in use. A folder that was saved again since is loaded again.

    Parameters
    ----------
    directory
        A directory with a folder per posterior, as `Posterior.save` writes them.
    model
        The network of all of them, or the hub id or folder to load it from.
    budget
        The most bytes of posteriors in memory, beside the network; None: no limit.
    device
        The device of network and posteriors; None: where the network is.
    patience
        Seconds to wait for room.
    """

    def __init__(
        self,
        directory: str | Path,
        model: str | Path | nn.Module,
        *,
        budget: int | None = None,
        device: torch.device | str | None = None,
        patience: float = PATIENCE,
    ) -> None:
        self.directory = Path(directory).resolve()
        if not self.directory.is_dir():
            raise ConfigError(
                f"there is no folder {str(directory)!r}; name the directory that has a folder per "
                "posterior"
            )
        if budget is not None and budget <= 0:
            raise ConfigError(f"the budget is a number of bytes above 0, got {budget}")
        self.networks = Networks(model, device)
        self.budget = budget
        self._patience = patience
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._loading: set[str] = set()
        self._bytes = 0
        self._tasks: dict[str, tuple[tuple[int, ...], str]] = {}
        self._changed = threading.Condition()

    @property
    def bytes(self) -> int:
        """Bytes of the posteriors in memory, and of those being loaded."""
        return self._bytes

    def loaded(self) -> list[str]:
        """Return the names of the posteriors in memory, the least recently used first."""
        with self._changed:
            return list(self._entries)

    def names(self) -> list[str]:
        """Return the names of all posteriors of the directory, sorted."""
        return sorted(
            folder.name for folder in self.directory.iterdir() if self._folder(folder.name)
        )

    def task(self, name: str) -> str | None:
        """Return the task of a posterior from its folder; None where it cannot be read."""
        folder = self._folder(name)
        if folder is None:
            return None
        try:
            stamp = _stamp(folder)
            if self._tasks.get(name, (None, None))[0] != stamp:
                self._tasks[name] = (stamp, read_folder(folder).description.task)
        except (PyroLoraError, OSError):
            return None
        return self._tasks[name][1]

    def lease(self, name: str) -> Lease:
        """Return the posterior of that name for use until it is released.

        Raises
        ------
        UnknownPosteriorError
            When the directory has no posterior of that name.
        DamagedPosteriorError, OtherBaseError
            When its folder cannot be loaded on the network of the server.
        BusyError
            When others in use leave no room for it.
        """
        folder = self._folder(name)
        if folder is None:
            raise UnknownPosteriorError(name, self.names())
        stamp = _stamp(folder)
        with self._changed:
            self._changed.wait_for(lambda: name not in self._loading)
            entry = self._entries.get(name)
            if entry is not None and entry.stamp == stamp:
                entry.users += 1
                self._entries.move_to_end(name)
                return Lease(self, name, entry)
            self._loading.add(name)
        try:
            return Lease(self, name, self._load(name, folder, stamp))
        finally:
            with self._changed:
                self._loading.discard(name)
                self._changed.notify_all()

    def close(self) -> None:
        """Let every posterior go that is not in use."""
        with self._changed:
            idle = [self._retire(name) for name in [*self._entries]]
        self._detach(idle)

    def _folder(self, name: str) -> Path | None:
        """Return the folder of a posterior, one of the directory itself without links out of it."""
        plain = 0 < len(name) <= LONGEST_NAME and not name.startswith(".")
        if not plain or any(c in "/\\:" or not c.isprintable() for c in name):
            return None
        folder = self.directory / name
        try:
            if not (folder / META_FILE).is_file() or folder.resolve().parent != self.directory:
                return None
            inside = all(
                file.resolve().is_relative_to(self.directory) for file in folder.rglob("*")
            )
        except OSError:
            return None
        return folder if inside else None

    def _load(self, name: str, folder: Path, stamp: tuple[int, ...]) -> _Entry:
        expected = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        self._make_room(name, expected)
        try:
            posterior, family = self.networks.load(folder)
        except BaseException:
            self._account(-expected)
            raise
        size = _own_bytes(posterior)
        entry = _Entry(posterior, family, size, stamp, users=1)
        with self._changed:
            self._bytes += size - expected
            self._entries[name] = entry
        return entry

    def _make_room(self, name: str, size: int) -> None:
        """Reserve ``size`` bytes, for which idle posteriors leave.

        The older state of a folder that was saved again leaves first.
        """
        if self.budget is not None and size > self.budget:
            raise UnsupportedError(
                f"the posterior {name!r} has {size:,} bytes, and the server keeps "
                f"{self.budget:,} in all; start it with a larger budget",
                "model",
            )
        idle: list[_Entry | None] = []
        try:
            with self._changed:
                if name in self._entries:
                    idle.append(self._retire(name))
                self._wait_for_room(size, idle)
                self._bytes += size
        finally:
            self._detach(idle)

    def _wait_for_room(self, size: int, idle: list[_Entry | None]) -> None:
        """Retire idle posteriors, and wait for those in use, until ``size`` bytes are free."""
        until = time.monotonic() + self._patience
        while self.budget is not None and self._bytes + size > self.budget:
            victim = next((n for n, e in self._entries.items() if not e.users), None)
            if victim is not None:
                idle.append(self._retire(victim))
            elif not self._changed.wait(until - time.monotonic()):
                raise BusyError("all posteriors in memory are in use; try again later")

    def _retire(self, name: str) -> _Entry | None:
        """Forget a posterior; return it if nobody uses it any more."""
        entry = self._entries.pop(name)
        entry.retired = True
        if entry.users:
            return None
        self._bytes -= entry.size
        return entry

    def _release(self, entry: _Entry) -> None:
        with self._changed:
            entry.users -= 1
            gone = entry.retired and not entry.users
            if gone:
                self._bytes -= entry.size
            self._changed.notify_all()
        if gone:
            self._detach([entry])

    def _account(self, size: int) -> None:
        with self._changed:
            self._bytes += size
            self._changed.notify_all()

    def _detach(self, entries: list[_Entry | None]) -> None:
        for entry in entries:
            if entry is not None:
                self.networks.detach(entry.posterior)


def _stamp(folder: Path) -> tuple[int, ...]:
    """Return numbers that change when a folder is saved again."""
    try:
        status = (folder / META_FILE).stat()
    except OSError as error:
        raise DamagedPosteriorError(
            f"the posterior {folder.name!r} cannot be read: {error.strerror}"
        ) from error
    return status.st_mtime_ns, status.st_size, status.st_ino


def _own_bytes(posterior: Posterior) -> int:
    """Return the bytes of a posterior's tensors beside those of the shared network."""
    shared = {id(tensor) for tensor in posterior.base.parameters()}
    shared |= {id(tensor) for tensor in posterior.base.buffers()}
    if not posterior.options.adapts:
        shared = set()
    tensors = [*posterior.model.parameters(), *posterior.model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors if id(t) not in shared)
