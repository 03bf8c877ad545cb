"""The members of an ensemble: their seeds, their folders, and the states of those that are done."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import TrainingArguments

from pyrolora import defaults
from pyrolora.errors import CheckpointError, ConfigError
from pyrolora.files import remove_scratch, replacing, writing
from pyrolora.inference.checkpoints import (
    AUTO,
    MEMBER,
    STATE_FILE,
    checkpoints,
    last_checkpoint,
    member_folders,
    read_state,
    save_state,
)
from pyrolora.inference.identity import check_same_fit
from pyrolora.inference.sealing import check_seal, is_sealed, seal, unseal
from pyrolora.model import JointModel


def member_arguments(args: TrainingArguments, number: int) -> TrainingArguments:
    """Return the Trainer's arguments of one member: its seed and its folder for checkpoints."""
    member = copy.copy(args)
    member.seed = (args.seed + number) % (defaults.MAX_SEED + 1)
    if args.data_seed is not None:
        member.data_seed = (args.data_seed + number) % (defaults.MAX_SEED + 1)
    member.output_dir = str(Path(args.output_dir) / f"{MEMBER}{number}")
    if args.resume_from_checkpoint:
        member.resume_from_checkpoint = _checkpoint(member)
    return member


def finished_state(
    args: TrainingArguments, identity: Mapping[str, Any]
) -> tuple[Mapping[str, Tensor], list[dict[str, Any]]] | None:
    """Return the state and the log of a member that is done; None if it is not, or is damaged.

    Raises
    ------
    ConfigError
        When it is one of another fit.
    """
    folder = Path(args.output_dir)
    if not is_sealed(folder):
        return None
    try:
        check_seal(folder, (STATE_FILE,))
        saved, state = _notes(folder / STATE_FILE), read_state(folder / STATE_FILE)
    except CheckpointError as error:
        warnings.warn(f"{folder} is not whole, and the member is made again: {error}", stacklevel=2)
        return None
    check_same_fit(saved["fit"], identity, folder)
    return state, saved["history"]


def save_finished(
    joint: JointModel,
    args: TrainingArguments,
    identity: Mapping[str, Any],
    history: list[dict[str, Any]],
) -> None:
    """Save the state and the log of a member that is done; a resumed fit then skips it."""
    folder = Path(args.output_dir)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        unseal(folder)
        remove_scratch(folder)
        with replacing(folder / STATE_FILE) as scratch:
            notes = {"fit": json.dumps(identity), "history": json.dumps(history)}
            save_state(joint, scratch, notes)
        seal(folder, [STATE_FILE])


def _notes(file: Path) -> dict[str, Any]:
    """Return the description of the fit, and the log, in the header of a member's state."""
    try:
        with safe_open(file, "pt") as stream:
            notes = stream.metadata() or {}
        saved = {name: json.loads(notes[name]) for name in ("fit", "history")}
    except (SafetensorError, LookupError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} does not say of which fit it is") from error
    entries = saved["history"]
    whole = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
    if not whole or not isinstance(saved["fit"], dict):
        raise CheckpointError(f"{file} does not say of which fit it is")
    return saved


def _checkpoint(args: TrainingArguments) -> str | None:
    """Return the newest whole checkpoint of a member, if it has written one."""
    asked = args.resume_from_checkpoint
    if asked not in (True, AUTO):
        raise ConfigError(
            f"resume_from_checkpoint={str(asked)!r} is one folder, and every member of an ensemble "
            "has its own; set it to True, and output_dir to that of the fit"
        )
    newest = last_checkpoint(args.output_dir)
    return None if newest is None else str(newest)


def forget_members(args: TrainingArguments) -> None:
    """Remove the states of an older ensemble, if the fit begins anew.

    A resumed fit would take them for its own.
    """
    if args.resume_from_checkpoint or not args.should_save:
        return
    for member in member_folders(args.output_dir):
        unseal(member)
        (member / STATE_FILE).unlink(missing_ok=True)
        for checkpoint in checkpoints(member):
            shutil.rmtree(checkpoint)
