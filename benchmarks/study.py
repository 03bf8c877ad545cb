"""Does the posterior help on real tasks, and with which defaults?

Every fit is one row of ``study.jsonl``: a task, a number of training examples, a guide with its
options, the training's settings, a seed; and what came of it. Rows are stored as they are made, a
second run takes them from there, and `evidence.py` turns them into docs/evidence.md. The jobs of a
stage are done in the order of their use, as many as fit into ``--minutes``.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import datasets
import peft
import torch
import transformers
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
from peft.helpers import MontecloraTrainerMixin
from scipy.optimize import minimize_scalar
from scipy.stats import pearsonr
from tasks import (
    HELD_OUT,
    SCORED,
    TASKS,
    TEXTS,
    Splits,
    identity,
    load_network,
    load_task,
    mean_words,
)
from torchmetrics.functional.classification import multiclass_matthews_corrcoef
from transformers import (
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import pyrolora
from pyrolora import guides
from pyrolora.data import prepare
from pyrolora.inference import training_arguments
from pyrolora.predictive import (
    ClassPrediction,
    Prediction,
    RegressionPrediction,
    auroc,
    draw_factors,
    evaluate,
    predict,
)
from pyrolora.predictive.metrics import calibration_error
from pyrolora.seeding import seeded

STORE = "study.jsonl"
PEFT = "peft-montec"
# The layers of the first trials: with the feed-forward layers LoRA has more room to overfit.
ADAPTER = pyrolora.AdapterConfig(target_modules=("query", "key", "value", "dense"))
POINTS = ("map", "flat", PEFT, "full")  # one draw is all there is
OWN_RATE = {"full": 1e-4}  # where all weights move, the rate of adapters is far too high
# What fits did before an option gave the choice.
BEFORE = {
    "scale_updates": "gradient",
    "units": "one",
    "prior_mean": "zero",
    "curvature": "kronecker",
}
FOLLOWED = "map"  # scored after every epoch: the rival that is stopped in time

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One fit."""

    task: str
    examples: int  # 0: all of them
    guide: str
    options: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 8
    learning_rate: float = 1e-3
    batch: int = 32
    seed: int = 0
    draws: int = 8

    def settings(self, model: str, data: str, dtype: str) -> Row:
        """All that a row depends on, defaults spelled out: equal settings are not run twice."""
        about = dataclasses.asdict(self)
        about["draws"] = 0 if self.guide in POINTS else self.draws
        if self.guide != PEFT:
            about["options"] = describe(guides.from_options(self.guide, self.options))
        about["adapter"] = dataclasses.asdict(ADAPTER)
        return {**about, "model": model, "data": data, "dtype": dtype}


def describe(guide: guides.Guide) -> Row:
    """A guide's options, an inner guide's below its own."""
    shallow = {f.name: getattr(guide, f.name) for f in dataclasses.fields(guide)}
    return {
        name: describe(value) if isinstance(value, guides.Guide) else value
        for name, value in shallow.items()
    }


# One fit ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a job finds what it needs."""

    data: Path
    model: Path
    dtype: str
    device: str


def run(job: Job, place: Place) -> Row:
    """Fit, predict, score; in a worker, which prints nothing."""
    if place.device == "cpu":
        torch.set_num_threads(1)  # the jobs are side by side
    _quiet()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return _run(job, place)


def _run(job: Job, place: Place) -> Row:
    splits = load_task(place.data, job.task, job.examples, job.seed)
    network, tokenizer = load_network(place.model, job.task, job.seed, place.dtype)
    fit = fit_peft if job.guide == PEFT else fit_pyrolora
    start = time.perf_counter()
    fitted = fit(job, network, tokenizer, splits, place)
    seconds = time.perf_counter() - start
    draws = 0 if job.guide in POINTS else job.draws
    start = time.perf_counter()
    scored = fitted.predict(splits.scored, draws)
    predict_s = time.perf_counter() - start
    results = scores(scored)
    if isinstance(scored, ClassPrediction):
        results["ece_exact"] = exact_ece(scored)
    if splits.outside is not None:
        results["ood_auroc"] = auroc(scored.entropy, fitted.predict(splits.outside, draws).entropy)
    results["by_draws"] = {str(count): scores(few) for count, few in fewer(scored)}
    held_out = fitted.predict(splits.held_out, draws)
    results["held_out_nll"] = evaluate(held_out)["nll"]
    if isinstance(scored, ClassPrediction) and isinstance(held_out, ClassPrediction):
        temperature = best_temperature(held_out)
        cooled = scores(tempered(scored, temperature))
        results |= {f"{name}_ts": cooled[name] for name in ("nll", "ece", "brier")}
        results["temperature"] = temperature
    return {
        **results,
        "curve": fitted.curve,
        "fit_s": seconds,
        "predict_s": predict_s,
        "train_size": len(splits.train),
        "scored_size": len(splits.scored),
        "draws": draws,
    }


