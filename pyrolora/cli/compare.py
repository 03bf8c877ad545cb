"""``pyrolora compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyrolora import defaults
from pyrolora.cli import posteriors
from pyrolora.cli.output import metrics_table, print_json
from pyrolora.cli.readers import KINDS
from pyrolora.errors import ConfigError


def compare(
    data: Annotated[str, typer.Argument(help=f"Labelled data: a file ({KINDS}), folder or name.")],
    runs: Annotated[list[Path], typer.Argument(help="The folders of the fits.")],
    outside: posteriors.Outside = None,
    num_samples: posteriors.NumSamples = None,
    draws: posteriors.Draws = None,
    batch_size: posteriors.BatchSize = defaults.BATCH_SIZE,
    seed: posteriors.DrawSeed = None,
    text: posteriors.Text = None,
    label: posteriors.Label = None,
    split: posteriors.Split = None,
    model: posteriors.Model = None,
    json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Score several posteriors on the same labelled data, side by side.

    \b
    pyrolora compare test.jsonl run-map run-montec
    pyrolora compare test.jsonl run-* --outside other.jsonl --json

    Prints the metrics of 'pyrolora evaluate', and how much the mean negative
    log-likelihood exceeds the lowest one, with the standard error of this difference.
    """
    drawn = posteriors.drawn(draws, num_samples, seed)
    names = [str(run) for run in runs]
    if len(set(names)) < len(names):
        raise ConfigError(f"a folder is named twice: {', '.join(names)}; name each once")
    short = [run.resolve().name for run in runs]
    if len(set(short)) == len(short):
        names = short
    examples = posteriors.labelled(runs[0], data, split, text, label)
    other = posteriors.outside(runs[0], outside, text)
    from pyrolora.comparing import compare as compared

    table = compared(
        {name: posteriors.load(run, model) for name, run in zip(names, runs, strict=True)},
        examples,
        outside=other,
        batch_size=batch_size,
        **drawn,
    )
    columns = {str(name): row for name, row in table.to_dict(orient="index").items()}
    if json:
        print_json({"data": data, "posteriors": columns})
    else:
        metrics_table(columns)
