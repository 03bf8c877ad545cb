"""Accuracy and calibration of pyrolora's guides on sentence-pair tasks, with a real encoder.

Each fit is one row: the encoder is loaded afresh, fitted by `pyrolora.fit` with the guide's default
options, scored on the validation split, summarised by ArviZ, saved, loaded again, and the loaded
posterior has to predict the same. A finished fit is stored at once; a second run with the same
settings takes it from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import arviz
import datasets
import pandas as pd
from common import (
    RESULTS,
    describe_network,
    digest,
    existing_folder,
    hardware,
    markdown,
    model_folder,
    positive,
    quiet_loading,
    save_json,
    show,
    versions,
)
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

import pyrolora

STORE = "real_encoder.jsonl"
COLUMNS = ["sentence1", "sentence2", "label"]
METRICS = ["accuracy", "nll", "ece", "brier"]
SECONDS = ["fit_s", "predict_s"]
CHECK_SAMPLES = 2
ARVIZ_SAMPLES = 200
TOLERANCE = 1e-5

Row = dict[str, Any]


# One fit ----------------------------------------------------------------------------------------


def run(task: str, seed: int, guide: str, args: argparse.Namespace) -> Row:
    """Fit, score, summarise, save and load; the measurements."""
    train, validation = load_data(args.data / task, args.train_examples, seed)
    network, tokenizer = load_network(args.model, seed)
    start = time.perf_counter()
    posterior = pyrolora.fit(
        network,
        train,
        guide,
        tokenizer=tokenizer,
        epochs=args.epochs,
        learning_rate=args.learning_rate,
        batch_size=args.batch,
        seed=seed,
    )
    fitted = time.perf_counter()
    draws = args.num_samples if has_spread(posterior) else 0
    metrics = posterior.evaluate(validation, draws, batch_size=args.batch, seed=seed)
    scored = time.perf_counter()
    report(posterior, seed)
    check_storage(posterior, validation, seed)
    return {
        **{name: metrics[name] for name in METRICS},
        "fit_s": fitted - start,
        "predict_s": scored - fitted,
        "draws": draws,
        "train_size": len(train),
        "validation_size": len(validation),
    }


def load_data(
    folder: Path, train_examples: int, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training examples picked by the seed, and the whole validation split."""
    files = {split: str(path) for split, path in data_files(folder).items()}
    splits = datasets.load_dataset("json", data_files=files)
    for split, data in splits.items():
        missing = [name for name in COLUMNS if name not in data.column_names]
        if missing:
            raise SystemExit(
                f"{files[split]} has no column {', '.join(missing)}; it has {data.column_names}"
            )
    splits = splits.select_columns(COLUMNS)
    train = splits["train"].shuffle(seed=seed)
    return train.select(range(min(train_examples, len(train)))), splits["validation"]


def data_files(folder: Path) -> dict[str, Path]:
    """Split -> file."""
    files = {split: folder / f"{split}.jsonl" for split in ("train", "validation")}
    for path in files.values():
        if not path.is_file():
            raise SystemExit(
                f"there is no {path}; --data must be a folder with train.jsonl and "
                "validation.jsonl below a folder of each task's name"
            )
    return files


def load_network(folder: Path, seed: int) -> tuple[nn.Module, Any]:
    """The encoder with a new task head, the same for all guides of a seed."""
    set_seed(seed)
    with quiet_loading():
        network = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    return network, AutoTokenizer.from_pretrained(folder)


def has_spread(posterior: pyrolora.Posterior) -> bool:
    """Whether two draws differ; a point mass needs only one."""
    return any((draws[0] != draws[1]).any() for draws in posterior.sample(2, seed=0).values())


def report(posterior: pyrolora.Posterior, seed: int) -> None:
    """One line on what ArviZ makes of the posterior. The draws are independent: no R-hat."""
    idata = posterior.to_arviz(ARVIZ_SAMPLES, seed=seed)
    summary = arviz.summary(idata, kind="stats")
    names = ", ".join(map(str, idata["posterior"].data_vars))
    print(f"arviz.summary: {summary.shape[0]} rows x {summary.shape[1]} columns of {names}")


def check_storage(posterior: pyrolora.Posterior, data: datasets.Dataset, seed: int) -> None:
    """Save, load, predict again.

    Raises
    ------
    RuntimeError
        When the loaded posterior predicts something else.
    """
    with tempfile.TemporaryDirectory() as folder:
        posterior.save(folder)
        with quiet_loading():
            loaded = pyrolora.load(folder)
    before, after = (p.predict(data, CHECK_SAMPLES, seed=seed) for p in (posterior, loaded))
    difference = float((before.draws - after.draws).abs().max())
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"a saved and loaded {posterior!r} differs by {difference:.2g} in its probabilities"
        )
    print(f"saved and loaded: the probabilities differ by at most {difference:.1g}")


