"""The checkpoints of a fit: which are whole, and of which fit they are."""

from __future__ import annotations

import dataclasses
import json
import re
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
from pyrolora.model import JointModel

STATE_FILE = "adapters.safetensors"
FIT_FILE = "fit.json"
TRAINER_FILE = "trainer_state.json"
PICKLES = ("optimizer.pt", "scheduler.pt")
MEMBER = "member-"

_NAME = re.compile(r"checkpoint-\d+")


def checkpoints(folder: str | Path) -> list[Path]:
    """The folders of the Trainer's checkpoints, whole or not."""
    found = Path(folder).glob("checkpoint-*")
    return [path for path in found if path.is_dir() and _NAME.fullmatch(path.name)]


def checkpoint_step(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def member_folders(folder: str | Path) -> list[Path]:
    """The folders in which the members of an ensemble keep their checkpoints."""
    found = Path(folder).glob(f"{MEMBER}*")
    return sorted(p for p in found if p.is_dir() and p.name.removeprefix(MEMBER).isdigit())


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint, with a warning that names a newer one which is not."""
    return _warned(*newest_whole(folder))


def newest_whole(folder: str | Path) -> tuple[Path | None, str | None]:
    """The newest whole checkpoint, and what there is to say of a newer one which is not."""
    return _first_whole(sorted(checkpoints(folder), key=checkpoint_step, reverse=True))


def checkpoint_to_resume(asked: str | Path | bool, folder: str | Path) -> Path:
    """The checkpoint that was asked for: a folder, or True for the newest one of ``folder``. In the
    place of one that is not whole comes the next older one beside it, with a warning.

    Raises
    ------
    ConfigError
        When there is none.
    CheckpointError
        When there is none that is whole.
    """
    if isinstance(asked, bool):
        found = checkpoints(folder)
        if not found:
            raise ConfigError(
                f"resume_from_checkpoint=True, and there is no checkpoint in {folder}; leave it "
                "out to begin anew, or set output_dir to the folder of the fit"
            )
    else:
        path = Path(asked)
        if not path.is_dir():
            raise ConfigError(f"resume_from_checkpoint={str(asked)!r} is no folder")
        inside = sorted(checkpoints(path), key=checkpoint_step)
        if inside and not (path / TRAINER_FILE).exists():
            raise ConfigError(
                f"resume_from_checkpoint={str(asked)!r} is no checkpoint, and holds some: pass "
                f"{str(inside[-1])!r}"
            )
        found = [path]
        if _NAME.fullmatch(path.name):
            step = checkpoint_step(path)
            found += [c for c in checkpoints(path.parent) if checkpoint_step(c) < step]
    if len(found) > 1:
        found.sort(key=checkpoint_step, reverse=True)
    whole = _warned(*_first_whole(found))
    if whole is None:
        raise CheckpointError(
            f"there is no whole checkpoint to go on from: {found[0]}: {damage(found[0])}; begin "
            "anew, without resume_from_checkpoint"
        )
    return whole


def _first_whole(newest_first: list[Path]) -> tuple[Path | None, str | None]:
    for checkpoint in newest_first:
        if damage(checkpoint) is None:
            passed = newest_first[0]
            if passed == checkpoint:
                return checkpoint, None
            reason = damage(passed)
            return checkpoint, f"going on from {checkpoint}, since {passed} is not whole: {reason}"
    return None, None


def _warned(checkpoint: Path | None, note: str | None) -> Path | None:
    if note is not None:
        warnings.warn(note, stacklevel=3)
    return checkpoint


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole, or None: every part of it is there and can be read. They are
    data, and what else a pickle may hold is not run."""
    try:
        state, fit = read_json(checkpoint / TRAINER_FILE), read_json(checkpoint / FIT_FILE)
        named = _NAME.fullmatch(checkpoint.name)
        if not _is_state(state) or (named and state["global_step"] != checkpoint_step(checkpoint)):
            return f"{TRAINER_FILE} is not the Trainer's"
        if not all(isinstance(fit.get(name), dict) for name in ("fit", "averages")):
            return f"{FIT_FILE} is not pyrolora's"
        read_state(checkpoint / STATE_FILE)
        generators = sorted(p.name for p in checkpoint.glob("rng_state*.pth"))
        scaler = [p.name for p in checkpoint.glob("scaler.pt")]  # under float16 alone
        for name in (*PICKLES, *(generators or ["rng_state.pth"]), *scaler):
            read_tensors(checkpoint / name)
    except CheckpointError as error:
        return str(error)
    return None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON, or a `CheckpointError`."""
    try:
        found = json.loads(_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"cannot read {path}: it holds no object")
    return found


def read_tensors(path: Path) -> Any:
    """What `torch.save` wrote, tensors, numbers and their containers alone; or a
    `CheckpointError`."""
    try:
        with safe_globals():  # NumPy's arrays, in which its generator keeps its state
            return torch.load(_file(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of a pickle that is damaged, any
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"cannot read {path}: {reason}") from error


def read_state(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a safetensors file, or a `CheckpointError`."""
    try:
        return load_file(_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the saved tensors {path}: {error}") from error


def save_state(joint: JointModel, path: Path, notes: dict[str, str] | None = None) -> None:
    """Write a posterior's own tensors as safetensors, with notes in their header."""
    save_file(joint.own_state(), path, notes)


def _file(path: Path) -> Path:
    """A plain file: of a pipe or a device the end is never reached."""
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    return path


def _is_state(state: Mapping[str, Any]) -> bool:
    """Whether the Trainer can take it: of what it reads, each has its type."""
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
