"""The folder of a run: its request, its checkpoints, its posterior."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrolora.cli.hidden import hidden
from pyrolora.cli.output import say
from pyrolora.errors import CheckpointError, ConfigError, SaveError
from pyrolora.files import read_strict_json, write_whole, writing
from pyrolora.folder_lock import locked

if TYPE_CHECKING:
    from pyrolora.posterior import Posterior

RECORD = "run.json"
LAST_GOOD = "last_good"
PACKAGES = ("pyrolora", "torch", "pyro-ppl", "transformers", "datasets", "arviz")


@dataclass(frozen=True)
class Run:
    """A folder with ``run.json``, checkpoints until the fit is finished, and then the posterior.

    ``run.json`` has the command, every option, digests of the data, versions, and at the end the
    result.
    """

    folder: Path

    @property
    def record(self) -> dict[str, Any] | None:
        """The content of ``run.json``, or None without one."""
        file = self.folder / RECORD
        if not file.exists():
            return None
        try:
            record = read_strict_json(file)
        except CheckpointError as error:
            raise ConfigError(f"{error}; choose another folder") from error
        if not _is_record(record):
            raise ConfigError(f"{file} is damaged: it is no record of a run; choose another folder")
        return dict(record)

    @property
    def result(self) -> dict[str, Any] | None:
        """The result of a finished run."""
        return (self.record or {}).get("result")

    def columns(self) -> dict[str, Any]:
        """Return the columns that the command named; none for a folder that Python saved."""
        record = self.record or {}
        return dict(record.get("options", {}).get("columns", {}))

    def classes(self) -> set[str]:
        """Return the names of the classes of the posterior in the folder.

        A damaged one has none here, and says so when it is loaded.
        """
        from pyrolora.storage import META_FILE

        try:
            meta = read_strict_json(self.folder / META_FILE)
            names = {str(name) for name in meta["base"]["config"]["id2label"].values()}
            return names | {str(name) for name in meta.get("classes") or ()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return set()

    def keeps_labels(self) -> bool:
        """Return whether the labels of the posterior's task say which tokens it scores."""
        from pyrolora.storage import META_FILE
        from pyrolora.tasks import task_class

        try:
            return task_class(read_strict_json(self.folder / META_FILE)["task"]).keeps_labels
        except (OSError, ValueError, LookupError, TypeError):
            return False  # a damaged one says so when it is loaded

    def start(self, options: Mapping[str, Any], command: str, *, write: bool) -> bool:
        """Claim the folder for this run; return whether the run was there before.

        Raises
        ------
        ConfigError
            When it holds another run.
        """
        from pyrolora.inference import checkpoints, differences
        from pyrolora.storage import META_FILE, finite

        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"{self.folder} is a file; --output-dir needs a folder")
        now = {"options": hidden(finite(options)), "versions": _versions()}
        record = self.record
        if record is not None:
            changed = differences(record.get("options", {}), now["options"])
            if changed:
                raise ConfigError(
                    f"{self.folder} holds a run with other settings: {'; '.join(changed)}; repeat "
                    "its command to go on with it, or choose another --output-dir"
                )
            other = differences(record.get("versions", {}), now["versions"])
            if other:
                say(f"note: the run began with other versions: {'; '.join(other)}")
            return True
        if (self.folder / META_FILE).is_file() or checkpoints(self.folder):
            raise ConfigError(f"{self.folder} holds another fit; choose another --output-dir")
        if write:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            machine = {"system": platform.platform(), "processor": platform.machine()}
            self._write(
                {"command": command, "directory": str(Path.cwd()), **now, "machine": machine}
            )
        return False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from the folder for the block; the second one is refused."""
        with nullcontext() if self.folder.is_file() else locked(self.folder):  # a file is refused
            yield

    def save(self, posterior: Posterior, result: Mapping[str, Any]) -> None:
        """Save the posterior of a fit that is done, and its result.

        Raises
        ------
        SaveError
            When they cannot be written. The checkpoints stay, and the same command goes on.
        """
        try:
            posterior.save(self.folder)
            self.finish(result)
        except SaveError as error:
            raise SaveError(f"{error}. {self.goes_on()}") from error

    def goes_on(self) -> str:
        """Return what the same command does after a fit that could not be written."""
        from pyrolora.inference import member_folders, newest_whole

        newest = newest_whole(self.folder)[0]
        if newest is None and not member_folders(self.folder):
            return "There is no checkpoint yet: the same command begins anew"
        return f"With room, the same command goes on from {newest or 'the members'}"

    def finish(self, result: Mapping[str, Any]) -> None:
        """Add the result, and remove the checkpoints."""
        self._write({**(self.record or {}), "result": result})
        self.tidy()

    def tidy(self) -> None:
        """Remove the checkpoints of a finished fit, which only a resume needs."""
        from pyrolora.inference import checkpoints, member_folders

        for checkpoint in (*checkpoints(self.folder), *member_folders(self.folder)):
            shutil.rmtree(checkpoint)

    def abandon(self) -> None:
        """Forget a run that failed before its first checkpoint."""
        from pyrolora.inference import checkpoints, member_folders

        if checkpoints(self.folder) or member_folders(self.folder):
            return
        (self.folder / RECORD).unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _write(self, record: Mapping[str, Any]) -> None:
        from pyrolora.storage import as_json

        write_whole(self.folder / RECORD, as_json(record).encode())


def _is_record(record: Any) -> bool:
    """Return whether the entries that commands read have the types that they expect."""
    if not isinstance(record, dict):
        return False
    options = record.get("options", {})
    parts = [options, record.get("versions", {}), record.get("result", {})]
    if not all(isinstance(part, dict) for part in parts):
        return False
    columns = options.get("columns", {})
    if not isinstance(columns, dict):
        return False
    text, label = columns.get("text", []), columns.get("label")
    return (
        isinstance(text, list)
        and all(isinstance(name, str) for name in text)
        and (label is None or isinstance(label, str))
    )


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
