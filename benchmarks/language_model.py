"""Posteriors of a language model's adapters, by BLoB's protocol as far as two cores carry it.

Every fit is one row of ``language_model.jsonl``, stored as it is made; a second run goes on from
there. The tables of docs/language_model.md are made of the rows at the end of every run.

The protocol of BLoB (arXiv 2406.11675) as it is here: LoRA of rank 8, alpha 16, on the query and
value projections, batches of 4, AdamW at 1e-4 with a warm-up over 6 % of the steps, 10 draws. What
differs: the model, the tasks' sizes, fewer steps. Their adapter on the output layer is here the
classifier's head, whose rows start as those of the answers' words, trained whole, a point; choices
are told by the likelihood of their texts, with the output layer as it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import transformers
from common import (
    RESULTS,
    digest,
    existing_folder,
    hardware,
    markdown,
    model_folder,
    positive,
    show,
    versions,
)
from evidence import PART
from language_tasks import MOST_WORDS, PROMPTS, load_examples, load_language_model
from study_fits import scores
from study_jobs import FORMER, Row, describe
from study_store import append, key, read_store
from tasks import Splits, identity

import pyrolora
from pyrolora import guides
from pyrolora.inference import training_arguments

STORE = "language_model.jsonl"
DOC = Path("docs/language_model.md")
WARM_UP = 0.06
TUNED_ON = 50  # held-out examples that set the prior of Laplace
ANCHORS = 32  # training examples whose loss bounds the noise of TFB


@dataclass(frozen=True)
class Method:
    """A guide with its options; or what is made of the fit of ``after``, without training."""

    guide: str
    options: Mapping[str, Any] = field(default_factory=dict)
    after: str | None = None


# BLoB's script for LLaMA: the prior's scale (bayes-beta) 0.2; σ = ρ² with ρ uniform on
# [eps / √2, eps], eps 0.05, whose mean is 0.00184; the KL of a fit's own rate, 0.01, by SGD, and
# with more of its weight at the end of an epoch, for which there is no option here: its weight is
# 1, and the rate of the scales is 0.01. One draw per example stands for their signs per token.
BLOB = {
    "prior_scale": 0.2,
    "init_scale": 0.00184,
    "kl_weight": 1.0,
    "prior_mean": "zero",
    "units": "one",
    "scale_updates": "gradient",
    "scale_learning_rate": 0.01,
    "draws_per_batch": 4,
}
TEMPERATURE = "MLE, temperature"
METHODS = {
    "MLE": Method("map"),
    "Laplace": Method("laplace", after="MLE"),
    "TFB": Method("tfb", after="MLE"),
    TEMPERATURE: Method("map", after="MLE"),  # the last: the others start from a posterior without
    "montec": Method("montec"),
    "montec, all learnt": Method("montec", {"hold_back": 0}),
    "montec, formerly": Method("montec", FORMER["montec"]),
    "BLoB": Method("meanfield", BLOB),
    "MAP": Method("map", {"prior_scale": 0.2}),
    "MC dropout": Method("dropout", {"p": 0.1}),
    "ensemble of 3": Method("ensemble", {"members": 3}),
}


@dataclass(frozen=True)
class Job:
    """One training; and what is made of it afterwards."""

    task: str
    method: str
    seed: int
    epochs: int
    args: argparse.Namespace

    def methods(self) -> list[str]:
        return [self.method, *(n for n, own in METHODS.items() if own.after == self.method)]

    def settings(self, method: str) -> Row:
        """All that a row depends on, defaults spelled out."""
        own, args = METHODS[method], self.args
        return {
            "task": self.task,
            "method": method,
            "guide": own.guide,
            "options": describe(guides.from_options(own.guide, own.options)),
            "adapter": dataclasses.asdict(adapter(self.task, args)),
            "prompt": dataclasses.asdict(PROMPTS[self.task]),
            "examples": args.examples,
            "others": [args.held_out, args.scored, TUNED_ON, ANCHORS, MOST_WORDS],
            "epochs": self.epochs,
            "batch": args.batch_size,
            "learning_rate": args.learning_rate,
            "warm_up": WARM_UP,
            "draws": args.draws,
            "dtype": args.dtype,
            "seed": self.seed,
        }


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """A seed of everything, then the next; a task after the other, so that tables fill whole."""
    for seed, epochs, task in itertools.product(args.seeds, args.epochs, args.tasks):
        for method, own in METHODS.items():
            if own.after is None:
                yield Job(task, method, seed, epochs, args)


def adapter(task: str, args: argparse.Namespace) -> pyrolora.AdapterConfig:
    """On query and value; the head of a classifier is trained whole."""
    return pyrolora.AdapterConfig(
        r=8,
        lora_alpha=16,
        target_modules=("q_proj", "v_proj"),
        modules_to_save=("score",) if PROMPTS[task].words else (),
    )


# One fit ----------------------------------------------------------------------------------------


def run(job: Job) -> Iterator[tuple[str, Row]]:
    """The methods of a job and their results, one after the other."""
    args = job.args
    splits = load_examples(
        args.data, job.task, (args.examples, args.held_out, args.scored), job.seed
    )
    network, tokenizer = load_language_model(args.model, job.task, job.seed, args.dtype)
    training = arguments(job)
    start = time.process_time()
    trained = pyrolora.fit(
        network,
        splits.train,
        guide(job.method),
        tokenizer=tokenizer,
        adapter=adapter(job.task, args),
        task="classification" if PROMPTS[job.task].words else "multiple-choice",
        training=training,
    )
    spent = time.process_time() - start
    yield job.method, scored(trained, splits, job, spent)
    for method in job.methods()[1:]:
        try:
            start = time.process_time()
            made = afterwards(trained, method, splits, training)
            more = time.process_time() - start
            yield method, scored(made, splits, job, spent + more)
        except pyrolora.PyroLoraError as error:
            yield method, failed(error)


def afterwards(trained: Any, method: str, splits: Splits, training: Any) -> Any:
    """The posterior of a method that trains nothing, from the trained one."""
    if method == TEMPERATURE:
        trained.calibrate(splits.held_out)
        return trained
    laplace = METHODS[method].guide == "laplace"
    few = splits.train if laplace else first(splits.train, ANCHORS)
    extra = {"eval_data": first(splits.held_out, TUNED_ON)} if laplace else {}
    settings = {"batch_size": training.per_device_train_batch_size, "seed": training.seed}
    return pyrolora.fit(trained, few, guide(method), **settings, **extra)


def first(data: datasets.Dataset, most: int) -> datasets.Dataset:
    return data.select(range(min(most, len(data))))


def guide(method: str) -> guides.Guide:
    return guides.from_options(METHODS[method].guide, METHODS[method].options)


def arguments(job: Job) -> Any:
    args = job.args
    steps = math.ceil(args.examples / args.batch_size) * job.epochs
    return training_arguments(
        tempfile.gettempdir(),
        epochs=job.epochs,
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        seed=job.seed,
        save=False,
        warmup_steps=math.ceil(WARM_UP * steps),
        disable_tqdm=True,
        use_cpu=True,
    )


def scored(posterior: Any, splits: Splits, job: Job, seconds: float) -> Row:
    """Scores of the predictive mean over draws, and what they took: seconds of the processor."""
    start = time.process_time()
    prediction = posterior.predict(splits.scored, num_samples=job.args.draws, seed=job.seed)
    steps = math.ceil(len(splits.train) / job.args.batch_size) * job.epochs
    return {
        **scores(prediction),
        "fit_s": seconds,
        "predict_s": time.process_time() - start,
        "steps": steps,
        "train_size": len(splits.train),
        "scored_size": len(splits.scored),
        "temperature": posterior.temperature,
    }


def failed(error: Exception) -> Row:
    return {"error": f"{type(error).__name__}: {error}"}


# All of them ------------------------------------------------------------------------------------


def work_through(args: argparse.Namespace) -> dict[str, Row]:
    """Do what is not stored until the time is up; all rows of the jobs."""
    store, end = args.out / STORE, time.monotonic() + 60 * args.minutes
    about = {"hardware": hardware(), "versions": versions()}
    model = digest([*args.model.glob("*.safetensors"), args.model / "config.json"])
    data = {task: identity(args.data, task) for task in args.tasks}
    stored = read_store(store)
    rows = {}
    for job in jobs(args):
        files = {"model": model, "data": data[job.task]}
        settings = {name: job.settings(name) | files for name in job.methods()}
        if any(key(own) not in stored for own in settings.values()) and time.monotonic() < end:
            for method, results in made(job):
                row = {"settings": settings[method], "results": results, **about}
                append(store, row)
                stored[key(settings[method])] = row
                print(line(job, method, results), flush=True)
        rows |= {key(own): stored[key(own)] for own in settings.values() if key(own) in stored}
    return rows


def made(job: Job) -> Iterator[tuple[str, Row]]:
    """The results of a job, quietly; what failed is a result."""
    steps = run(job)
    while True:
        try:
            with (
                open(os.devnull, "w") as nowhere,
                redirect_stdout(nowhere),
                redirect_stderr(nowhere),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                method, results = next(steps)
        except StopIteration:
            return
        except pyrolora.PyroLoraError as error:  # of the training: nothing comes after it
            for method in job.methods():
                yield method, failed(error)
            return
        yield method, results


def line(job: Job, method: str, results: Row) -> str:
    """What is printed of a finished row."""
    about = f"{job.task} s{job.seed} {job.epochs} epochs {method}"
    if "error" in results:
        return f"{about}: {results['error']}"
    found = " ".join(f"{name} {results[name]:.3f}" for name in ("accuracy", "nll", "ece"))
    return f"{about}: {found} fit {results['fit_s']:.0f} s predict {results['predict_s']:.0f} s"


# Tables -----------------------------------------------------------------------------------------

SCORES = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE"}


def frame_of(rows: Mapping[str, Row]) -> pd.DataFrame:
    """A line per fit that did not fail."""
    records = [
        {**row["settings"], **row["results"]}
        for row in rows.values()
        if "error" not in row["results"]
    ]
    frame = pd.DataFrame(records)
    if len(frame):
        frame["s / step"] = frame["fit_s"] / frame["steps"]
        frame["predict s"] = frame["predict_s"]
        for name, order in (("task", list(PROMPTS)), ("method", list(METHODS))):
            frame[name] = pd.Categorical(frame[name], order, ordered=True)
    return frame


def per_task(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, ± their standard error where there are several."""
    groups = frame.groupby(["epochs", "task", "method"], observed=True)
    shown = pd.DataFrame({SCORES[name]: groups[name].apply(with_error) for name in SCORES})
    for name in ("s / step", "predict s"):
        shown[name] = groups[name].mean().map("{:.2f}".format)
    shown["seeds"] = groups["seed"].nunique()
    return shown.reset_index().astype({"task": str, "method": str})


