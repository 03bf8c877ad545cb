"""The Trainer's arguments from fit's shortcuts, and the checkpoint to go on from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from pyrolora import defaults
from pyrolora.errors import positive, whole_number

MEMBER = "member-"
_NAME = re.compile(r"checkpoint-\d+")


def training_arguments(
    output_dir: str | Path,
    *,
    epochs: float = defaults.EPOCHS,
    learning_rate: float = defaults.LEARNING_RATE,
    batch_size: int = defaults.BATCH_SIZE,
    seed: int = defaults.SEED,
    save: bool = True,
    **more: Any,
) -> TrainingArguments:
    """``TrainingArguments`` with pyrolora's defaults.

    Parameters
    ----------
    output_dir
        Where checkpoints go.
    epochs, learning_rate, batch_size, seed
        As in `pyrolora.fit`.
    save
        Write a checkpoint ten times a run, and keep the last two.
    more
        Arguments of ``TrainingArguments``, which replace those made here.

    Raises
    ------
    ConfigError
        For values outside their range.
    """
    positive("epochs", epochs)
    positive("learning_rate", learning_rate)
    whole_number("batch_size", batch_size, at_least=1)
    whole_number("seed", seed, at_least=0, at_most=defaults.MAX_SEED)
    whole_number(
        "gradient_accumulation_steps", more.get("gradient_accumulation_steps", 1), at_least=1
    )
    options: dict[str, Any] = {
        "num_train_epochs": float(epochs),
        "learning_rate": float(learning_rate),
        "per_device_train_batch_size": int(batch_size),
        "per_device_eval_batch_size": int(batch_size),
        "seed": int(seed),
        "save_strategy": "steps" if save else "no",
        "save_steps": 0.1,
        "save_total_limit": 2,
        "logging_steps": 0.05,
        "report_to": "none",
        "disable_tqdm": False,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "ddp_find_unused_parameters": False,  # every trained tensor is used in every step
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }
    return TrainingArguments(output_dir=str(output_dir), **{**options, **more})


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint: the Trainer writes ``trainer_state.json`` last of its files."""
    return max(filter(_is_whole, checkpoints(folder)), key=checkpoint_step, default=None)


def member_folders(folder: str | Path) -> list[Path]:
    """The folders in which the members of an ensemble keep their checkpoints."""
    found = Path(folder).glob(f"{MEMBER}*")
    return sorted(p for p in found if p.is_dir() and p.name.removeprefix(MEMBER).isdigit())


def checkpoints(folder: str | Path) -> list[Path]:
    """The folders of the Trainer's checkpoints, whole or not."""
    found = Path(folder).glob("checkpoint-*")
    return [path for path in found if path.is_dir() and _NAME.fullmatch(path.name)]


def checkpoint_step(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _is_whole(path: Path) -> bool:
    try:
        json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