# Storage ----------------------------------------------------------------------------------------


def settings_of(task: str, seed: int, guide: str, args: argparse.Namespace) -> Row:
    """All that a row depends on: equal settings are not run twice."""
    return {
        "task": task,
        "seed": seed,
        "guide": guide,
        "guide_options": dataclasses.asdict(pyrolora.guides.as_guide(guide)),
        "adapter": dataclasses.asdict(pyrolora.AdapterConfig()),
        "train_examples": args.train_examples,
        "epochs": args.epochs,
        "batch": args.batch,
        "learning_rate": args.learning_rate,
        "num_samples": args.num_samples,
        "model": digest([*args.model.glob("*.safetensors"), args.model / "config.json"]),
        "data": digest(data_files(args.data / task).values()),
        "pyrolora": versions(["pyrolora"])["pyrolora"],
    }


def key(settings: Row) -> str:
    return json.dumps(settings, sort_keys=True)


def read_store(path: Path) -> dict[str, Row]:
    """Settings -> row; a line that a killed run left half written does not count."""
    rows = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        if not line:
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            print(f"{path}: skipped a line that is not complete")
            continue
        rows[key(row["settings"])] = row
    return rows


def append(path: Path, row: Row) -> None:
    """Add a row, on disk before this returns. It starts with the end of a line that a killed run
    may have left open; empty lines do not count."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("\n" + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


# Tables -----------------------------------------------------------------------------------------


def table(rows: list[Row]) -> pd.DataFrame:
    """One line a task and guide: means over the seeds, and the accuracy's standard error, which is
    that of the validation split alone."""
    frame = pd.DataFrame([{**row["settings"], **row["results"]} for row in rows])
    groups = frame.groupby(["task", "guide"], sort=False)
    means = groups[[*METRICS, *SECONDS]].mean()
    size = groups["validation_size"].first()
    error = (means["accuracy"] * (1 - means["accuracy"]) / size).map(math.sqrt)
    means.insert(1, "+-", error)
    means.insert(0, "seeds", groups.size())
    means.insert(1, "draws", groups["draws"].first())
    return means.reset_index()


# The job ----------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: python benchmarks/real_encoder.py --model all-MiniLM-L6-v2 --data data "
        "--seeds 0 1 2",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model", type=model_folder, required=True, help="folder of a pretrained encoder"
    )
    parser.add_argument(
        "--data",
        type=existing_folder,
        required=True,
        help="folder with TASK/train.jsonl and TASK/validation.jsonl, whose lines have sentence1, "
        "sentence2 and label",
    )
    parser.add_argument("--tasks", nargs="+", default=["mrpc", "rte"], help="folders below --data")
    parser.add_argument(
        "--guides",
        nargs="+",
        choices=pyrolora.guides.available(),
        default=["map", "montec"],
        help="guides, with their default options",
    )
    parser.add_argument(
        "--train-examples", type=positive, default=1200, help="training examples of each task"
    )
    parser.add_argument("--epochs", type=positive, default=8, help="passes over them")
    parser.add_argument("--batch", type=positive, default=32, help="examples in a batch")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the means")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        help="each picks the training examples, the start and the noise",
    )
    parser.add_argument(
        "--num-samples",
        type=positive,
        default=32,
        help="draws of a prediction; a guide without spread, like map, takes its one",
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the results, and of the stored rows"
    )
    parser.add_argument(
        "--again", action="store_true", help="fit what is stored already once more, and replace it"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    store = args.out / STORE
    stored = {} if args.again else read_store(store)
    # Seeds are outermost: a run that is cut short leaves complete comparisons.
    jobs = [(t, s, g) for s in args.seeds for t in args.tasks for g in args.guides]
    wanted = [settings_of(*job, args) for job in jobs]  # complains of missing files at once
    with quiet_loading():
        network = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    encoder = describe_network(network)
    rows = []
    for number, (job, settings) in enumerate(zip(jobs, wanted, strict=True), start=1):
        task, seed, guide = job
        print(f"\n[{number}/{len(jobs)}] {task}, seed {seed}, {guide}", flush=True)
        row = stored.get(key(settings))
        if row is None:
            results = run(*job, args)
            about = {"encoder": encoder, "hardware": hardware(), "versions": versions()}
            row = {"settings": settings, "results": results, **about}
            append(store, row)
        else:
            print(f"taken from {store}")
        print(", ".join(f"{name} {row['results'][name]:.3f}" for name in (*METRICS, *SECONDS)))
        rows.append(row)
    frame = table(rows)
    show(frame, digits=3)
    save_json(args.out / "real_encoder.json", {"rows": rows})
    (args.out / "real_encoder.md").write_text(markdown(frame))
    print(f"saved {args.out / 'real_encoder.md'}")


if __name__ == "__main__":
    main()
