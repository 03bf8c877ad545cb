"""Data that come in turn: is the first half forgotten while the second is learnt?

TREC's questions in two halves that differ. By default the task is whether a question asks for a
person or a place: the first half has questions for descriptions (no) and persons (yes), the second
those for things (no) and places (yes). Or the task is the six classes, and the halves differ by
their first word, those that begin with "what", and then all others (who, where, how many, when); or
by their label, three of the classes each.

Each method learns the first half, then the second without seeing the first again: plain LoRA goes
on from where it was (the adapter merged, a new one on top), for as many epochs or for fewer, with
its head trained further or kept; the others take their posterior as the prior, with several weights
of the KL. Both halves at once are what there was to reach. Every model is scored on both halves of
the test questions.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
from common import (
    RESULTS,
    digest,
    existing_folder,
    markdown,
    model_folder,
    positive,
    provenance,
    save_json,
    show,
)
from tasks import TASKS, load_network
from tqdm.auto import tqdm

import pyrolora
from pyrolora import AdapterConfig, guides
from pyrolora.posterior import Posterior

TASK = "trec"
FIRST = "what"
KINDS = {"first": ("DESC", "HUM"), "second": ("ENTY", "LOC")}
NAMES = ("HUM", "LOC")
GUIDES: dict[str, guides.Guide] = {
    "montec": guides.MonteCLoRA(latent="AB"),
    "meanfield": guides.MeanField(latent="AB"),
    "lowrank": guides.LowRank(latent="AB"),
    # So cold that the data have a say in the widths, which then differ from entry to entry.
    "meanfield, cold": guides.MeanField(latent="AB", kl_weight=0.002),
}
METHODS = ("LoRA", *GUIDES)
KL_WEIGHTS = (0.1, 0.2, 0.5)
SCORES = ("accuracy", "nll", "ece")
Row = dict[str, Any]


def in_half(row: Row, by: str) -> str | None:
    """Which half a question belongs to, if to any."""
    if by == "name":
        return next((half for half, kinds in KINDS.items() if row["label_name"] in kinds), None)
    first = row["label"] < 3 if by == "label" else row["sentence"].lower().startswith(FIRST)
    return "first" if first else "second"


def label(row: Row, by: str) -> int:
    """The target of a question: its class, or whether it asks for a person or a place."""
    return int(row["label_name"] in NAMES) if by == "name" else row["label"]


def halves(folder: Path, split: str, by: str, examples: int | None, seed: int) -> dict[str, Any]:
    """``first`` and ``second``, each with as many examples, picked by ``seed``; None: all."""
    path = folder / TASK / f"{split}.jsonl"
    if not path.is_file():
        raise SystemExit(f"there is no {path}; --data must be a folder with TASK/SPLIT.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = {}
    for name in ("first", "second"):
        own = [
            {"sentence": row["sentence"], "label": label(row, by)}
            for row in rows
            if in_half(row, by) == name
        ]
        data = datasets.Dataset.from_list(own)
        if examples is not None:
            data = data.shuffle(seed=seed).select(range(min(examples, len(data))))
        found[name] = data
    return found


class Course:
    """The fits of one seed."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed = args, seed
        self.train = halves(args.data, "train", args.halves, args.examples, seed)
        self.test = halves(args.data, "test", args.halves, None, seed)
        self.rows: list[Row] = []

    def fit(
        self, network: Any, data: Any, guide: Any, epochs: int | None = None, **options: Any
    ) -> Posterior:
        args = self.args
        return pyrolora.fit(
            network,
            data,
            guide,
            tokenizer=self.tokenizer,
            epochs=epochs or args.epochs,
            learning_rate=args.learning_rate,
            batch_size=args.batch_size,
            seed=self.seed,
            **options,
        )

    def network(self) -> Any:
        classes = 2 if self.args.halves == "name" else TASKS[TASK].classes
        network, self.tokenizer = load_network(
            self.args.model, TASK, self.seed, "float32", num_labels=classes
        )
        return network

    def add(self, method: str, stage: str, fit: Callable[[], Posterior]) -> Posterior:
        """Fit, score on both halves of the test questions, and keep the row."""
        start = time.perf_counter()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            posterior = fit()
        row = {"method": method, "stage": stage, "seed": self.seed}
        row["seconds"] = time.perf_counter() - start
        for half, data in self.test.items():
            scores = posterior.evaluate(data, self.args.draws, seed=self.seed)
            row |= {f"{half}_{name}": scores[name] for name in SCORES}
        self.rows.append(row)
        return posterior

    def run(self) -> list[Row]:
        for method in self.args.methods:
            if method == "LoRA":
                self.lora()
            else:
                self.posteriors(method, GUIDES[method])
        return self.rows

    def lora(self) -> None:
        second = self.train["second"]
        plain = self.add(
            "LoRA", "first", lambda: self.fit(self.network(), self.train["first"], "map")
        )
        for epochs in self.args.fewer_epochs:
            self.add(
                f"LoRA, {epochs} epochs",
                "then second",
                lambda epochs=epochs: self.fit(plain.merge(), second, "map", epochs),
            )
        self.add("LoRA", "then second", lambda: self.fit(plain.merge(), second, "map"))
        kept = AdapterConfig(modules_to_save=[])
        self.add(
            "LoRA, head kept",
            "then second",
            lambda: self.fit(plain.merge(), second, "map", adapter=kept),
        )
        self.add("LoRA", "both at once", lambda: self.fit(self.network(), self.both(), "map"))

    def posteriors(self, name: str, guide: Any) -> None:
        earlier = self.add(
            name, "first", lambda: self.fit(self.network(), self.train["first"], guide)
        )
        for weight in self.args.kl_weights:
            later = replace(guide, kl_weight=weight)
            self.add(
                f"{name}, KL weight {weight:g}",
                "then second",
                lambda later=later: self.fit(
                    earlier.base, self.train["second"], later, prior=earlier
                ),
            )
        self.add(name, "both at once", lambda: self.fit(self.network(), self.both(), guide))

    def both(self) -> Any:
        return datasets.concatenate_datasets([self.train["first"], self.train["second"]])