@dataclass
class Fitted:
    """A network that predicts, and its scores after each epoch where they were followed."""

    predict: Callable[[Any, int], Prediction]
    curve: list[Row] = field(default_factory=list)


def fit_pyrolora(job: Job, network: Any, tokenizer: Any, splits: Splits, place: Place) -> Fitted:
    """The guide by `pyrolora.fit`."""
    curve = Curve(splits, tokenizer)
    # Only Laplace looks at the held-out examples: for the precision of its prior.
    extra = {"eval_data": splits.held_out} if job.guide == "laplace" else {}
    posterior = pyrolora.fit(
        network,
        splits.train,
        guides.from_options(job.guide, job.options),
        tokenizer=tokenizer,
        adapter=ADAPTER if guides.guide_class(job.guide.partition("+")[0]).adapts else None,
        training=arguments(job, place),
        callbacks=[curve] if job.guide == FOLLOWED else [],
        **extra,
    )
    return Fitted(lambda data, draws: posterior.predict(data, draws, seed=job.seed), curve.rows)


def arguments(job: Job, place: Place) -> TrainingArguments:
    return training_arguments(
        tempfile.gettempdir(),
        epochs=job.epochs,
        learning_rate=job.learning_rate,
        batch_size=job.batch,
        seed=job.seed,
        save=False,
        disable_tqdm=True,
        use_cpu=place.device == "cpu",
    )


class Curve(TrainerCallback):
    """Scores of the held-out and of the scored examples after each epoch, at the mean adapter."""

    def __init__(self, splits: Splits, tokenizer: Any) -> None:
        self.parts = {"held_out": splits.held_out, "scored": splits.scored}
        self.tokenizer = tokenizer
        self.rows: list[Row] = []

    def on_epoch_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        joint = rest["model"].joint
        row: Row = {"epoch": round(state.epoch)}
        for name, data in self.parts.items():
            ready = prepare(data, joint.base, joint.task, self.tokenizer)
            row[name] = scores(predict(joint, ready, draw_factors(joint, 0)))
        self.rows.append(row)


