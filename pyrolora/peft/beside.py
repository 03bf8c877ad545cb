"""The mean of a posterior as an adapter of PEFT's, in a folder of its own beside the posterior."""

from __future__ import annotations

from pathlib import Path

from pyrolora.guides import Guide, full_name
from pyrolora.model import JointModel
from pyrolora.peft.config import CONFIG_FILE, WEIGHTS_FILE
from pyrolora.peft.export import export_factors
from pyrolora.storage import MEAN_FOLDER


def write_mean(folder: Path, joint: JointModel) -> None:
    """Write the mean adapter to ``folder/peft``, for readers who have PEFT alone.

    Raises
    ------
    ConfigError
        Where PEFT cannot express it, with the reason.
    """
    export_factors(folder / MEAN_FOLDER, joint, joint.program.mean(), uniform=False)


def remove_mean(folder: Path) -> None:
    """Remove an older mean, whose posterior is about to be replaced; other files there stay."""
    mean = folder / MEAN_FOLDER
    if mean.is_symlink() or not mean.is_dir():
        return
    for name in (CONFIG_FILE, WEIGHTS_FILE):  # without the first it is no adapter any more
        (mean / name).unlink(missing_ok=True)
    if not any(mean.iterdir()):
        mean.rmdir()


def why_no_mean(joint: JointModel, guide: Guide) -> str | None:
    """Return why no adapter holds the mean, where that is known at once; else None."""
    if joint.program.bank.specs:
        return None
    return (
        f"{full_name(guide)!r} has no adapter; posterior.merge() returns the network itself, which "
        "can be saved"
    )
