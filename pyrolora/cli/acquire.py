"""``pyrolora acquire``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pyrolora import defaults
from pyrolora.cli import posteriors
from pyrolora.cli.output import say
from pyrolora.cli.readers import KINDS
from pyrolora.errors import ConfigError
from pyrolora.files import write_whole


def acquire(
    run: posteriors.Folder,
    pool: Annotated[str, typer.Argument(help=f"The pool: a file ({KINDS}), folder or name.")],
    count: Annotated[int, typer.Option("--count", "-k", min=1, help="How many examples.")],
    by: Annotated[
        str, typer.Option(help="The criterion: epistemic, entropy or batchbald.")
    ] = "epistemic",
    output: Annotated[
        Path | None, typer.Option(help="A .jsonl file; otherwise the lines are printed.")
    ] = None,
    num_samples: posteriors.NumSamples = None,
    draws: posteriors.Draws = None,
    batch_size: posteriors.BatchSize = defaults.BATCH_SIZE,
    seed: posteriors.DrawSeed = None,
    text: posteriors.Text = None,
    split: posteriors.Split = None,
    model: posteriors.Model = None,
) -> None:
    """Choose the examples of a pool to label next, those that tell the posterior most.

    \b
    pyrolora acquire run pool.jsonl --count 20 --output to_label.jsonl
    pyrolora acquire run pool.jsonl --count 20 --by batchbald --num-samples 100

    Writes one line of JSON per example, the best first: the columns of the data, and "row", its
    number in the pool. By the highest mutual information of label and draw (epistemic), the
    highest entropy, or the batch whose labels tell most together (batchbald; one class per
    example). Labels in the pool are not read.
    """
    drawn = posteriors.drawn(draws, num_samples, seed)
    if output is not None and output.suffix.lower() != ".jsonl":
        raise ConfigError(f"the output is JSON lines; name it .jsonl, got {output}")
    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"there is no folder {output.parent} to write {output.name} to")
    original, inputs = posteriors.unlabelled(run, pool, split, text, defaults.OUTSIDE_SPLITS)
    posterior = posteriors.load(run, model)
    criterion: Any = by  # checked there
    chosen = posterior.acquire(inputs, count, criterion, batch_size=batch_size, **drawn)
    lines = [json.dumps({"row": row, **original[row]}, default=str) for row in chosen]
    if output is None:
        sys.stdout.writelines(f"{line}\n" for line in lines)
    else:
        write_whole(output, "".join(f"{line}\n" for line in lines).encode())
        say(f"the {len(lines)} examples to label are in {output}")
