"""``pyrolora demo``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from pyrolora import defaults
from pyrolora.cli.output import metrics_table, print_json, program, say, tell
from pyrolora.errors import ConfigError
from pyrolora.files import replacing, write_whole

ABOUT = """\
Which of eight libraries does a sentence of documentation come from? {train} sentences to train on,
{test} of other files to test on, and {unseen} of libraries that were never seen.
map is plain LoRA, one answer; montec is MonteCLoRA with its defaults, {draws} draws of its
posterior. Same network, data, epochs and learning rate for both; of the sentences montec holds
{held_back:g} % back, to choose how wide the posterior is, and learns from the others."""
READING = {
    "accuracy": "higher is better",
    "nll": "nats; lower is better",
    "ece": "gap of confidence and accuracy; lower is better",
    "brier": "lower is better",
    "error_auroc": "does entropy find wrong answers? 0.5: chance",
    "aurc": "error rate if only the most certain are answered; lower is better",
    "ood_entropy": "AUROC: does entropy find unseen libraries?",
    "ood_mi": "AUROC: does mutual information find them?",
    "fit_seconds": "",
    "predict_seconds": "test and unseen sentences, all draws",
}


def demo(
    output_dir: Annotated[
        Path,
        typer.Option(help="The folder for the results; those of an earlier demo are replaced."),
    ] = Path("pyrolora-demo"),
    epochs: Annotated[
        float, typer.Option(help="Passes over the training sentences.")
    ] = defaults.DEMO_EPOCHS,
    learning_rate: Annotated[
        float, typer.Option(help="Learning rate of both fits.")
    ] = defaults.DEMO_LEARNING_RATE,
    num_samples: Annotated[
        int, typer.Option(min=0, help="Draws per prediction.")
    ] = defaults.DEMO_SAMPLES,
    train: Annotated[
        int, typer.Option(min=1, help="Training sentences per library.")
    ] = defaults.DEMO_TRAIN,
    test: Annotated[
        int, typer.Option(min=1, help="Test sentences per library.")
    ] = defaults.DEMO_TEST,
    seed: Annotated[
        int, typer.Option(min=0, max=defaults.MAX_SEED, help="Seed of both fits and of the draws.")
    ] = 0,
    model: Annotated[
        str | None, typer.Option(help="Another encoder; otherwise the embedded one.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Show what a posterior adds to LoRA, on a small model, without a network, in minutes.

    \b
    pyrolora demo --output-dir pyrolora-demo

    Fits plain LoRA (map) and MonteCLoRA (montec) to the same data with the same
    budget, prints their scores side by side, and writes the posteriors, a NetCDF
    file for ArviZ and a picture.
    """
    if output_dir.is_file():
        raise ConfigError(f"{output_dir} is a file; --output-dir needs a folder")
    output_dir.mkdir(parents=True, exist_ok=True)
    say("reading the documentation of installed libraries")
    from pyrolora.arviz import netcdf
    from pyrolora.demo import GUIDES, machine, picture, run_guide, sentences

    data = sentences(train=train, test=test, unseen=test)
    sizes = {split: len(rows) for split, rows in data.items()}
    say(ABOUT.format(draws=num_samples, held_back=100 * defaults.HOLD_BACK, **sizes))
    contestants = {
        guide: run_guide(
            guide,
            data,
            model=model,
            epochs=epochs,
            learning_rate=learning_rate,
            num_samples=num_samples,
            seed=seed,
        )
        for guide in GUIDES
    }
    for guide, one in contestants.items():
        one.posterior.save(output_dir / guide)
    draws = contestants["montec"].posterior.to_arviz(200, seed=seed)
    write_whole(output_dir / "posterior.nc", netcdf(draws))
    with replacing(output_dir / "picture.png") as scratch:
        picture(contestants, scratch)
    names = data["train"].features["label"].names
    for split in ("test", "unseen"):
        table = data[split].to_pandas()
        if "label" in table:
            table["label"] = table["label"].map(dict(enumerate(names)))
        with replacing(output_dir / f"{split}.jsonl") as scratch:
            table.to_json(scratch, orient="records", lines=True)
    scores = {guide: one.scores for guide, one in contestants.items()}
    if json:
        print_json({"output_dir": str(output_dir), "data": sizes, "scores": scores})
    else:
        metrics_table(scores, READING)
        tell(f"The times are those of this machine as it was: {machine()}.")
        _what_next(output_dir, num_samples, seed)


def _what_next(folder: Path, num_samples: int, seed: int) -> None:
    name = shlex.quote(str(folder))
    tell(f"""
In {folder}:
  picture.png    reliability, and entropy in and out of distribution
  map/ montec/   the posteriors; pyrolora.load reads them
  posterior.nc   draws of montec for ArviZ: az.summary(az.from_netcdf("{folder}/posterior.nc"))
Next:
  {program()} evaluate {name}/montec {name}/test.jsonl --num-samples {num_samples} --seed {seed}
  {program()} predict {name}/montec {name}/unseen.jsonl --output predictions.csv
  {program()} fit YOUR_DATA.jsonl --model YOUR_MODEL --output-dir run""")
