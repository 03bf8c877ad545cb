"""The stages of the study: which jobs answer which question."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from study_jobs import FORMER, OWN_RATE, PEFT, Job, Row
from tasks import (
    TASKS,
)

CHOOSING = ("cola", "mrpc", "rte", "books")
CONFIRMING = (
    *("sst2", "trec", "stsb", "openbookqa", "arc_easy"),
    *("trec_fine", "plays", "arc_challenge"),
)
MORE = ("lowrank", "swag", "dropout", "full")
METHODS = (
    *("map", "montec", "flat", "flat+montec", "meanfield", "laplace", PEFT, "ensemble"),
    *MORE,
)
BEST = ("map", "montec", "flat", "flat+montec", "meanfield")
RATES = (3e-4, 1e-3, 3e-3)
BATCHES = (16, 32)


def former(guide: str = "montec", **options: Any) -> tuple[str, Row]:
    """A guide with its former defaults, but for ``options``."""
    return guide, {**FORMER[guide], **options}


# Settings of which the former defaults were one. ``AROUND_M`` came before the study.
AROUND_M = {"prior_mean": "learned", "init_covariance": 1.0}
# Noise that stops at half the former scale, at the same price of M and from the same start.
NARROWER = {"sample_scale": 0.15, "kl_weight": 0.05, "init_covariance": 0.04}
CANDIDATES: tuple[tuple[str, Row], ...] = (
    ("map", {}),
    ("montec", {}),
    former(),
    former(**AROUND_M, sample_scale=0.2, kl_weight=0.01),
    former(sample_scale=0.1, kl_weight=0.05),
    former(**NARROWER),
    former(init_covariance=1.0, sample_scale=0.05, kl_weight=0.01),
    former(init_covariance=1.0, sample_scale=0.1, kl_weight=0.01),
    former(init_covariance=1.0, sample_scale=0.1, kl_weight=0.1),
    former(**AROUND_M, component_prior="hierarchical", sample_scale=0.1, kl_weight=0.01),
    ("meanfield", {}),
    ("flat", {"rho": 0.1}),
    former("flat+montec", rho=0.1),
)
# How far the noise grows, at the same price of M and from the same start: ε √V is 0.03 at first.
WIDTHS: tuple[tuple[str, Row], ...] = (
    ("map", {}),
    ("montec", {}),
    former(),
    former(**NARROWER),
    former(sample_scale=0.2, kl_weight=0.1, init_covariance=0.0225),
    former(sample_scale=0.1, kl_weight=0.02, init_covariance=0.1),
)
CORNERS = ((3e-4, 32), (1e-3, 32), (3e-3, 16))  # the slowest fit, the usual one, the longest
# The other options, one at a time.
FORMS: tuple[tuple[str, Row], ...] = (
    former(draws_per_batch=8),
    former(latent="AB"),
    former(latent="B"),
    former(learn_sample_scale=True),
    former(component_prior="hierarchical"),
    former(component_prior="hierarchical", learn_sample_scale=True),
    former(covariance="full"),
    former(df_per_rank=16),
    former(num_components=1),
    former(num_components=16),
    former(kl_warmup=0.5),
    former("meanfield"),
    former("meanfield", draws_per_batch=8),
    former("meanfield", latent="AB"),
    former("meanfield", prior_scale=0.1),
    former("meanfield", kl_weight=0.05),
    former("meanfield", kl_weight=1.0),
    ("flat", {}),
    ("flat", {"rho": 0.1}),
    ("flat", {"rho": 0.2}),
)
# Of fits of 500 steps and more: the rate of shorter ones, and half of it, so that scales travel no
# further than in 256 steps.
SCALE_RATES: tuple[Row, ...] = ({}, {"scale_learning_rate": 1e-2}, {"scale_learning_rate": 5e-3})
LONG = ((3e-3, 16, 8), (1e-3, 16, 8), (1e-3, 32, 16))


# Noise relative to the rows of A, whose widths are set by curvature, of a fixed scale.
RELATIVE = {"init_covariance": 0.01, "hold_back": 0.0}


def choose() -> Iterator[Job]:
    """What the defaults were chosen from."""
    for task, (guide, options) in itertools.product(CHOOSING, CANDIDATES):
        yield Job(task, 1000, guide, options)
    for (guide, options), (rate, batch) in itertools.product(WIDTHS, CORNERS):
        yield Job("books", 1000, guide, options, learning_rate=rate, batch=batch)
    for guide, options in FORMS:
        yield Job("books", 1000, guide, options)
    for options, (rate, batch, epochs) in itertools.product(SCALE_RATES, LONG):
        yield Job("books", 1000, *former(**options), epochs, rate, batch)


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
            yield dataclasses.replace(job, options=former(**NARROWER)[1])
    for task, options in itertools.product(("trec", "sst2"), SCALE_RATES):
        for rate, batch, epochs in LONG:
            yield Job(task, 1000, *former(**options), epochs, rate, batch)
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