def with_error(values: pd.Series) -> str:
    mean = f"{values.mean():.3f}"
    return mean if len(values) < 2 else f"{mean} ± {values.sem():.3f}"


def over_tasks(frame: pd.DataFrame) -> pd.DataFrame:
    """For each number of epochs, over the tasks and seeds that every method has: mean accuracy and
    ECE, and the geometric mean of NLL relative to MLE."""
    return pd.concat([_over_tasks(own) for _, own in frame.groupby("epochs")])


def _over_tasks(frame: pd.DataFrame) -> pd.DataFrame:
    wide = frame.pivot_table(
        index=["task", "seed"], columns="method", values=list(SCORES), observed=True
    ).dropna()
    names = [name for name in METHODS if name in wide["accuracy"]]
    relative = np.log(wide["nll"]).sub(np.log(wide["nll"]["MLE"]), axis=0)
    return pd.DataFrame(
        {
            "epochs": frame["epochs"].iloc[0],
            "method": names,
            "accuracy": [wide["accuracy"][name].mean() for name in names],
            "NLL to MLE's": [float(np.exp(relative[name].mean())) for name in names],
            "ECE": [wide["ece"][name].mean() for name in names],
            "tasks x seeds": len(wide),
        }
    )


TABLES = {"per-task": per_task, "over-tasks": over_tasks}


