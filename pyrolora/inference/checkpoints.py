"""Checkpoints of a fit on the disk: which there are, which are whole, and how they are read."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_pt_utils import safe_globals

from pyrolora.errors import CheckpointError, ConfigError
from pyrolora.inference.sealing import check_seal, is_sealed, unseal
from pyrolora.model import JointModel

STATE_FILE = "adapters.safetensors"
FIT_FILE = "fit.json"
TRAINER_FILE = "trainer_state.json"
PICKLES = ("optimizer.pt", "scheduler.pt")
MEMBER = "member-"
AUTO = "auto"
"""The value of ``resume_from_checkpoint`` of a fit that also may begin."""

_NAME = re.compile(r"checkpoint-\d+")


def checkpoints(folder: str | Path) -> list[Path]:
    """Return the folders of the Trainer's checkpoints, whole or not."""
    paths = Path(folder).glob("checkpoint-*")
    return [path for path in paths if path.is_dir() and _NAME.fullmatch(path.name)]


def checkpoint_step(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def member_folders(folder: str | Path) -> list[Path]:
    """Return the folders in which the members of an ensemble keep their checkpoints."""
    paths = Path(folder).glob(f"{MEMBER}*")
    return sorted(p for p in paths if p.is_dir() and p.name.removeprefix(MEMBER).isdigit())


def remove_surplus(
    folder: str | Path, limit: int | None, step: int, best: str | Path | None = None
) -> None:
    """Remove the oldest checkpoints until there are ``limit``; None, or 0, keeps all.

    The newest one and the best one stay. The newest is that of the highest step up to ``step``,
    where the fit is: those of higher steps are left from before it went on from an older one, or
    from another fit. They go before the others, and those that are not whole before them.
    """
    present = checkpoints(folder)
    if not limit or limit < 0 or len(present) <= limit:
        return

    def age(checkpoint: Path) -> tuple[bool, bool, int]:
        number = checkpoint_step(checkpoint)
        return is_sealed(checkpoint), number <= step, number

    oldest_first = sorted(present, key=age)
    oldest_first.pop()
    surplus = [c for c in oldest_first if best is None or c.resolve() != Path(best).resolve()]
    for checkpoint in surplus[: len(present) - limit]:
        try:
            unseal(checkpoint)  # a part of one is never taken for a whole one
            shutil.rmtree(checkpoint)
        except OSError as error:
            warnings.warn(
                f"{checkpoint} cannot be removed, so that there are more checkpoints than "
                f"save_total_limit={limit}: {error}",
                stacklevel=2,
            )


def last_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest whole checkpoint, or None; warn of a newer one that is damaged."""
    return _warned(*newest_whole(folder))


def newest_whole(folder: str | Path) -> tuple[Path | None, str | None]:
    """Return the newest whole checkpoint, or None, and a note on a newer one that is damaged."""
    newest_first = sorted(checkpoints(folder), key=checkpoint_step, reverse=True)
    whole, note = _first_whole(newest_first)
    if newest_first and whole is None:
        newest = newest_first[0]
        note = f"{newest} is not whole, and no older one is: {damage(newest)}; beginning anew"
    return whole, note


def checkpoint_to_resume(asked: str | Path | bool, folder: str | Path) -> Path | None:
    """Return the checkpoint that was asked for.

    That is a folder, True for the newest of ``folder``, or ``"auto"`` for the newest, if there is
    one; else the fit begins. A damaged one is replaced by the next older one beside it, with a
    warning.

    Raises
    ------
    ConfigError
        When there is none.
    CheckpointError
        When none is whole.
    """
    if asked == AUTO:
        return last_checkpoint(folder)
    candidates = _candidates(asked, folder)
    if len(candidates) > 1:  # one alone may have any name
        candidates.sort(key=checkpoint_step, reverse=True)
    whole = _warned(*_first_whole(candidates))
    if whole is None:
        newest = candidates[0]
        raise CheckpointError(
            f"there is no whole checkpoint to resume from: {newest}: {damage(newest)}; begin "
            "anew, without resume_from_checkpoint"
        )
    return whole


def _candidates(asked: str | Path | bool, folder: str | Path) -> list[Path]:
    """Return the checkpoint that was asked for, and those that could replace it."""
    if isinstance(asked, bool):
        present = checkpoints(folder)
        if not present:
            raise ConfigError(
                f"resume_from_checkpoint=True, and there is no checkpoint in {folder}; leave it "
                f"out to begin anew ({AUTO!r} does either), or set output_dir to the folder of the "
                "fit"
            )
        return present
    path = Path(asked)
    if not path.is_dir():
        raise ConfigError(
            f"resume_from_checkpoint={str(asked)!r} is no folder; pass that of a checkpoint, True "
            f"for the newest one of output_dir, or {AUTO!r} for that one if there is one"
        )
    inside = sorted(checkpoints(path), key=checkpoint_step)
    if inside and not (path / TRAINER_FILE).exists():
        raise ConfigError(
            f"resume_from_checkpoint={str(asked)!r} is no checkpoint, but holds some; pass "
            f"{str(inside[-1])!r}"
        )
    if not _NAME.fullmatch(path.name):  # a folder that was renamed stands alone
        return [path]
    step = checkpoint_step(path)
    return [path, *(c for c in checkpoints(path.parent) if checkpoint_step(c) < step)]


def _first_whole(newest_first: list[Path]) -> tuple[Path | None, str | None]:
    for checkpoint in newest_first:
        if damage(checkpoint) is None:
            passed = newest_first[0]
            if passed == checkpoint:
                return checkpoint, None
            reason = damage(passed)
            return checkpoint, f"resuming from {checkpoint}, since {passed} is not whole: {reason}"
    return None, None


def _warned(checkpoint: Path | None, note: str | None) -> Path | None:
    if note is not None:
        warnings.warn(note, stacklevel=3)
    return checkpoint


def damage(checkpoint: Path) -> str | None:
    """Return why a checkpoint is not whole, or None if every part is there as it was written.

    The parts are read as data: code in a pickle is not run.
    """
    try:
        check_seal(checkpoint, (TRAINER_FILE, FIT_FILE, STATE_FILE, *PICKLES))
        state, fit = read_json(checkpoint / TRAINER_FILE), read_json(checkpoint / FIT_FILE)
        named = _NAME.fullmatch(checkpoint.name)
        if not _is_state(state) or (named and state["global_step"] != checkpoint_step(checkpoint)):
            return f"{TRAINER_FILE} is not the Trainer's"
        if not all(isinstance(fit.get(name), dict) for name in ("fit", "averages")):
            return f"{FIT_FILE} is not pyrolora's"
        read_state(checkpoint / STATE_FILE)
        generators = sorted(p.name for p in checkpoint.glob("rng_state*.pth"))
        scaler = [p.name for p in checkpoint.glob("scaler.pt")]  # written under float16 alone
        for name in (*PICKLES, *(generators or ["rng_state.pth"]), *scaler):
            read_tensors(checkpoint / name)
        best = checkpoint.parent / str(fit.get("best"))
        if best.is_dir() and _NAME.fullmatch(best.name):  # one that a better one replaced is gone
            check_seal(best, (STATE_FILE,))
    except CheckpointError as error:
        return str(error)
    return None


def check_room(joint: JointModel, folder: str | Path) -> None:
    """Raise `ConfigError` if the disk has less room than a checkpoint needs.

    It holds the posterior, and of each trained number the optimiser's two averages at most.
    """
    own = sum(tensor.nbytes for _, tensor in joint.own_tensors())
    needed = own + 2 * sum(p.nbytes for p in joint.parameters() if p.requires_grad)
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < needed:
        raise ConfigError(
            f"output_dir={str(folder)!r} has {usage.free:,} bytes left, and each checkpoint needs "
            f"{needed:,}; make room, choose another folder, or save none (save_strategy='no')"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file of JSON, or raise `CheckpointError`."""
    try:
        content = json.loads(_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"cannot read {path}: it holds no object")
    return content


def read_tensors(path: Path) -> Any:
    """Return the tensors, numbers and containers that `torch.save` wrote.

    Anything else in the file raises `CheckpointError`.
    """
    try:
        with safe_globals():  # allows NumPy's arrays, the state of its generator
            return torch.load(_file(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle can raise any
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"cannot read {path}: {reason}") from error


def read_state(path: Path) -> Mapping[str, Tensor]:
    """Return the tensors of a safetensors file, or raise `CheckpointError`."""
    try:
        return load_file(_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the saved tensors {path}: {error}") from error


def save_state(joint: JointModel, path: Path, notes: dict[str, str] | None = None) -> None:
    """Write a posterior's own tensors as safetensors, with notes in the header."""
    save_file(joint.own_state(), path, notes)


def _file(path: Path) -> Path:
    """Return the path of a plain file: reading a pipe or a device would never end."""
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    return path


def _is_state(state: Mapping[str, Any]) -> bool:
    """Return whether the Trainer can take the state: every entry that it reads has its type."""
    kinds: dict[str, Any] = {
        "global_step": int,
        "log_history": list,
        "stateful_callbacks": dict,
        "train_batch_size": int,
        "epoch": (int, float, type(None)),
        "best_metric": (int, float, type(None)),
        "best_global_step": (int, type(None)),
        "best_model_checkpoint": (str, type(None)),
        "num_input_tokens_seen": int,
        "total_flos": (int, float),
    }
    from transformers import TrainerState

    names = {field.name for field in dataclasses.fields(TrainerState)}
    return (
        set(state) <= names
        and all(isinstance(state.get(name), kind) for name, kind in kinds.items())
        and state["global_step"] > 0
        and all(isinstance(entry, dict) for entry in state["log_history"])
    )