def fit_peft(job: Job, network: Any, tokenizer: Any, splits: Splits, place: Place) -> Fitted:
    """PEFT's MonteCLoRA with PEFT's own defaults and its own loss; rank, scaling and layers as
    pyrolora's. It predicts at the mean: PEFT keeps no posterior."""

    class PEFTTrainer(MontecloraTrainerMixin, Trainer):
        pass

    def tokens(data: Any) -> Any:
        texts = TASKS[job.task].columns
        ready = data.map(
            lambda rows: tokenizer(*(rows[name] for name in texts), truncation=True), batched=True
        )
        kept = {"input_ids", "attention_mask", "token_type_ids", "label"}
        return ready.remove_columns([name for name in ready.column_names if name not in kept])

    with_adapter = peft.get_peft_model(
        network,
        peft.LoraConfig(
            task_type="SEQ_CLS",
            r=ADAPTER.r,
            lora_alpha=ADAPTER.lora_alpha,
            target_modules=list(ADAPTER.target_modules),
            monteclora_config=peft.MontecloraConfig(**job.options),
        ),
    )
    args = arguments(job, place)
    args.remove_unused_columns = True
    trainer = PEFTTrainer(
        model=with_adapter,
        args=args,
        train_dataset=tokens(splits.train),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()

    def probabilities(data: Any, draws: int) -> Prediction:
        output = trainer.predict(tokens(data))
        log_probs = torch.as_tensor(output.predictions).float().log_softmax(-1)
        if output.label_ids is None:
            return ClassPrediction(None, None, log_probs.exp()[None])
        targets = torch.as_tensor(output.label_ids)
        picked = log_probs.gather(1, targets[:, None]).mT
        return ClassPrediction(targets, picked, log_probs.exp()[None])

    return Fitted(probabilities)


# Scores -----------------------------------------------------------------------------------------


def scores(prediction: Prediction) -> dict[str, float]:
    """pyrolora's metrics, and the tasks' own: Matthews' correlation, Pearson's."""
    results = evaluate(prediction)
    assert prediction.targets is not None
    if isinstance(prediction, ClassPrediction):
        classes = prediction.probs.shape[-1]
        correlation = multiclass_matthews_corrcoef(
            prediction.predicted, prediction.targets, classes
        )
        results["mcc"] = float(correlation)
    elif isinstance(prediction, RegressionPrediction):
        results["pearson"] = float(pearsonr(prediction.mean, prediction.targets).statistic)
    return results


def exact_ece(prediction: ClassPrediction, times: int = 200) -> float:
    """The ECE that chance leaves with so many examples: its mean over labels that are drawn from
    the predicted probabilities, which then are exact."""
    law = torch.distributions.Categorical(prediction.probs.double())
    with seeded(0):
        labels = law.sample((times,))
    return fmean(calibration_error(prediction.probs, drawn) for drawn in labels)


def fewer(prediction: Prediction) -> Iterator[tuple[int, Prediction]]:
    """The prediction from its first 1, 2, 4, ... draws."""
    assert prediction.log_likelihood is not None
    assert isinstance(prediction, ClassPrediction | RegressionPrediction)
    total, count = len(prediction.draws), 1
    while count < total:
        yield (
            count,
            dataclasses.replace(
                prediction,
                draws=prediction.draws[:count],
                log_likelihood=prediction.log_likelihood[:count],
            ),
        )
        count *= 2


def best_temperature(prediction: ClassPrediction) -> float:
    """T of the highest likelihood of softmax(log p / T), p the predictive probabilities."""

    def nll(log_temperature: float) -> float:
        return evaluate(tempered(prediction, math.exp(log_temperature)))["nll"]

    return math.exp(minimize_scalar(nll, bounds=(-3, 3), method="bounded").x)


def tempered(prediction: ClassPrediction, temperature: float) -> ClassPrediction:
    """The prediction with its probabilities at that temperature; one draw."""
    assert prediction.targets is not None
    log_probs = (prediction.probs.double().clamp(min=1e-12).log() / temperature).log_softmax(-1)
    picked = log_probs.gather(1, prediction.targets[:, None]).mT
    return ClassPrediction(prediction.targets, picked, log_probs.exp()[None])


# The store --------------------------------------------------------------------------------------


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
        settings = row["settings"]
        # An option of adapters that is newer than the row was at its default.
        settings["adapter"] = dataclasses.asdict(ADAPTER) | settings["adapter"]
        if settings["guide"] != PEFT:
            now = describe(guides.from_options(settings["guide"], {}))
            settings["options"] = _completed(settings["options"], now)
        _as_relative(row, settings["options"])
        rows[key(settings)] = row
    return rows


def _completed(options: Row, now: Row) -> Row:
    """The options of a row with those that are newer than it: as fits were before there was a
    choice, or else at their default."""
    found = dict(options)
    for name, default in now.items():
        if isinstance(default, dict):
            found[name] = _completed(options.get(name, {}), default)
        else:
            found.setdefault(name, BEFORE.get(name, default))
    return found


def _as_relative(row: Row, options: Row) -> None:
    """Rows from before the rate of scales followed that of the means had 0.01: where that is what
    the default is now, or where there are no scales, it is the default."""
    if "inner" in options:
        _as_relative(row, options["inner"])
    settings, fixed = row["settings"], options.get("scale_learning_rate")
    scaleless = settings["guide"] in POINTS and TASKS[settings["task"]].kind != "regression"
    size = row["results"].get("train_size", settings["examples"])
    steps = math.ceil(size / settings["batch"]) * settings["epochs"]
    cold = guides.MonteCLoRA(kl_weight=options.get("kl_weight", 1.0))
    default = cold.scale_rate(settings["learning_rate"], steps, size)
    same = math.isclose(fixed or 0.0, default)
    if fixed and (scaleless or same):
        options["scale_learning_rate"] = None


def append(path: Path, row: Row) -> None:
    """Add a row, on disk before this returns. It starts with the end of a line that a killed run
    may have left open; empty lines do not count."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("\n" + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


# Plan and work ----------------------------------------------------------------------------------


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


def _quiet() -> None:
    """Workers do not draw bars over one another."""
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


# The stages -------------------------------------------------------------------------------------

CHOOSING = ("cola", "mrpc", "rte", "books")
CONFIRMING = ("sst2", "trec", "stsb", "openbookqa", "arc_easy")
MORE = ("lowrank", "swag", "dropout", "full")
METHODS = (
    *("map", "montec", "flat", "flat+montec", "meanfield", "laplace", PEFT, "ensemble"),
    *MORE,
)
BEST = ("map", "montec", "flat", "flat+montec", "meanfield")
RATES = (3e-4, 1e-3, 3e-3)
BATCHES = (16, 32)


# Settings of which the defaults were one. ``AROUND_M`` is what the default was before the study.
AROUND_M = {"prior_mean": "learned", "init_covariance": 1.0}
# Noise that stops at half the default's scale, at the same price of M and from the same start.
NARROWER = {"sample_scale": 0.15, "kl_weight": 0.05, "init_covariance": 0.04}
CANDIDATES: tuple[tuple[str, Row], ...] = (
    ("map", {}),
    ("montec", {}),
    ("montec", {**AROUND_M, "sample_scale": 0.2, "kl_weight": 0.01}),
    ("montec", {"sample_scale": 0.1, "kl_weight": 0.05}),
    ("montec", NARROWER),
    ("montec", {"init_covariance": 1.0, "sample_scale": 0.05, "kl_weight": 0.01}),
    ("montec", {"init_covariance": 1.0, "sample_scale": 0.1, "kl_weight": 0.01}),
    ("montec", {"init_covariance": 1.0, "sample_scale": 0.1, "kl_weight": 0.1}),
    (
        "montec",
        {**AROUND_M, "component_prior": "hierarchical", "sample_scale": 0.1, "kl_weight": 0.01},
    ),
    ("meanfield", {}),
    ("flat", {"rho": 0.1}),
    ("flat+montec", {"rho": 0.1}),
)
# How far the noise grows, at the same price of M and from the same start: ε √V is 0.03 at first.
WIDTHS: tuple[tuple[str, Row], ...] = (
    ("map", {}),
    ("montec", {}),
    ("montec", NARROWER),
    ("montec", {"sample_scale": 0.2, "kl_weight": 0.1, "init_covariance": 0.0225}),
    ("montec", {"sample_scale": 0.1, "kl_weight": 0.02, "init_covariance": 0.1}),
)
CORNERS = ((3e-4, 32), (1e-3, 32), (3e-3, 16))  # the slowest fit, the usual one, the longest
# The other options, one at a time.
FORMS: tuple[tuple[str, Row], ...] = (
    ("montec", {"draws_per_batch": 8}),
    ("montec", {"latent": "AB"}),
    ("montec", {"latent": "B"}),
    ("montec", {"learn_sample_scale": True}),
    ("montec", {"component_prior": "hierarchical"}),
    ("montec", {"component_prior": "hierarchical", "learn_sample_scale": True}),
    ("montec", {"covariance": "full"}),
    ("montec", {"df_per_rank": 16}),
    ("montec", {"num_components": 1}),
    ("montec", {"num_components": 16}),
    ("montec", {"kl_warmup": 0.5}),
    ("meanfield", {}),
    ("meanfield", {"draws_per_batch": 8}),
    ("meanfield", {"latent": "AB"}),
    ("meanfield", {"prior_scale": 0.1}),
    ("meanfield", {"kl_weight": 0.05}),
    ("meanfield", {"kl_weight": 1.0}),
    ("flat", {}),
    ("flat", {"rho": 0.1}),
    ("flat", {"rho": 0.2}),
)
# Of fits of 500 steps and more: the rate of shorter ones, and half of it, so that scales travel no
# further than in 256 steps.
SCALE_RATES: tuple[Row, ...] = ({}, {"scale_learning_rate": 1e-2}, {"scale_learning_rate": 5e-3})
LONG = ((3e-3, 16, 8), (1e-3, 16, 8), (1e-3, 32, 16))


# Noise relative to the rows of A, whose widths are set by curvature at the full price of the KL.
RELATIVE = {
    "scale_updates": "curvature",
    "units": "row",
    "prior_mean": "learned",
    "kl_weight": 1.0,
}


def choose() -> Iterator[Job]:
    """What the defaults were chosen from."""
    for task, (guide, options) in itertools.product(CHOOSING, CANDIDATES):
        yield Job(task, 1000, guide, options)
    for (guide, options), (rate, batch) in itertools.product(WIDTHS, CORNERS):
        yield Job("books", 1000, guide, options, learning_rate=rate, batch=batch)
    for guide, options in FORMS:
        yield Job("books", 1000, guide, options)
    for options, (rate, batch, epochs) in itertools.product(SCALE_RATES, LONG):
        yield Job("books", 1000, "montec", options, epochs, rate, batch)


def one() -> Iterator[Job]:
    """Every method on four tasks, 200 and 1,000 examples."""
    for examples, method in itertools.product((200, 1000), METHODS):
        for task in ("cola", "sst2", "mrpc", "rte"):
            yield standard(task, examples, method)


def more() -> Iterator[Job]:
    """The methods that came later, on one task; LoRA is there already."""
    for examples, method in itertools.product((200, 1000), MORE):
        yield standard("sst2", examples, method)


def standard(task: str, examples: int, method: str) -> Job:
    """A method with its defaults, at the study's learning rate or at its own."""
    return Job(task, examples, method, learning_rate=OWN_RATE.get(method, Job.learning_rate))


def confirm() -> Iterator[Job]:
    """The tasks that no default was chosen on: LoRA at three rates and as a short run, whose best
    epoch is the rival; the default montec at 3, 8 and 16 epochs."""
    for task in CONFIRMING:
        yield Job(task, 1000, "map")
        yield Job(task, 1000, "montec")
    for task in CONFIRMING:
        for rate in RATES:
            yield Job(task, 1000, "map", learning_rate=rate)
        yield Job(task, 1000, "map", epochs=3)
        for epochs in (3, 16):
            yield Job(task, 1000, "montec", epochs=epochs)
        yield Job(task, 1000, "map", epochs=16)
    for seed, task, method in itertools.product((1, 2), CONFIRMING, ("map", "montec")):
        yield Job(task, 1000, method, seed=seed)
    for seed, task, method in itertools.product((1, 2), ("trec", "sst2"), ("map", "montec")):
        for epochs in (3, 16):
            yield Job(task, 1000, method, epochs=epochs, seed=seed)


def grid() -> Iterator[Job]:
    """Sensitivity to learning rate and batch size, on two tasks, and on one with few examples."""
    cells = [*itertools.product(RATES, BATCHES)]
    for methods in (BEST[:2], BEST[2:4]):
        for (task, examples), method in itertools.product(
            (("trec", 1000), ("sst2", 1000), ("sst2", 200)), methods
        ):
            for rate, batch in cells:
                yield Job(task, examples, method, learning_rate=rate, batch=batch)
    for seed, task, method in itertools.product((1, 2), ("trec", "sst2"), BEST[:2]):
        for rate, batch in cells:
            yield Job(task, 1000, method, learning_rate=rate, batch=batch, seed=seed)


def two() -> Iterator[Job]:
    """LoRA and the best four with three seeds on all tasks; all of MRPC and RTE."""
    for seed, task, method in itertools.product(range(3), TASKS, BEST):
        if not (method == "flat" and TASKS[task].kind == "regression"):
            yield Job(task, 1000, method, seed=seed)
    for task, method in itertools.product(("mrpc", "rte"), BEST):
        yield Job(task, 0, method)


def narrower() -> Iterator[Job]:
    """The runner-up, other rates of scales in long fits, and another way to tune the prior of
    laplace, on tasks that chose nothing."""
    for job in itertools.chain(confirm(), grid()):
        if job.guide == "montec":
            yield dataclasses.replace(job, options=NARROWER)
    for task, options in itertools.product(("trec", "sst2"), SCALE_RATES):
        for rate, batch, epochs in LONG:
            yield Job(task, 1000, "montec", options, epochs, rate, batch)
    for task in ("trec", "sst2"):
        yield Job(task, 1000, "laplace", {"tune": "marginal_likelihood"})


def dual() -> Iterator[Job]:
    """Laplace with the full curvature and the prior's precision by evidence, beside LoRA: as many
    examples as its kernel is soon made for, and all of its draws, which cost little."""
    options = {"curvature": "full", "tune": "marginal_likelihood"}
    for task, examples in (("sst2", 400), ("cola", 400), ("trec", 400), ("books", 200)):
        yield Job(task, examples, "laplace", options, draws=32)
        yield Job(task, examples, "map")


def relative() -> Iterator[Job]:
    """montec with noise relative to the rows of A, by curvature, on the tasks that choose."""
    for task, scale in itertools.product(CHOOSING, (3.0, 6.0)):
        yield Job(task, 1000, "montec", {**RELATIVE, "sample_scale": scale})
    for scale, (rate, batch) in itertools.product((3.0, 6.0), CORNERS):
        options = {**RELATIVE, "sample_scale": scale}
        yield Job("books", 1000, "montec", options, learning_rate=rate, batch=batch)


STAGES: dict[str, Callable[[], Iterator[Job]]] = {
    "choose": choose,
    "confirm": confirm,
    "one": one,
    "more": more,
    "grid": grid,
    "two": two,
    "narrower": narrower,
    "dual": dual,
    "relative": relative,
}


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
