"""The tables and pictures of docs/evidence.md, from the rows that `study.py` stored.

In the document, what stands between ``<!-- table: NAME -->`` (or ``<!-- picture: NAME -->``) and
``<!-- end -->`` is made anew; the prose around it stays. All numbers come from rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import study_stages
from common import RESULTS, markdown
from matplotlib.figure import Figure
from study_jobs import FORMER, OWN_RATE, PEFT, Job, Row, describe
from study_stages import BATCHES, CHOOSING, CONFIRMING, METHODS, RATES
from study_store import STORE, read_store
from tasks import TASKS

from pyrolora import guides

Table = pd.DataFrame

EXAMPLES = 1000
EPOCHS = (3, 8, 16)
GRID = len(RATES) * len(BATCHES)
UNIT = ["task", "examples", "seed", "data", "model", "dtype"]  # equal data, equal network
RECIPE = ["epochs", "learning_rate", "batch"]
STANDARD = pd.Series({name: getattr(Job, name) for name in RECIPE})
COOLED = ["nll", "ece", "brier"]  # what a temperature changes
METRICS = [
    *("accuracy", *COOLED, "ece_exact", "error_auroc", "ood_auroc", "mcc", "rmse", "pearson"),
    *("ood_auroc_epistemic", "crps", "coverage", "held_out_nll", "fit_s", "predict_s"),
    *(f"{name}_ts" for name in COOLED),
]
ABOUT = ["hardware", "versions", "side_by_side"]
SETTINGS = [*UNIT, *RECIPE, "guide", "options", "changes", "draws"]
COLUMNS = [*SETTINGS, *METRICS, "curve", "by_draws", "scored_size", "error", *ABOUT]
BEST, WITH_T = "LoRA at its best", "LoRA with temperature"
FORMERLY = "formerly"  # what the defaults were before the present ones, and `changes` to them
MONTEC_BEFORE = f"montec, {FORMERLY}"
NAMES = {name: name for name in [*METHODS, MONTEC_BEFORE]}
NAMES |= {"map": "LoRA", PEFT: "MonteCLoRA of PEFT"}
ORDER = {name: place for place, name in enumerate([*TASKS, *METHODS, MONTEC_BEFORE])}
ROUNDING = 1e-5  # of differences in points: accuracies are stored from float32


# Rows -------------------------------------------------------------------------------------------


def read(paths: Iterable[Path]) -> Table:
    """The rows of several files; of equal settings the last counts."""
    stored: dict[str, Row] = {}
    for path in paths:
        if not path.is_file():
            raise SystemExit(f"there is no {path}; `python benchmarks/study.py` writes such a file")
        stored |= read_store(path)
    return frame_of(stored.values())


def frame_of(rows: Iterable[Row]) -> Table:
    """One line a fit: settings and results side by side, in the order of tasks and methods."""
    records = []
    for row in rows:
        settings = row["settings"]
        changed = {"changes": changes(settings["guide"], settings["options"])}
        records.append(
            {**{name: row[name] for name in ABOUT}, **settings, **row["results"], **changed}
        )
    frame = ordered(typed(records), "task", "examples", "guide", "seed")
    return frame.reset_index(drop=True)


def typed(records: list[Row]) -> Table:
    return pd.DataFrame(records, columns=COLUMNS).astype(dict.fromkeys(METRICS, float))


def ordered(table: Table, *by: str) -> Table:
    """Tasks and methods as the study has them."""
    return table.sort_values(
        list(by), key=lambda column: column.map(lambda x: ORDER.get(x, x)), kind="stable"
    )


@cache
def options_of(guide: str, former: bool = False) -> Row:
    """The defaults, the present or the former ones, as a row has them; PEFT's are its own."""
    own = FORMER[guide] if former else {}
    options = {} if guide == PEFT else describe(guides.from_options(guide, own))
    return dotted(json.loads(json.dumps(options)))