def table(rows: list[Row]) -> pd.DataFrame:
    """Means over seeds; accuracy with its standard deviation, if there are several."""
    frame = pd.DataFrame(rows)
    names = [name for name in frame.columns if name not in ("method", "stage", "seed")]
    groups = frame.groupby(["method", "stage"], sort=False)[names]
    means, sds = groups.mean(), groups.std()
    shown = pd.DataFrame(index=means.index)
    for half in ("first", "second"):
        shown[f"{half} half: accuracy"] = [
            f"{m:.3f}" if pd.isna(s) else f"{m:.3f} ± {s:.3f}"
            for m, s in zip(means[f"{half}_accuracy"], sds[f"{half}_accuracy"], strict=True)
        ]
        shown[f"{half}: nll"] = means[f"{half}_nll"]
    shown["mean accuracy"] = (means["first_accuracy"] + means["second_accuracy"]) / 2
    shown["seconds"] = means["seconds"].round()
    return shown.reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=existing_folder, required=True, help="with trec/")
    parser.add_argument("--model", type=model_folder, required=True, help="of a pretrained encoder")
    parser.add_argument("--halves", choices=("name", "word", "label"), default="name")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--examples", type=positive, default=500, help="of each half")
    parser.add_argument("--epochs", type=positive, default=8, help="of each fit")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument("--draws", type=positive, default=8, help="of a prediction")
    parser.add_argument(
        "--fewer-epochs",
        type=positive,
        nargs="+",
        default=[2, 3, 5],
        help="of LoRA's second fits that end early",
    )
    parser.add_argument(
        "--kl-weights", type=float, nargs="+", default=KL_WEIGHTS, help="of the second fits"
    )
    parser.add_argument("--name", default="sequential", help="of the files that are written")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows: list[Row] = []
    for seed in tqdm(args.seeds, desc="seeds"):
        rows += Course(args, seed).run()
    shown = table(rows)
    show(shown, digits=3)
    files = [args.data / TASK / f"{split}.jsonl" for split in ("train", "test")]
    identity = {"data": digest(files), "model": digest(args.model.glob("*.safetensors"))}
    about = provenance(args)
    about["arguments"] |= {"data": None, "model": None}  # places, which the digests stand for
    save_json(args.out / f"{args.name}.json", {"rows": rows, **identity, **about})
    (args.out / f"{args.name}.md").write_text(markdown(shown))


if __name__ == "__main__":
    main()
