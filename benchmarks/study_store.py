"""The rows of the study on disk: settings, and what came of them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path

from study_jobs import ADAPTER, PEFT, POINTS, Row, describe
from tasks import (
    TASKS,
)

from pyrolora import guides

STORE = "study.jsonl"
# What fits did before an option gave the choice.
BEFORE = {
    "scale_updates": "gradient",
    "units": "one",
    "prior_mean": "zero",
    "hold_back": 0.0,
    "curvature": "kronecker",
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
