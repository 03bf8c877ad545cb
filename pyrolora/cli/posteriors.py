"""The posterior in a run's folder, and data with the columns that it was fitted with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrolora.cli.files import LABELS, numbers_as_numbers, read_data, with_columns
from pyrolora.cli.runs import LAST_GOOD, Run, say
from pyrolora.errors import CheckpointError

if TYPE_CHECKING:
    from pyrolora.posterior import Posterior

SPLITS = ("test", "validation")  # in this order, of data that has several


def load(folder: Path, model: str | None) -> Posterior:
    """The posterior of a run, on the accelerator if there is one."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {str(folder)!r}; pass the folder of a fit")
    run = Run(folder)
    if run.record is not None and run.result is None:
        if (folder / LAST_GOOD).is_dir():
            raise CheckpointError(
                f"the fit in {folder} met numbers that are not finite; its last good state is the "
                f"run {folder / LAST_GOOD}"
            )
        raise CheckpointError(
            f"the fit in {folder} is not finished; go on with it in {run.record.get('directory')}: "
            f"{run.record.get('command')}"
        )
    say("loading the posterior")
    import torch

    from pyrolora.posterior import load as load_posterior

    posterior = load_posterior(folder, model)
    if torch.accelerator.is_available():
        posterior.model.to(torch.accelerator.current_accelerator())
    return posterior


def labelled(
    folder: Path, source: str, split: str | None, text: Sequence[str] | None, label: str | None
) -> Any:
    """Data with its target, in the columns that were given, or those of the fit."""
    columns = Run(folder).columns()
    return numbers_as_numbers(
        with_columns(
            read_data(source, split, SPLITS),
            text or columns.get("text", []),
            label or columns.get("label"),
            source,
        )
    )


def unlabelled(
    folder: Path, source: str, split: str | None, text: Sequence[str] | None
) -> tuple[Any, Any]:
    """Data as it is, and its inputs alone."""
    columns = Run(folder).columns()
    original = read_data(source, split, SPLITS)
    inputs = with_columns(original, text or columns.get("text", []), None, source)
    targets = {*LABELS, columns.get("label")}
    return original, inputs.remove_columns([n for n in inputs.column_names if n in targets])
