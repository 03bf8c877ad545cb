"""The posterior of a run's folder, and data in the columns of its fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyrolora import defaults
from pyrolora.cli import columns
from pyrolora.cli.output import say
from pyrolora.cli.reading import read_data
from pyrolora.cli.runs import LAST_GOOD, Run
from pyrolora.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from pyrolora.posterior import Posterior

# The options that commands on a fitted posterior share.
Folder = Annotated[Path, typer.Argument(help="The folder of a fit.")]
NumSamples = Annotated[
    int | None,
    typer.Option(
        help="Draws of the posterior; 0: the mean adapter alone; otherwise 32, or every member "
        "of an ensemble."
    ),
]
BatchSize = Annotated[int, typer.Option(help="Examples per batch.")]
Seed = Annotated[int, typer.Option(min=0, max=defaults.MAX_SEED, help="Seed of the draws.")]
Draws = Annotated[
    str | None,
    typer.Option(
        help="Numbers of draws, such as 0,1,2, instead of --num-samples: the functions that "
        "'export --draw' writes."
    ),
]
DrawSeed = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=defaults.MAX_SEED,
        help=f"Seed of draws without numbers; otherwise {defaults.SEED}.",
    ),
]
Text = Annotated[
    list[str] | None, typer.Option(help="The column with the text; otherwise that of the fit.")
]
Label = Annotated[
    str | None, typer.Option(help="The column with the target; otherwise that of the fit.")
]
Outside = Annotated[
    str | None,
    typer.Option(help="Data of another distribution, labels not needed: adds ood_auroc."),
]
Split = Annotated[str | None, typer.Option(help="The split of the data.")]
Model = Annotated[str | None, typer.Option(help="The network, if it has moved since the fit.")]


def draw_numbers(draws: str | None, **beside: object) -> list[int] | None:
    """Return the numbers in ``--draws``; refuse it together with an option ``beside`` it."""
    if draws is None:
        return None
    others = [f"--{name.replace('_', '-')}" for name, value in beside.items() if value is not None]
    if others:
        raise ConfigError(
            f"--draws names the draws, and {' and '.join(others)} would take others; give one of "
            "them"
        )
    parts = [part.strip() for part in draws.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise ConfigError(
            f"--draws takes numbers from 0 with commas between them, such as 0,1,2, got {draws!r}"
        )
    return [int(part) for part in parts]


def drawn(draws: str | None, num_samples: int | None, seed: int | None) -> dict[str, Any]:
    """Return the draws of a command as options of `Posterior.predict` and its like."""
    numbers = draw_numbers(draws, num_samples=num_samples, seed=seed)
    if numbers is not None:
        return {"draws": numbers}
    return {"num_samples": num_samples, "seed": defaults.SEED if seed is None else seed}


def load(folder: Path, model: str | None) -> Posterior:
    """Load the posterior of a run, onto the accelerator if there is one."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {str(folder)!r}; pass the folder of a fit")
    record = Run(folder).record
    if record is not None and "result" not in record:
        if (folder / LAST_GOOD).is_dir():
            raise CheckpointError(
                f"the fit in {folder} met numbers that are not finite; its last good state is the "
                f"run {folder / LAST_GOOD}"
            )
        raise CheckpointError(
            f"the fit in {folder} is not finished; go on with it in {record.get('directory')}: "
            f"{record.get('command')}"
        )
    say("loading the posterior")
    import torch

    from pyrolora.loading import load as load_posterior

    posterior = load_posterior(folder, model)
    if torch.accelerator.is_available():
        posterior.model.to(torch.accelerator.current_accelerator())
    return posterior


def labelled(
    folder: Path,
    source: str,
    split: str | None,
    text: Sequence[str] | None,
    label: str | None,
    splits: Sequence[str] = defaults.SCORE_SPLITS,
) -> Any:
    """Read data with their target, in the columns of the command or of the fit."""
    run = Run(folder)
    chosen = run.columns()
    return columns.labelled(
        source,
        split,
        splits,
        text or chosen.get("text", []),
        label or chosen.get("label"),
        run.classes(),
    )


def outside(folder: Path, source: str | None, text: Sequence[str] | None) -> Any:
    """Read the inputs of data of another distribution, if there are any."""
    if source is None:
        return None
    return unlabelled(folder, source, None, text, defaults.OUTSIDE_SPLITS, scored=True)[1]


def unlabelled(
    folder: Path,
    source: str,
    split: str | None,
    text: Sequence[str] | None,
    splits: Sequence[str] = defaults.SCORE_SPLITS,
    *,
    scored: bool = False,
) -> tuple[Any, Any]:
    """Read data as they are, and their inputs alone; ``scored`` texts keep their labels."""
    run = Run(folder)
    chosen = run.columns()
    original = read_data(source, split, splits)
    kept = scored and run.keeps_labels()
    label = chosen.get("label") if kept else None
    inputs = columns.with_columns(original, text or chosen.get("text", []), label, source)
    if kept:
        return original, inputs
    targets = {*columns.LABELS, chosen.get("label")}
    return original, inputs.remove_columns([n for n in inputs.column_names if n in targets])
