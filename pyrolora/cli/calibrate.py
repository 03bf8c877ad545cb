"""``pyrolora calibrate``."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from pyrolora import defaults
from pyrolora.cli import posteriors
from pyrolora.cli.fingerprint import fingerprint
from pyrolora.cli.output import print_json, say, tell
from pyrolora.cli.readers import KINDS
from pyrolora.cli.runs import Run


def calibrate(
    run: posteriors.Folder,
    data: Annotated[
        str, typer.Argument(help=f"Labelled data, held out: a file ({KINDS}), folder or name.")
    ],
    num_samples: posteriors.NumSamples = None,
    draws: posteriors.Draws = None,
    batch_size: posteriors.BatchSize = defaults.BATCH_SIZE,
    seed: posteriors.DrawSeed = None,
    text: posteriors.Text = None,
    label: posteriors.Label = None,
    split: posteriors.Split = None,
    model: posteriors.Model = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Set the temperature of a posterior's predictions to the best one on held-out data.

    \b
    pyrolora calibrate run held_out.jsonl

    The temperature with the lowest negative log-likelihood is stored in the run's
    folder, and predict, evaluate, compare, generate and report use it from then on, in
    the place of the one that the fit chose by the examples that it held back.
    Data that the fit has seen are of no use here. Data that chose a temperature score
    too well later: keep others for evaluation. A second call starts anew.
    """
    drawn = posteriors.drawn(draws, num_samples, seed)
    examples = posteriors.labelled(run, data, split, text, label, defaults.FIT_SPLITS)
    digest = (Run(run).record or {}).get("options", {}).get("data_digest")
    if digest == fingerprint(data, examples):
        say(
            "note: the fit was trained on these data and is too sure of them, so that this "
            "temperature is too low; calibrate on others"
        )
    with Run(run).locked():
        posterior = posteriors.load(run, model)
        calibration = posterior.calibrate(examples, batch_size=batch_size, **drawn)
        posterior.save(run)
    if json:
        print_json({"run": str(run), **dataclasses.asdict(calibration)})
        return
    tell(
        f"Temperature {calibration.temperature:.4g}, from {calibration.num_examples} examples: "
        f"NLL {calibration.nll_before:.4f} before, {calibration.nll_after:.4f} after."
    )
