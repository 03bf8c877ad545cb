"""The members of an ensemble: their seeds, their folders, and the states of those that are done."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import TrainingArguments

from pyrolora import defaults
from pyrolora.errors import CheckpointError, ConfigError
from pyrolora.inference.checkpoints import (
    MEMBER,
    STATE_FILE,
    checkpoints,
    last_checkpoint,
    member_folders,
    read_state,
    save_state,
)
from pyrolora.inference.identity import check_same_fit
from pyrolora.model import JointModel


def member_arguments(args: TrainingArguments, number: int) -> TrainingArguments:
    """Return the Trainer's arguments of one member: its seed and its folder for checkpoints.

    The first member of an ensemble that begins anew removes the states of an older one.
    """
    member = copy.copy(args)
    member.seed = (args.seed + number) % (defaults.MAX_SEED + 1)
    if args.data_seed is not None:
        member.data_seed = (args.data_seed + number) % (defaults.MAX_SEED + 1)
    if number == 0 and args.should_save and not args.resume_from_checkpoint:
        _forget_members(args.output_dir)
    member.output_dir = str(Path(args.output_dir) / f"{MEMBER}{number}")
    if args.resume_from_checkpoint:
        member.resume_from_checkpoint = _checkpoint(member)
    return member


def finished_state(args: TrainingArguments, identity: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Return the state of a member that is done, if it is one of this fit."""
    file = Path(args.output_dir) / STATE_FILE
    state = read_state(file)
    with safe_open(file, "pt") as stream:
        notes = (stream.metadata() or {}).get("fit", "null")
    try:
        saved = json.loads(notes)
    except (ValueError, RecursionError):
        saved = None
    if not isinstance(saved, dict):
        raise CheckpointError(f"{file} does not say of which fit it is; begin anew")
    check_same_fit(saved, identity, file.parent)
    return state


def save_finished(joint: JointModel, args: TrainingArguments, identity: Mapping[str, Any]) -> None:
    """Save the state of a member that is done; a resumed fit then skips it."""
    file = Path(args.output_dir) / STATE_FILE
    scratch = file.with_suffix(".part")
    save_state(joint, scratch, {"fit": json.dumps(identity)})
    scratch.replace(file)


def _checkpoint(args: TrainingArguments) -> str | None:
    """Return the newest whole checkpoint of a member, if it has written one."""
    asked = args.resume_from_checkpoint
    if asked is not True:
        raise ConfigError(
            f"resume_from_checkpoint={str(asked)!r} is one folder, and every member of an ensemble "
            "has its own; set it to True, and output_dir to that of the fit"
        )
    newest = last_checkpoint(args.output_dir)
    return None if newest is None else str(newest)


def _forget_members(folder: str) -> None:
    """Remove the states of an older ensemble; a resumed fit would take them for its own."""
    for member in member_folders(folder):
        (member / STATE_FILE).unlink(missing_ok=True)
        for checkpoint in checkpoints(member):
            shutil.rmtree(checkpoint)
