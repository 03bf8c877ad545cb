"""The task that a checkpoint and data call for, where nobody named one."""

from __future__ import annotations

import warnings

from pyrolora.data.columns import is_row_name
from pyrolora.data.labels import no_labels
from pyrolora.data.multi_hot import indicator_columns
from pyrolora.errors import ConfigError, DataError, listed
from pyrolora.tasks.base import Task
from pyrolora.tasks.checkpoint import Checkpoint
from pyrolora.tasks.registry import kinds
from pyrolora.tasks.unsupported import other_task


def implied(checkpoint: Checkpoint) -> type[Task]:
    """Return the one task that may be meant (`Task.implied`).

    Raises
    ------
    ConfigError
        Where several may be meant, with the call for each.
    ConfigError, DataError
        Where none reads the data.
    """
    if checkpoint.layout is None:
        _check_indicators(checkpoint)
    meant = [kind for kind in kinds() if kind.implied(checkpoint)]
    if len(meant) == 1:
        if checkpoint.layout is None:
            _warn_of_labels(checkpoint, meant[0])
        return meant[0]
    name = f"{checkpoint.name!r} is a {checkpoint.architecture or 'network without a class'}"
    if meant:
        calls = "; ".join(f"fit(..., {kind.call()}) for {kind.reads}" for kind in meant)
        raise ConfigError(
            f"{name}, and the data with the columns {sorted(checkpoint.row)} may be meant for "
            f"several tasks; say which: {calls} (on the command line --task, or --choices, with "
            "the value)"
        )
    if checkpoint.layout is None:
        raise DataError(
            f"{no_labels([*checkpoint.row])}. {name}{_purpose(checkpoint)}; texts without labels "
            "are learnt by a language model"
        )
    raise ConfigError(
        f"{name}{_purpose(checkpoint)}, and no task reads the data for it, whose columns are "
        f"{sorted(checkpoint.row)}; name the task, task=, or pass the network itself"
    )


def _purpose(checkpoint: Checkpoint) -> str:
    """Return the tasks that the class of a checkpoint is for, in words."""
    able = [kind.name for kind in kinds() if checkpoint.architecture in kind.classes]
    other = other_task(checkpoint.architecture)
    if other is not None and not able:
        return f", a network for {other}, which is not supported"
    return f", whose class is for {listed(able)}" if able else ""


def _warn_of_labels(checkpoint: Checkpoint, kind: type[Task]) -> None:
    """Warn of numbers beside texts that are learnt alone: one may be meant as the label."""
    numbers = [
        name
        for name, value in checkpoint.row.items()
        if isinstance(value, bool | int | float) and not is_row_name(name)
    ]
    if numbers:
        warnings.warn(
            f"the texts are learnt alone (task={kind.name!r}), without {numbers}; if one of them "
            f"is the label, data.rename_column({numbers[0]!r}, 'label') (--label on the command "
            "line)",
            stacklevel=2,
        )


def _check_indicators(checkpoint: Checkpoint) -> None:
    """Raise `DataError` for columns of 0 and 1 that may be labels, one per class."""
    found = indicator_columns(checkpoint.examples)
    if len(found) > 1:
        raise DataError(
            f"the data has no column 'labels', and its columns {found} hold 0 and 1: they may be "
            "the labels of each example, data.map(lambda row: {'labels': [name for name in "
            f"{found} if row[name]]}}, remove_columns={found}), or one of them its label, "
            f"data.rename_column({found[0]!r}, 'label'); drop those that are no label"
        )