def filled(text: str, frame: pd.DataFrame) -> str:
    """The document with its tables made anew."""

    def replace(match: Any) -> str:
        name = match[2]
        if name not in TABLES:
            raise SystemExit(f"unknown table {name!r}; known are {', '.join(TABLES)}")
        table = TABLES[name](frame) if len(frame) else frame
        found = markdown(table) if len(table) else "_There are no rows for this yet._\n"
        return f"<!-- table: {name} -->\n\n{found}\n<!-- end -->"

    return PART.sub(replace, text)


# The job ----------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=model_folder, required=True, help="folder of a LLaMA language model")
    add("--data", type=existing_folder, required=True, help="folder of the tasks, as for study.py")
    add("--minutes", type=float, required=True, help="no fit starts later; 0 makes the tables only")
    add("--tasks", nargs="+", choices=PROMPTS, default=list(PROMPTS), help="in this order")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--examples", type=positive, default=200, help="to train on, of each task")
    add("--held-out", type=positive, default=200, help="that choose the temperature")
    add("--scored", type=positive, default=100, help="at most")
    add("--epochs", type=positive, nargs="+", default=[2, 10], help="one or several")
    add("--batch-size", type=positive, default=4)
    add("--learning-rate", type=float, default=1e-4)
    add("--draws", type=positive, default=10, help="of a prediction")
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of the frozen weights; adapters, heads and the likelihood are in float32",
    )
    add("--out", type=Path, default=RESULTS, help=f"folder of {STORE}")
    add("--doc", type=Path, default=DOC, help="the text with the markers of the tables")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    frame = frame_of(work_through(args))
    if not len(frame):
        raise SystemExit(f"there are no rows in {args.out / STORE}; give more --minutes")
    show(per_task(frame), digits=3)
    args.doc.write_text(filled(args.doc.read_text("utf-8"), frame), "utf-8")
    print(f"{args.doc} is filled from {len(frame)} rows")


if __name__ == "__main__":
    main()
