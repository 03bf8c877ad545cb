"""What each method costs and brings beside plain LoRA: the table of the README.

Every guide is fitted by `pyrolora.fit` with its default options to the demo's sentences, on the
embedded encoder, with the same epochs and learning rate, and scored on the test sentences. The fits
take turns, round by round with a new seed, so that a slow moment of the machine hits all of them.
Memory is counted apart, on a short fit: the peak of the tensors that exist beside the network.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
from common import RESULTS, hardware, markdown, positive, quiet_loading, save_json, show, versions
from memory import LiveBytes
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

import pyrolora
from pyrolora import zoo
from pyrolora.demo import sentences
from pyrolora.guides import Ensemble, Guide, as_guide

REFERENCE = "map"
GUIDES: dict[str, Guide] = {
    **{n: as_guide(n) for n in ("map", "montec", "meanfield", "lowrank", "flat", "flat+montec")},
    **{name: as_guide(name) for name in ("laplace", "swag", "dropout", "ensemble")},
    "ensemble side by side": Ensemble(side_by_side=True),
    "full": as_guide("full"),
}
SCORES = ("accuracy", "nll", "ece")
OWN_RATE = {"full": 1e-4}  # where all weights move, the rate of adapters is far too high
MEMORY_BATCH = 32


def network_for(data: Any) -> tuple[Any, Any]:
    """The encoder with a head for the data, and its tokenizer."""
    folder = zoo.folder("encoder")
    classes = data["train"].features["label"].num_classes
    with quiet_loading():
        network = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes)
    return network, AutoTokenizer.from_pretrained(folder)


def peak_bytes(guide: Guide, data: Any) -> int:
    """The peak of one fit of four batches, an epoch."""
    network, tokenizer = network_for(data)
    rows = data["train"].select(range(4 * MEMORY_BATCH))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=MEMORY_BATCH,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        with LiveBytes() as live, contextlib.redirect_stdout(io.StringIO()):
            pyrolora.fit(network, rows, guide, tokenizer=tokenizer, training=args)
    return live.peak


def one_fit(guide: Guide, data: Any, args: argparse.Namespace, seed: int) -> dict[str, float]:
    """Seconds and scores."""
    network, tokenizer = network_for(data)
    started = time.perf_counter()
    posterior = pyrolora.fit(
        network,
        data["train"],
        guide,
        tokenizer=tokenizer,
        epochs=args.epochs,
        learning_rate=OWN_RATE.get(guide.name, args.learning_rate),
        seed=seed,
    )
    fitted = time.perf_counter()
    scores = posterior.evaluate(data["test"], num_samples=args.num_samples, seed=seed)
    done = time.perf_counter()
    return {
        **{name: scores[name] for name in SCORES},
        "fit_s": fitted - started,
        "predict_s": done - fitted,
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--train", type=positive, default=120, help="sentences a class")
    parser.add_argument("--test", type=positive, default=100, help="sentences a class")
    parser.add_argument("--epochs", type=positive, default=5)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--num-samples", type=positive, default=16, help="draws at prediction")
    parser.add_argument("--rounds", type=positive, default=3, help="seeds, 0 and on")
    parser.add_argument("--guides", nargs="+", choices=list(GUIDES), default=list(GUIDES))
    parser.add_argument("--name", default="methods", help="of the files that are written")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    data = sentences(train=args.train, test=args.test)
    memory = {name: peak_bytes(GUIDES[name], data) for name in args.guides}
    fits: list[dict[str, Any]] = []
    for seed in range(args.rounds):
        first = seed % len(args.guides)
        for name in args.guides[first:] + args.guides[:first]:
            row = {"guide": name, "seed": seed, **one_fit(GUIDES[name], data, args, seed)}
            fits.append(row)
            print(row, flush=True)
    table = summary(fits, memory)
    show(table, digits=3)
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    save_json(
        args.out / f"{args.name}.json",
        {
            "arguments": settings,
            "options": {name: str(GUIDES[name]) for name in args.guides},
            "versions": versions(),
            "hardware": hardware(),
            "peak_bytes": memory,
            "fits": fits,
        },
    )
    (args.out / f"{args.name}.md").write_text(markdown(table))


def summary(fits: list[dict[str, Any]], memory: dict[str, int]) -> pd.DataFrame:
    """One row a guide: means of scores with their standard deviations over seeds; medians over
    rounds of the seconds relative to the reference of the same round."""
    reference = {row["seed"]: row for row in fits if row["guide"] == REFERENCE}
    rows = []
    for name in memory:
        own = [row for row in fits if row["guide"] == name]
        row: dict[str, Any] = {"guide": name}
        for score in SCORES:
            values = [r[score] for r in own]
            spread = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
            row[score] = f"{statistics.mean(values):.3f}{spread}"
        for part in ("fit_s", "predict_s"):
            if reference:
                ratios = [r[part] / reference[r["seed"]][part] for r in own]
                row[part.replace("_s", " x")] = statistics.median(ratios)
        if REFERENCE in memory:
            row["memory x"] = memory[name] / memory[REFERENCE]
        rows.append(row)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
