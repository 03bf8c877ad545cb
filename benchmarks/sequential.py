"""Data that come in turn: is the first half forgotten while the second is learnt?

TREC's questions in two halves that differ: by their first word, those that begin with "what", and
then all others (who, where, how many, when); or by their label, three of the six classes each.
Each method learns the first half, then the second without seeing the first again: plain LoRA goes
on from where it was (the adapter merged, a new one on top), with its head trained further or kept;
the others take their posterior as the prior. Both halves at once are what there was to reach. Every
model is scored on both halves of the test questions.
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
from tasks import load_network
from tqdm.auto import tqdm

import pyrolora
from pyrolora import AdapterConfig, guides
from pyrolora.posterior import Posterior

TASK = "trec"
FIRST = "what"
GUIDES: dict[str, guides.Guide] = {
    "montec": guides.MonteCLoRA(latent="AB"),
    "meanfield": guides.MeanField(latent="AB"),
    "lowrank": guides.LowRank(latent="AB"),
}
SCORES = ("accuracy", "nll", "ece")
Row = dict[str, Any]


def is_first(row: Row, by: str) -> bool:
    """Whether a question belongs to the first half."""
    return row["label"] < 3 if by == "label" else row["sentence"].lower().startswith(FIRST)


def halves(folder: Path, split: str, by: str, examples: int | None, seed: int) -> dict[str, Any]:
    """``first`` and ``second``, each with as many examples, picked by ``seed``; None: all."""
    path = folder / TASK / f"{split}.jsonl"
    if not path.is_file():
        raise SystemExit(f"there is no {path}; --data must be a folder with TASK/SPLIT.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = {}
    for name in ("first", "second"):
        own = [
            {"sentence": row["sentence"], "label": row["label"]}
            for row in rows
            if is_first(row, by) == (name == "first")
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

    def fit(self, network: Any, data: Any, guide: Any, **options: Any) -> Posterior:
        args = self.args
        return pyrolora.fit(
            network,
            data,
            guide,
            tokenizer=self.tokenizer,
            epochs=args.epochs,
            learning_rate=args.learning_rate,
            batch_size=args.batch_size,
            seed=self.seed,
            **options,
        )

    def network(self) -> Any:
        network, self.tokenizer = load_network(self.args.model, TASK, self.seed, "float32")
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
        first, second = self.train["first"], self.train["second"]
        both = datasets.concatenate_datasets([first, second])
        plain = self.add("LoRA", "first", lambda: self.fit(self.network(), first, "map"))
        self.add("LoRA", "then second", lambda: self.fit(plain.merge(), second, "map"))
        kept = AdapterConfig(modules_to_save=[])
        self.add(
            "LoRA, head kept",
            "then second",
            lambda: self.fit(plain.merge(), second, "map", adapter=kept),
        )
        self.add("LoRA", "both at once", lambda: self.fit(self.network(), both, "map"))
        for name in self.args.guides:
            options = GUIDES[name]
            guide = replace(options, kl_weight=self.args.kl_weight or options.kl_weight)
            earlier = self.add(
                name, "first", lambda guide=guide: self.fit(self.network(), first, guide)
            )
            self.add(
                name,
                "then second",
                lambda earlier=earlier: self.fit(earlier.base, second, None, prior=earlier),
            )
            self.add(
                name, "both at once", lambda guide=guide: self.fit(self.network(), both, guide)
            )
        return self.rows


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
    parser.add_argument("--halves", choices=("word", "label"), default="word")
    parser.add_argument("--guides", nargs="+", choices=GUIDES, default=list(GUIDES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--examples", type=positive, default=300, help="of each half")
    parser.add_argument("--epochs", type=positive, default=5)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument("--draws", type=positive, default=8, help="of a prediction")
    parser.add_argument("--kl-weight", type=float, help="of all guides; else each one's default")
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
