"""``pyrolora report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pyrolora import defaults
from pyrolora.cli import posteriors
from pyrolora.cli.columns import as_told, with_columns
from pyrolora.cli.output import print_json, say, tell
from pyrolora.cli.readers import KINDS
from pyrolora.cli.reading import read_data
from pyrolora.cli.runs import Run


def report(
    run: posteriors.Folder,
    data: Annotated[str, typer.Argument(help=f"Data: a file ({KINDS}), folder or name.")],
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    outside: posteriors.Outside = None,
    num_samples: posteriors.NumSamples = None,
    draws: posteriors.Draws = None,
    batch_size: posteriors.BatchSize = defaults.BATCH_SIZE,
    seed: posteriors.DrawSeed = None,
    text: posteriors.Text = None,
    label: posteriors.Label = None,
    split: posteriors.Split = None,
    model: posteriors.Model = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the path and the warnings as JSON.")
    ] = False,
) -> None:
    """Write a page about a posterior: warnings, metrics, pictures, examples, settings.

    \b
    pyrolora report run test.jsonl --output report.html
    pyrolora report run test.jsonl --outside other.jsonl --json | jq .warnings

    The page is one HTML file that needs no network. Warnings are about confidence,
    about a posterior that equals its prior, and about a fit that did not converge.
    Labels are not needed; without them there are no metrics.
    """
    from pyrolora.report import page_file, report_on

    drawn = posteriors.drawn(draws, num_samples, seed)
    file = page_file(output)
    examples = _examples(run, data, split, text, label)
    other = posteriors.outside(run, outside, text)
    page = report_on(
        posteriors.load(run, model),
        examples,
        outside=other,
        batch_size=batch_size,
        **drawn,
    )
    page.write(file)
    if json:
        warnings = [
            {"name": one.name, "title": one.title, "found": one.found, "advice": one.advice}
            for one in page.findings
        ]
        print_json({"run": str(run), "path": str(file), "warnings": warnings})
        return
    for one in page.findings:
        tell(f"{one.title}. {one.found}")
    say(f"the report is in {file}")


def _examples(
    run: Path, source: str, split: str | None, text: list[str] | None, label: str | None
) -> Any:
    """Read data with their target, if they have the column of the command or of the fit."""
    columns = Run(run).columns()
    original = read_data(source, split, defaults.SCORE_SPLITS)
    known = {*original.column_names, *original.flatten().column_names}
    if label is None and columns.get("label") in known:
        label = columns["label"]
    chosen = with_columns(original, text or columns.get("text", []), label, source)
    return as_told(chosen, source, Run(run).classes())
