"""``pyrolora evaluate``."""

from __future__ import annotations

from typing import Annotated

import typer

from pyrolora import defaults
from pyrolora.cli import posteriors
from pyrolora.cli.output import metrics_table, print_json
from pyrolora.cli.readers import KINDS


def evaluate(
    run: posteriors.Folder,
    data: Annotated[str, typer.Argument(help=f"Labelled data: a file ({KINDS}), folder or name.")],
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
    """Score the predictive mean of a posterior on labelled data.

    \b
    pyrolora evaluate run test.jsonl
    pyrolora evaluate run test.jsonl --num-samples 0 --json

    Classes, choices and preferences: accuracy, NLL (nats), ECE, Brier score, AUROC of
    the errors by entropy, area under the risk-coverage curve; tags: these per token,
    and F1 of entities; several labels: F1, exact match, average precision; answers in
    contexts: F1, exact match; regression: RMSE, NLL, CRPS, coverage of the 90 %
    interval; language models, also from text to text: NLL per token and perplexity,
    or, for data with a column 'choices', the metrics of classes.
    """
    drawn = posteriors.drawn(draws, num_samples, seed)
    examples = posteriors.labelled(run, data, split, text, label)
    other = posteriors.outside(run, outside, text)
    posterior = posteriors.load(run, model)
    which = {name: value for name, value in drawn.items() if name != "seed"}
    if "num_samples" in which and num_samples is None:
        which["num_samples"] = posterior.model.program.usual_draws()
    metrics = posterior.evaluate(examples, outside=other, batch_size=batch_size, **drawn | which)
    if json:
        print_json({"run": str(run), **which, **metrics})
    else:
        metrics_table({posterior.options.name: metrics})
