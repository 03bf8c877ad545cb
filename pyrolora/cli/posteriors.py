"""The posterior in a run's folder, and data with the columns that it was fitted with."""

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
BatchSize = Annotated[int, typer.Option(help="Examples a batch.")]
Seed = Annotated[int, typer.Option(min=0, max=defaults.MAX_SEED, help="Of the draws.")]
Draws = Annotated[
    str | None,
    typer.Option(
        help="Numbers of draws, such as 0,1,2, in place of --num-samples: the functions that "
        "'export --draw' writes."
    ),
]
DrawSeed = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=defaults.MAX_SEED,
        help=f"Of draws without numbers; otherwise {defaults.SEED}.",
    ),
]
Text = Annotated[list[str] | None, typer.Option(help="The text's column; otherwise as in the fit.")]
Label = Annotated[str | None, typer.Option(help="The target's column; otherwise as in the fit.")]
Outside = Annotated[
    str | None,
    typer.Option(help="Data of another distribution, labels not needed: adds ood auroc."),
]
Split = Annotated[str | None, typer.Option(help="Which split of the data.")]
Model = Annotated[str | None, typer.Option(help="The base network, if it has moved since the fit.")]


def draw_numbers(draws: str | None, **beside: object) -> list[int] | None:
    """What ``--draws`` says, without it None; the options ``beside`` it may not be given, too."""
    if draws is None:
        return None
    given = [f"--{name.replace('_', '-')}" for name, value in beside.items() if value is not None]
    if given:
        raise ConfigError(
            f"--draws names the draws, and {' and '.join(given)} would take others; give one of "
            "them"
        )
    parts = [part.strip() for part in draws.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise ConfigError(
            f"--draws takes numbers from 0 with commas between them, such as 0,1,2, got {draws!r}"
        )
    return [int(part) for part in parts]


def drawn(draws: str | None, num_samples: int | None, seed: int | None) -> dict[str, Any]:
    """Which draws a command takes, as options of `Posterior.predict` and its like."""
    numbers = draw_numbers(draws, num_samples=num_samples, seed=seed)
    if numbers is not None:
        return {"draws": numbers}
    return {"num_samples": num_samples, "seed": defaults.SEED if seed is None else seed}


def load(folder: Path, model: str | None) -> Posterior:
    """The posterior of a run, on the accelerator if there is one."""
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
    """Data with its target, in the columns that were given, or those of the fit."""
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
    """The inputs of data of another distribution, if there is any."""
    if source is None:
        return None
    return unlabelled(folder, source, None, text, defaults.OUTSIDE_SPLITS)[1]


def unlabelled(
    folder: Path,
    source: str,
    split: str | None,
    text: Sequence[str] | None,
    splits: Sequence[str] = defaults.SCORE_SPLITS,
) -> tuple[Any, Any]:
    """Data as it is, and its inputs alone."""
    chosen = Run(folder).columns()
    original = read_data(source, split, splits)
    inputs = columns.with_columns(original, text or chosen.get("text", []), None, source)
    targets = {*columns.LABELS, chosen.get("label")}
    return original, inputs.remove_columns([n for n in inputs.column_names if n in targets])
