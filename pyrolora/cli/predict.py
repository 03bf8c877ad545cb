"""``pyrolora predict``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyrolora import defaults
from pyrolora.cli import posteriors
from pyrolora.cli.output import say
from pyrolora.cli.readers import KINDS
from pyrolora.cli.tables import print_table, writer
from pyrolora.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pandas as pd

    from pyrolora.predictive import Prediction


def predict(
    run: posteriors.Folder,
    data: Annotated[str, typer.Argument(help=f"Data: a file ({KINDS}), folder or name.")],
    output: Annotated[
        Path | None,
        typer.Option(help="A .csv, .tsv, .jsonl or .parquet file; otherwise CSV is printed."),
    ] = None,
    num_samples: posteriors.NumSamples = None,
    draws: posteriors.Draws = None,
    batch_size: posteriors.BatchSize = defaults.BATCH_SIZE,
    seed: posteriors.DrawSeed = None,
    text: posteriors.Text = None,
    split: posteriors.Split = None,
    model: posteriors.Model = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per row.")] = False,
) -> None:
    """Predict with uncertainty: the columns of the data, and those of the prediction beside them.

    \b
    pyrolora predict run new.jsonl --output predictions.csv
    pyrolora predict run new.jsonl --draws 0,1,2
    pyrolora predict run new.jsonl --json | jq 'select(.epistemic > 0.1)'

    entropy is the total uncertainty in nats; aleatoric is the part in the data,
    epistemic the part that the draws disagree on. Rows keep their order; labels are
    not needed. In CSV and TSV an apostrophe stands before texts that a spreadsheet
    would run as a formula; .jsonl and .parquet hold every text as it was.
    """
    if json and output is not None:
        raise ConfigError(
            f"--json prints the rows that --output writes to {output}; give one of them (a .jsonl "
            "file has the same rows)"
        )
    taken = posteriors.drawn(draws, num_samples, seed)
    write = None if output is None else writer(output)
    original, examples = posteriors.unlabelled(run, data, split, text, scored=True)
    posterior = posteriors.load(run, model)
    prediction = posterior.predict(examples, batch_size=batch_size, **taken)
    table = _beside(original, prediction, data)
    if write is not None:
        write(table)
        say(f"{len(table)} predictions are in {output}")
    elif json:
        table.to_json(sys.stdout, orient="records", lines=True, date_format="iso")
    else:
        print_table(table)


def _beside(original: Any, prediction: Prediction, source: str) -> pd.DataFrame:
    """Return the columns of the data, with every value as it was read, and of the prediction."""
    import pandas as pd

    table = pd.DataFrame(original.with_format(None).to_list(), dtype=object)
    made = prediction.to_pandas()
    clash = [name for name in made if name in table]
    if clash:
        raise DataError(f"{source} has columns that a prediction has too, {clash}; rename them")
    return table.loc[prediction.examples.numpy()].reset_index(drop=True).join(made)