def dotted(options: Row, prefix: str = "") -> Row:
    """An inner guide's options as ``inner.NAME``."""
    flat: Row = {}
    for name, value in options.items():
        nested = isinstance(value, Mapping)
        flat |= dotted(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def changes(guide: str, options: Row) -> str:
    """How options differ from the present defaults, ``"kl_weight=1.0, inner.rho=0.1"``, or, where
    that is shorter, from the former ones, ``"formerly, kl_weight=1.0"``."""
    own = dotted(options)
    now = differences(own, options_of(guide))
    if now and guide in FORMER:
        then = [FORMERLY, *differences(own, options_of(guide, former=True))]
        now = min(now, then, key=len)
    return ", ".join(now)


def differences(own: Row, default: Row) -> list[str]:
    """``"NAME=VALUE"`` of each option that differs; one newer than the row is ``absent``."""
    both = {name: (own.get(name, "absent"), default.get(name, "absent")) for name in default | own}
    return [f"{name}={value}" for name, (value, usual) in both.items() if value != usual]


# Selections -------------------------------------------------------------------------------------


def defaults_only(frame: Table, changes: str = "") -> Table:
    """Fits with the present defaults; of those that differ in their draws alone, the most draws."""
    rows = frame[frame["changes"] == changes].sort_values("draws", kind="stable")
    return rows.drop_duplicates(["guide", *UNIT, *RECIPE], keep="last").sort_index()


def standard(frame: Table, changes: str = "") -> Table:
    """The defaults, trained with the defaults of a job, or at the method's own rate."""
    rows = defaults_only(frame, changes)
    recipe = rows[RECIPE].assign(
        learning_rate=rows["learning_rate"].where(
            rows["learning_rate"] != rows["guide"].map(OWN_RATE),
            STANDARD["learning_rate"],
        )
    )
    return rows[(recipe == STANDARD).all(axis=1)]


def now_and_before(frame: Table) -> Table:
    """Fits with the present defaults, and those of montec with the former ones, as one more."""
    before = defaults_only(frame, FORMERLY)
    before = before[before["guide"] == "montec"].assign(guide=MONTEC_BEFORE)
    return pd.concat([defaults_only(frame), before])


def plain_lora(frame: Table) -> Table:
    """LoRA without prior, whatever its training."""
    prior = frame["options"].map(lambda options: options.get("prior_scale")).notna()
    return frame[(frame["guide"] == "map") & ~prior]


def equal_epochs(frame: Table) -> Table:
    return standard(plain_lora(frame))


def best_lora(frame: Table) -> Table:
    """LoRA stopped in time: for each task, number of examples and seed, of all rates, batches and
    epochs, on the way and at the end, the one of the lowest held-out NLL, with its scores.

    Seeds for which LoRA was fitted less often than for others are left out: a smaller search is a
    weaker rival.
    """
    rows = plain_lora(frame)
    fits = rows.groupby(UNIT)["seed"].transform("size")
    most = fits.groupby([rows["task"], rows["examples"]]).transform("max")
    points = [
        {**row, **point}
        for row in rows[fits == most].to_dict("records")
        for point in [{}, *map(at_point, row["curve"])]
    ]
    found = typed(points).dropna(subset="held_out_nll").reset_index(drop=True)
    return found.loc[found.groupby(UNIT)["held_out_nll"].idxmin()]


def at_point(point: Row) -> Row:
    """What changes in a row that ends there; what the curve did not measure is unknown."""
    found = {**point["scored"], "held_out_nll": point["held_out"]["nll"]}
    return {**dict.fromkeys(METRICS, math.nan), **found, "epochs": point["epoch"]}


def cooled(frame: Table) -> Table:
    """LoRA at equal epochs, its probabilities at the temperature of the lowest held-out NLL."""
    rows = equal_epochs(frame)
    rows = rows.assign(**{name: rows[f"{name}_ts"] for name in COOLED})
    return rows.assign(error_auroc=math.nan, ood_auroc=math.nan).dropna(subset="nll")


RIVALS = {NAMES["map"]: equal_epochs, BEST: best_lora, WITH_T: cooled}


def with_rivals(frame: Table) -> Table:
    """Every method with its defaults on 1,000 examples and LoRA's two other forms, by name."""
    frame = frame[frame["examples"] == EXAMPLES]
    rows = standard(frame)
    parts = [rows.assign(method=rows["guide"].map(NAMES))]
    parts += [RIVALS[name](frame).assign(method=name) for name in (BEST, WITH_T)]
    before = standard(frame, FORMERLY)
    parts.append(before[before["guide"] == "montec"].assign(method=MONTEC_BEFORE))
    return ordered(pd.concat([part for part in parts if len(part)] or parts), "task")


def grid_cells(frame: Table) -> Table:
    """The fits of the stage `grid`."""
    keys = ["task", "examples", "guide", "seed", *RECIPE]
    cells = pd.DataFrame([dataclasses.asdict(job) for job in study_stages.grid()])[keys]
    before = cells[cells["guide"] == "montec"].assign(guide=MONTEC_BEFORE)
    cells = pd.concat([cells, before]).drop_duplicates()
    return now_and_before(frame).merge(cells, on=keys)


def over_epochs(frame: Table) -> Table:
    """LoRA and montec at 3, 8 and 16 epochs, 1,000 examples, of the seeds that have all three."""
    fixed = {**STANDARD.drop("epochs"), "examples": EXAMPLES}
    rows = now_and_before(frame)
    rows = rows[(rows[list(fixed)] == pd.Series(fixed)).all(axis=1) & rows["epochs"].isin(EPOCHS)]
    there = rows.groupby(["guide", *UNIT])["epochs"].transform("nunique")
    return rows[(there == len(EPOCHS)) & rows["guide"].isin(["map", "montec", MONTEC_BEFORE])]


# Comparisons ------------------------------------------------------------------------------------


def geometric(ratios: pd.Series) -> float:
    return float(np.exp(np.log(ratios).mean()))


def compare(methods: Table, rival: Table) -> Table:
    """By method and task, against the rival of the same seed: ratios of NLL and ECE (geometric
    means over seeds) and the difference of accuracies in points (mean)."""
    both = methods.merge(rival, on=UNIT, suffixes=("", "_rival"))
    groups = both.assign(
        nll=both["nll"] / both["nll_rival"],
        ece=both["ece"] / both["ece_rival"],
        points=100 * (both["accuracy"] - both["accuracy_rival"]),
    ).groupby(["guide", "task"], sort=False)
    found = groups.agg({"nll": geometric, "ece": geometric, "points": "mean", "seed": "nunique"})
    return found.set_axis(["NLL ratio", "ECE ratio", "points", "seeds"], axis=1)


def with_classes(frame: Table) -> Table:
    """Fits to 1,000 examples whose predictions are probabilities of classes."""
    return frame[(frame["examples"] == EXAMPLES) & frame["ece"].notna()]


def measures(frame: Table) -> Table:
    """Per confirming task, what the targets speak of: the default montec against LoRA."""
    frame = frame[frame["task"].isin(CONFIRMING)]
    fits = with_classes(frame)
    montec = standard(fits[fits["guide"] == "montec"])
    ratios = compare(montec, equal_epochs(fits)).droplevel("guide")
    to_best = compare(montec, best_lora(fits)).droplevel("guide").add_suffix(" to best")
    runs = over_epochs(fits).groupby(["guide", *UNIT])["nll"]
    growth = (runs.max() / runs.min()).groupby(["task", "guide"]).mean().unstack("guide")
    cells = grid_cells(frame[frame["examples"] == EXAMPLES])
    cells = cells.groupby([*UNIT, *RECIPE, "guide"])["accuracy"].first()
    cells = 100 * cells.unstack("guide").reindex(columns=["map", "montec"]).dropna()
    whole = cells.groupby(UNIT)["map"].transform("size") == GRID
    by_seed = cells[whole].groupby(UNIT)
    spread, median = by_seed.max() - by_seed.min(), by_seed.median()
    # Of accuracy and confidence, which options hardly change: any fit of montec tells it.
    usual = fits[(fits["guide"] == "montec") & (fits[RECIPE] == STANDARD).all(axis=1)]
    chance = usual.groupby("task")["ece_exact"].mean().rename("ECE by chance")
    own = {"growth": growth}
    own |= {"spread": spread.groupby("task").mean(), "median": median.groupby("task").mean()}
    parts = [
        part.reindex(columns=["map", "montec"]).rename(columns=NAMES).add_prefix(f"{name} ")
        for name, part in own.items()
    ]
    found = pd.concat([ratios, to_best, chance, *parts], axis=1)
    found = found.astype({"seeds": "Int64", "seeds to best": "Int64"})
    return ordered(found.rename_axis("task").reset_index(), "task")


# Tables -----------------------------------------------------------------------------------------

Made = dict[str, tuple[Callable[[Table], Any], str]]
TABLES: Made = {}
PICTURES: Made = {}


def entry(known: Made, name: str, stages: str) -> Callable[[Any], Any]:
    """Register; ``stages`` are those of `study.py` whose rows it needs."""
    empty = (
        "_There are no rows for this yet; `python benchmarks/study.py --model FOLDER --data FOLDER "
        f"--minutes 60 --stages {stages}` makes them._"
    )

    def register(make: Any) -> Any:
        known[name] = (make, empty)
        return make

    return register


def summary(rows: Table, by: list[str]) -> Table:
    """Means over seeds. The standard error of an accuracy is that of the scored examples, which
    are the same for all seeds: more seeds do not narrow it. ``score`` is the one that the task is
    known by, where that is another."""
    if rows.empty:
        return rows
    scores = [row[TASKS[row["task"]].score] for row in rows.to_dict("records")]
    rows = rows.assign(score=scores, seconds=rows["fit_s"] + rows["predict_s"])
    shown = ["nll", "ece", "brier", "error_auroc", "ood_auroc", "seconds"]
    groups = rows.groupby(by, sort=False)
    means = groups[["score", "accuracy", *shown, "scored_size"]].mean()
    means = means.assign(seeds=groups["seed"].nunique()).reset_index()
    error = np.sqrt(means["accuracy"] * (1 - means["accuracy"]) / means["scored_size"])
    means["accuracy"] = means["accuracy"].map("{:.3f} ± ".format) + error.map("{:.3f}".format)
    means["accuracy"] = means["accuracy"].where(error.notna(), "")
    names = means["task"].map(lambda task: TASKS[task].score)
    means["score"] = names + means["score"].map(" {:.3f}".format)
    means["score"] = means["score"].where(names != "accuracy", "")
    means["seconds"] = means["seconds"].round().astype("Int64")
    return readable(means[[*by, "score", "accuracy", *shown, "seeds"]])


def seed_means(rows: Table, by: list[str], names: Mapping[str, str]) -> Table:
    """Means over seeds of the columns that have names, under these."""
    groups = rows.groupby(by, sort=False)
    means = groups[list(names)].mean().assign(seeds=groups["seed"].nunique())
    return readable(means.reset_index().rename(columns=names))


def readable(table: Table) -> Table:
    """Names of methods, "all" for 0 examples, rates in full."""
    table = table.rename(columns={"guide": "method", "changes": "options"})
    write = {
        "method": lambda name: NAMES.get(name, name),
        "examples": lambda size: str(size or "all"),
        "learning_rate": "{:g}".format,
    }
    return table.assign(**{name: table[name].map(f) for name, f in write.items() if name in table})


@entry(TABLES, "made-with", "one")
def made_with(frame: Table) -> Table:
    """Which machines and versions, how many fits."""

    def listed(part: Mapping[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in part.items() if value is not None)

    rows = frame.assign(**{name: frame[name].map(listed) for name in ("hardware", "versions")})
    sizes = rows.groupby([*ABOUT, "dtype"], sort=False, dropna=False)["scored_size"]
    names = {"size": "fits", "min": "scored, least", "max": "scored, most"}
    found = sizes.agg(list(names)).astype("Int64").rename(columns=names)
    return found.reset_index().rename(columns={"side_by_side": "side by side"})


@entry(TABLES, "stage-one", "one")
def stage_one(frame: Table) -> Table:
    """Every method with its defaults."""
    return summary(standard(frame), ["task", "examples", "guide"])


@entry(TABLES, "outside", "one")
def outside(frame: Table) -> Table:
    """How well the total uncertainty, its epistemic part and LoRA's entropy find other data."""
    measured = standard(frame).dropna(subset="ood_auroc_epistemic")
    lora = equal_epochs(frame)[[*UNIT, "ood_auroc", "error_auroc"]]
    both = measured.merge(lora, on=UNIT, suffixes=("", "_lora"))
    names = {
        "ood_auroc": "other data: entropy",
        "ood_auroc_epistemic": "epistemic part",
        "ood_auroc_lora": "LoRA's entropy",
        "error_auroc": "errors: entropy",
        "error_auroc_lora": "LoRA's entropy, errors",
    }
    return seed_means(both, ["task", "examples", "guide"], names)


@entry(TABLES, "ratios", "confirm one two")
def ratios(frame: Table) -> Table:
    """Every method against LoRA as it is, stopped in time, and with a temperature."""
    fits = with_classes(frame)
    parts = []
    for name, rival in RIVALS.items():
        before = standard(fits, FORMERLY).query("guide == 'montec'").assign(guide=MONTEC_BEFORE)
        by_method = compare(pd.concat([standard(fits), before]), rival(fits)).groupby("guide")
        how = {"NLL ratio": geometric, "ECE ratio": geometric, "points": "mean"}
        means = by_method.agg(how).assign(tasks=by_method.size()).reset_index()
        means.insert(0, "to", name)
        parts.append(ordered(means[means["guide"].map(NAMES) != name], "guide"))
    return readable(pd.concat(parts))


TARGETS: tuple[tuple[str, Callable[[Table], pd.Series], Any, float, str | None], ...] = (
    ("NLL, ratio to LoRA's", lambda m: m["NLL ratio"], geometric, 0.75, None),
    ("ECE, ratio to LoRA's", lambda m: m["ECE ratio"], geometric, 0.45, None),
    ("NLL, ratio to best LoRA's", lambda m: m["NLL ratio to best"], geometric, 0.93, None),
    ("ECE, ratio to best LoRA's", lambda m: m["ECE ratio to best"], geometric, 1.0, None),
    ("accuracy, points below LoRA's, worst task", lambda m: -m["points"], max, 0.3, None),
    (
        "NLL at 3, 8, 16 epochs, highest to lowest, worst task",
        *(lambda m: m["growth montec"], max, 1.1, "growth LoRA"),
    ),
    (
        "accuracy over the grid, its spread to LoRA's, worst task",
        *(lambda m: m["spread montec"] / m["spread LoRA"], max, 0.5, None),
    ),
    (
        "accuracy over the grid, its median, points below LoRA's, worst task",
        *(lambda m: m["median LoRA"] - m["median montec"], max, 0.0, None),
    ),
)


@entry(TABLES, "targets", "confirm grid")
def targets(frame: Table) -> Table:
    """What was aimed at, and what came of it: the default montec on the confirming tasks."""
    found = measures(frame).set_index("task")
    lines = []
    for text, measure, combine, bound, lora in TARGETS if len(found) else ():
        values = measure(found).dropna()
        measured = combine(values) if len(values) else math.nan
        verdict = "reached" if measured <= bound + ROUNDING else "not reached"
        lines.append(
            {
                "target": text,
                "at most": bound,
                "measured": measured,
                "LoRA's own": combine(found[lora].dropna(), default=math.nan) if lora else math.nan,
                "tasks": ", ".join(values.index),
                "verdict": verdict if len(values) else "not measured",
            }
        )
    return pd.DataFrame(lines)


@entry(TABLES, "targets-by-task", "confirm grid")
def targets_by_task(frame: Table) -> Table:
    """The same, task by task."""
    return measures(frame)


@entry(TABLES, "regression", "confirm two")
def regression(frame: Table) -> Table:
    """Differences of NLL: a ratio of those of Gaussians means nothing."""
    frame = frame[frame["rmse"].notna()]
    lora = equal_epochs(frame).set_index(UNIT)["nll"].rename("lora")
    rows = with_rivals(frame).join(lora, on=UNIT)
    rows["NLL minus LoRA's"] = rows["nll"] - rows["lora"]
    groups = rows.groupby(["task", "method"], sort=False)
    shown = ["rmse", "pearson", "nll", "NLL minus LoRA's", "crps", "coverage"]
    return groups[shown].mean().assign(seeds=groups["seed"].nunique()).reset_index()


@entry(TABLES, "grid", "grid")
def grid(frame: Table) -> Table:
    """Sensitivity to learning rate and batch size: means over the seeds with the most cells."""
    groups = grid_cells(frame).groupby([*UNIT, "guide"], sort=False)
    by_seed = pd.DataFrame({"cells": groups.size()})
    for name in ("accuracy", "nll"):
        by_seed[f"{name}, median"] = groups[name].median()
        by_seed[f"{name}, spread"] = groups[name].max() - groups[name].min()
    by = ["task", "examples", "guide"]
    by_seed = by_seed[by_seed["cells"] == by_seed.groupby(by)["cells"].transform("max")]
    table = by_seed.groupby(by, sort=False)
    return readable(table.mean().assign(seeds=table.size()).astype({"cells": int}).reset_index())


@entry(TABLES, "recipes", "confirm grid")
def recipes(frame: Table) -> Table:
    """The default montec beside LoRA of the same seeds, at each length, rate and batch size."""
    fits = defaults_only(frame[frame["ece"].notna()])
    keys = [*UNIT, *RECIPE]
    lora = plain_lora(fits)[[*keys, "accuracy", *COOLED, "nll_ts"]]
    both = fits[fits["guide"] == "montec"].merge(lora, on=keys, suffixes=("", "_lora"))
    both = both.assign(points=100 * (both["accuracy"] - both["accuracy_lora"]))
    names = {
        "accuracy_lora": "LoRA: accuracy",
        "nll_lora": "nll",
        "ece_lora": "ece",
        "nll_ts_lora": "nll, temperature",
        "accuracy": "montec: accuracy",
        "nll": "nll of montec",
        "nll_ts": "nll of montec, temperature",
        "ece": "ece of montec",
        "points": "points",
    }
    return seed_means(both, ["task", "examples", *RECIPE], names)


@entry(TABLES, "epochs", "confirm")
def epochs(frame: Table) -> Table:
    """LoRA and montec, trained shorter and longer."""
    groups = over_epochs(frame).groupby(["task", "guide", "epochs"])
    table = groups[["nll", "ece", "accuracy"]].mean().unstack("epochs")
    table.columns = [f"{name}, {number} epochs" for name, number in table.columns]
    return readable(ordered(table.reset_index(), "task", "guide"))


@entry(TABLES, "rivals", "confirm one")
def rivals(frame: Table) -> Table:
    """montec beside what one would use instead."""
    table = summary(with_rivals(frame), ["task", "method"])
    return table[table["method"].isin([*RIVALS, NAMES[PEFT], "montec", MONTEC_BEFORE])]


@entry(TABLES, "candidates", "choose")
def candidates(frame: Table) -> Table:
    """All settings that were tried on the tasks that chose the defaults: of the defaults the fits
    to 1,000 examples, of other options all."""
    own = frame["guide"].isin([*METHODS]) & ~frame["guide"].isin(["map", PEFT, "ensemble"])
    tried = (frame["changes"] != "") | (frame["examples"] == EXAMPLES)
    lora = plain_lora(frame).drop_duplicates([*UNIT, *RECIPE])[[*UNIT, *RECIPE, "nll"]]
    rows = frame[own & tried & frame["task"].isin(CHOOSING)].merge(
        lora, on=[*UNIT, *RECIPE], how="left", suffixes=("", "_lora")
    )
    if rows.empty:
        return rows
    rows["changes"] = rows["changes"].replace("", "**the defaults**")
    rows["ratio"] = rows["nll"] / rows["nll_lora"]
    by = ["guide", "changes", "examples", *RECIPE]
    groups = rows.groupby([*by, "task"])
    texts = [groups[name].mean().map("{:.3f}".format) for name in ("nll", "ece", "accuracy")]
    wide = (texts[0] + " / " + texts[1] + " / " + texts[2]).unstack("task", fill_value="")
    wide = wide[[task for task in CHOOSING if task in wide]].add_suffix(": nll / ece / accuracy")
    ratio = groups["ratio"].agg(geometric).groupby(by)
    wide["NLL to LoRA's"], wide["tasks"] = ratio.agg(geometric), ratio.count()
    return readable(ordered(wide.reset_index(), "guide", "NLL to LoRA's"))


@entry(TABLES, "options", "confirm grid narrower")
def options(frame: Table) -> Table:
    """Other options on tasks that chose nothing, beside the defaults that they differ from."""
    fits = with_classes(frame)
    fits = fits[fits["task"].isin(CONFIRMING)]
    changed, same = fits["changes"].str.startswith(f"{FORMERLY},"), ["guide", *UNIT, *RECIPE]
    both = pd.concat(
        fits[rows & (fits["changes"] != default)].merge(
            fits[fits["changes"] == default],
            on=same,
            suffixes=("", " by default"),
            validate="many_to_one",
        )
        for rows, default in ((changed, FORMERLY), (~changed, ""))
    )
    groups = both.groupby(["guide", "changes", "task", *RECIPE], sort=False)
    shown = [
        f"{name}{whose}" for name in ("nll", "ece", "accuracy") for whose in ("", " by default")
    ]
    means = groups[shown].mean().assign(seeds=groups["seed"].nunique())
    return readable(ordered(means.reset_index(), "guide", "changes"))


@entry(TABLES, "draws", "confirm one")
def draws(frame: Table) -> Table:
    """NLL of the first 1, 2, 4, ... draws of a prediction relative to all of them; geometric means
    over the fits of a method with its defaults to 1,000 examples."""
    rows = standard(with_classes(frame)).dropna(subset="by_draws")
    rows = rows[rows["by_draws"].map(len) > 0]
    if rows.empty:
        return rows
    ratios = pd.DataFrame(
        [{int(n): few["nll"] for n, few in found.items()} for found in rows["by_draws"]],
        index=rows.index,
    ).div(rows["nll"], axis=0)
    by_method = ratios.groupby(rows["guide"])
    found = by_method.agg(geometric).add_suffix(" draws").assign(fits=by_method.size())
    return readable(ordered(found.reset_index(), "guide"))


@entry(TABLES, "failed", "one")
def failed(frame: Table) -> Table:
    """Of the rows that are errors: what did not end in a posterior."""
    shown = ["task", "examples", "guide", "changes", "epochs", "learning_rate", "seed", "error"]
    return readable(frame[shown].replace({"error": {r"\s+": " ", r"\|": r"\\|"}}, regex=True))


TABLES["failed"] = (failed, "_No fit failed._")


# Pictures ---------------------------------------------------------------------------------------

COLORS = {name: f"C{place}" for place, name in enumerate([*NAMES.values(), BEST, WITH_T])}


def panels(tasks: Iterable[str], label: str) -> tuple[Figure, dict[str, Any]]:
    """Axes by task, four in a row."""
    names = list(dict.fromkeys(tasks))
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(
        figsize=(3.2 * max(columns, 2), 2.7 * rows + 0.6), layout="constrained", dpi=120
    )
    grid = figure.subplots(rows, columns, squeeze=False)
    for axis in grid.flat[len(names) :]:
        axis.set_axis_off()
    for row in grid:
        row[0].set_ylabel(label)
    axes = dict(zip(names, grid.flat, strict=False))
    for name, axis in axes.items():
        axis.set_title(name)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def legend(figure: Figure, axes: Mapping[str, Any]) -> Figure:
    """One for all panels, below them."""
    shown: dict[str, Any] = {}
    for axis in axes.values():
        handles, labels = axis.get_legend_handles_labels()
        shown |= dict(zip(labels, handles, strict=True))
    names = [name for name in COLORS if name in shown]
    handles = [shown[name] for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False)
    return figure


def mark(axis: Any, x: Any, y: Any, name: str, form: str = "o") -> None:
    axis.plot(x, y, form, color=COLORS[name], label=name, alpha=0.8)


@entry(PICTURES, "epochs", "confirm")
def draw_epochs(frame: Table) -> Figure | None:
    """NLL over epochs: LoRA along its longest run, montec after runs of 3, 8 and 16"""
    ends = over_epochs(frame).query("guide == 'montec'").groupby(["task", "epochs"])["nll"].mean()
    runs = plain_lora(frame[frame["task"].isin(ends.index.get_level_values("task"))])
    runs = runs.query(f"examples == {EXAMPLES} and learning_rate == {STANDARD['learning_rate']}")
    runs = runs.sort_values(["epochs", "seed"], ascending=[False, True]).drop_duplicates("task")
    if runs.empty:
        return None
    figure, axes = panels(ordered(runs, "task")["task"], "NLL")
    for task, curve in zip(runs["task"], runs["curve"], strict=True):
        nll = [point["scored"]["nll"] for point in curve]
        mark(axes[task], [point["epoch"] for point in curve], nll, NAMES["map"], "-")
        mark(axes[task], ends[task].index, ends[task], "montec")
        axes[task].set_xlabel("epochs")
    return legend(figure, axes)


@entry(PICTURES, "grid", "grid")
def draw_grid(frame: Table) -> Figure | None:
    """Accuracy over learning rates and batch sizes, a dot each, by method"""
    cells = grid_cells(frame).dropna(subset="accuracy")
    if cells.empty:
        return None
    cells["panel"] = cells["task"] + ", " + cells["examples"].astype(str) + " examples"
    figure, axes = panels(cells["panel"], "accuracy")
    for (panel, guide), rows in cells.groupby(["panel", "guide"]):
        mark(axes[panel], np.full(len(rows), ORDER[guide]), rows["accuracy"], NAMES[guide])
        axes[panel].set_xticks([])
    return legend(figure, axes)


@entry(PICTURES, "scores", "confirm one")
def draw_scores(frame: Table) -> Figure | None:
    """NLL against accuracy (regression: against Pearson's correlation), by method"""
    rows = with_rivals(frame)
    rows["x"] = rows["accuracy"].fillna(rows["pearson"])
    means = rows.groupby(["task", "method"], sort=False)[["x", "nll"]].mean()
    if means.empty:
        return None
    figure, axes = panels(means.index.get_level_values("task"), "NLL")
    for (task, method), (x, nll) in means.iterrows():
        mark(axes[task], x, nll, method)
        axes[task].set_xlabel("Pearson" if TASKS[task].kind == "regression" else "accuracy")
    return legend(figure, axes)


# The document -----------------------------------------------------------------------------------

ENTRIES = {"table": TABLES, "picture": PICTURES}
MARKER = re.compile(r"<!-- (table|picture): *(\S+) -->")
PART = re.compile(MARKER.pattern + r".*?<!-- end -->", re.DOTALL)


def filled(text: str, frame: Table, doc: Path) -> str:
    """The document with its tables and pictures made anew; pictures are written beside it."""
    markers = MARKER.findall(text)
    for kind, name in markers:
        if name not in ENTRIES[kind]:
            raise SystemExit(
                f"{doc}: unknown {kind} {name!r}; known are {', '.join(ENTRIES[kind])}"
            )
    if len(markers) != len(PART.findall(text)):
        raise SystemExit(f"{doc}: a marker is followed by another one before its <!-- end -->")

    def replace(match: re.Match[str]) -> str:
        kind, name = match.groups()
        return f"<!-- {kind}: {name} -->\n\n{made(kind, name, frame, doc)}\n\n<!-- end -->"

    return PART.sub(replace, text)


def made(kind: str, name: str, frame: Table, doc: Path) -> str:
    """A table or the link to a picture in Markdown; without rows, what would make them."""
    make, empty = ENTRIES[kind][name]
    rows = frame[frame["error"].notna() == (name == "failed")]
    result = make(rows) if len(rows) else None
    if result is None or (kind == "table" and result.empty):
        return empty
    if kind == "picture":
        path = doc.with_name(f"{doc.stem}-{name}.png")
        result.savefig(path)
        return f"![{make.__doc__}]({path.name})"
    return re.sub(r"(?<=\|) (nan|<NA>)(?= \|)", "", markdown(result)).rstrip()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--rows", type=Path, nargs="+", default=[RESULTS / STORE], help="files of study.py")
    add("--doc", type=Path, default=Path("docs/evidence.md"), help="the text with the markers")
    args = parser.parse_args(argv)
    frame = read(args.rows)
    if not args.doc.is_file():
        raise SystemExit(f"there is no {args.doc}; it is a text with markers, see --help")
    args.doc.write_text(filled(args.doc.read_text("utf-8"), frame, args.doc), "utf-8")
    print(f"{args.doc} is filled from {len(frame)} rows")


if __name__ == "__main__":
    main()
