"""Does the posterior help on real tasks, and with which defaults?

Every fit is one row of ``study.jsonl``: a task, a number of training examples, a guide with its
options, the training's settings, a seed; and what came of it. Rows are stored as they are made, a
second run takes them from there, and `evidence.py` turns them into docs/evidence.md. The jobs of a
stage are done in the order of their use, as many as fit into ``--minutes``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import datasets
from common import (
    RESULTS,
    digest,
    existing_folder,
    hardware,
    model_folder,
    pick_device,
    positive,
    versions,
)
from study_fits import Place, run
from study_jobs import FOLLOWED, POINTS, Job, Row
from study_stages import STAGES
from study_store import STORE, append, key, read_store
from tasks import (
    HELD_OUT,
    SCORED,
    TASKS,
    TEXTS,
    identity,
    load_task,
    mean_words,
)

import pyrolora
from pyrolora import guides


class Price:
    """Seconds of a job: rows of text through the network x words, at a speed that the finished
    jobs teach."""

    def __init__(self, data: Path, seconds: float = 2e-3) -> None:
        self.data = data
        self.seconds = seconds  # a word, of one pass of training
        self.words: dict[str, float] = {}
        self.sizes: dict[str, int] = {}

    def work(self, job: Job) -> float:
        """Words that pass: a training pass counts 1, one of prediction 1/3."""
        if job.task not in self.words:
            splits = load_task(self.data, job.task, 0, 0)
            self.words[job.task] = mean_words(splits.train, TASKS[job.task]) + 5
            self.sizes[job.task] = len(splits.train)
        size = min(job.examples or self.sizes[job.task], self.sizes[job.task])
        members = job.options.get("members", guides.Ensemble().members)
        copies = members if job.guide == "ensemble" else 1
        draws = 1 if job.guide in POINTS else job.draws
        seen = (HELD_OUT + SCORED) * (job.epochs if job.guide == FOLLOWED else draws)
        return self.words[job.task] * (copies * job.epochs * size + seen / 3)

    def __call__(self, job: Job) -> float:
        return self.seconds * self.work(job)

    def learn(self, job: Job, seconds: float) -> None:
        """Half of the new speed, half of the old."""
        self.seconds = (self.seconds + seconds / self.work(job)) / 2


def affordable(jobs: Iterable[Job], price: Callable[[Job], float], seconds: float) -> list[Job]:
    """The jobs from the first on whose sum fits; one that does not is passed over."""
    chosen = []
    for job in jobs:
        if price(job) <= seconds:
            chosen.append(job)
            seconds -= price(job)
    return chosen


def work_through(
    jobs: list[Job], place: Place, store: Path, seconds: float, workers: int
) -> dict[str, Row]:
    """Do what is not stored, side by side, as long as the time lasts; all rows of the jobs."""
    model = digest([*place.model.glob("*.safetensors"), place.model / "config.json"])
    about = {"hardware": hardware(), "versions": versions(), "side_by_side": workers}
    data = {name: identity(place.data, name) for name in {job.task for job in jobs}}
    keys = {key(job.settings(model, data[job.task], place.dtype)): job for job in jobs}
    stored = read_store(store)
    waiting = [(name, job) for name, job in keys.items() if name not in stored]
    price = Price(place.data)
    for name, job in keys.items():
        if "fit_s" in stored.get(name, {}).get("results", {}):  # not an error
            price.learn(job, stored[name]["results"]["fit_s"])
    end = time.monotonic() + seconds
    fitting = affordable([job for _, job in waiting], price, seconds * workers)
    print(
        f"{len(keys)} fits, {len(keys) - len(waiting)} stored, {len(waiting)} to do; about "
        f"{len(fitting)} fit into {seconds / 60:.0f} minutes with {workers} side by side",
        flush=True,
    )
    context = multiprocessing.get_context("spawn")
    running: dict[Future[Row], tuple[str, Job, float]] = {}
    with ProcessPoolExecutor(workers, context, max_tasks_per_child=8) as pool:
        while waiting or running:
            left = end - time.monotonic()
            while len(running) < workers:
                turn = next((w for w in waiting if price(w[1]) <= left), None)
                if turn is None:
                    break
                waiting.remove(turn)
                running[pool.submit(run, turn[1], place)] = (*turn, time.perf_counter())
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                name, job, start = running.pop(future)
                spent = time.perf_counter() - start
                try:
                    results = future.result()
                except pyrolora.PyroLoraError as error:  # what failed is a result
                    results = {"error": f"{type(error).__name__}: {error}"}
                else:
                    price.learn(job, spent)
                row = {"settings": json.loads(name), "results": results, **about}
                append(store, row)
                stored[name] = row
                print(line(job, results, spent, len(waiting)), flush=True)
    if waiting:
        print(f"time is up: {len(waiting)} fits are left; the same command goes on with them")
    return {name: stored[name] for name in keys if name in stored}


def line(job: Job, results: Row, seconds: float, left: int) -> str:
    """What is printed of a finished job."""
    options = " ".join(f"{name}={value}" for name, value in job.options.items())
    names = ("accuracy", "pearson", "nll", "ece", "held_out_nll", "error")
    found = " ".join(
        f"{name} {results[name]:.3f}" if name != "error" else results[name]
        for name in names
        if name in results
    )
    return (
        f"[{seconds:5.0f} s, {left} left] {job.task} {job.examples} {job.guide} {options} "
        f"e{job.epochs} lr{job.learning_rate:g} b{job.batch} s{job.seed}: {found}"
    )


# The job ----------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: python benchmarks/study.py --model all-MiniLM-L6-v2 --data data "
        "--minutes 60",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model",
        type=model_folder,
        required=True,
        help="folder of a pretrained encoder; its weights may be stored in float16",
    )
    parser.add_argument(
        "--data",
        type=existing_folder,
        required=True,
        help="folder with TASK/train.jsonl, TASK/validation.jsonl (ARC: test.jsonl), "
        f"trec/test.jsonl, and {TEXTS}/*.txt.xz for the task books",
    )
    parser.add_argument(
        "--minutes", type=float, required=True, help="no fit starts that would end later"
    )
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), help="which, in which order"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the encoder; adapters are float32. bfloat16 is faster where the processor "
        "multiplies it",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... or auto")
    parser.add_argument(
        "--workers",
        type=positive,
        help="fits side by side; by default as many as there are cores, one thread each, or 4 on "
        "an accelerator, which small batches leave idle",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of {STORE}")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = pick_device(args.device).type
    workers = args.workers or (len(os.sched_getaffinity(0)) if device == "cpu" else 4)
    place = Place(args.data, args.model, args.dtype, device)
    datasets.disable_progress_bars()
    jobs = [job for stage in args.stages for job in STAGES[stage]()]
    rows = work_through(jobs, place, args.out / STORE, 60 * args.minutes, workers)
    print(f"{len(rows)} rows of these stages in {args.out / STORE}; evidence.py makes the tables")


if __name__ == "__main__":
    main()
