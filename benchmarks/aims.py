"""What was aimed at in speed and memory, and what the saved results say of it.

Reads what `step_time.py`, `memory.py`, `predict_time.py` and `fit_time.py` have written, prints the
table, and makes the one in NOTES.md anew.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from common import RESULTS, markdown
from contestants import LORA, PEFT_MONTEC
from fit_time import LORA as LORA_FIT
from networks import ALL_LINEAR

NOTES = Path("benchmarks/NOTES.md")
BLOCK = re.compile(r"(<!-- table: aims -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Aim:
    """A figure, at most how large it is to be on a processor and on an accelerator, and its values
    by case."""

    what: str
    on_cpu: float
    on_gpu: float
    values: dict[str, float]

    def row(self, on_cpu: bool) -> dict[str, Any]:
        limit = self.on_cpu if on_cpu else self.on_gpu
        worst = max(self.values.values())
        return {
            "what": self.what,
            "at_most": limit,
            "worst": worst,
            "verdict": "reached" if worst <= limit else "not reached",
            "by_case": ", ".join(f"{name} {value:.2f}" for name, value in self.values.items()),
        }


def aims(steps: Any, memory: Any, predict: Any, fit: Any) -> Iterator[Aim]:
    def ratio(own: str, other: str, wide: bool | None = None) -> dict[str, float]:
        """The median over rounds of a step's time to another's of the same round; of all cases, or
        of those with adapters on all linear layers, or on query, key and value."""
        return {
            run["case"]: statistics.median(
                a / b
                for a, b in zip(run["milliseconds"][own], run["milliseconds"][other], strict=True)
            )
            for run in steps["runs"]
            if wide is None or run["case"].endswith(ALL_LINEAR) == wide
        }

    def peak(own: str, other: str) -> dict[str, float]:
        found = {}
        for run in memory["runs"]:
            peaks = {row["contestant"]: row["peak_mb"] for row in run["peaks"]}
            found[run["case"]] = peaks[own] / peaks[other]
        return found

    def alone(guide: str) -> dict[str, float]:
        narrow = min(row["entries_of_A"] for row in steps["pyro"])
        depth = min(row["adapters"] for row in steps["pyro"])
        return {
            f"{row['adapters']} adapters": row["ms"]
            for row in steps["pyro"]
            if row["guide"] == guide and row["entries_of_A"] * depth == narrow * row["adapters"]
        }

    def whole(own: str) -> dict[str, float]:
        pairs = zip(fit["seconds"][own], fit["seconds"][LORA_FIT], strict=True)
        return {f"{fit['arguments']['steps']} steps": statistics.median(a / b for a, b in pairs)}

    yield Aim("`map` step, to PEFT LoRA's", 0.98, 0.98, ratio("pyrolora map", LORA))
    yield Aim("`montec` step, to PEFT LoRA's", 1.0, 1.05, ratio("pyrolora montec", LORA))
    own_kind = ratio("pyrolora montec", PEFT_MONTEC)
    yield Aim("`montec` step, to PEFT MonteCLoRA's", 0.88, 0.88, own_kind)
    flat = "`flat` step, to PEFT LoRA's: "
    yield Aim(f"{flat}query, key, value", 1.1, 1.1, ratio("pyrolora flat", LORA, wide=False))
    yield Aim(f"{flat}all linear layers", 1.25, 1.1, ratio("pyrolora flat", LORA, wide=True))
    yield Aim("`meanfield` step, to PEFT LoRA's", 1.05, 1.05, ratio("pyrolora meanfield", LORA))
    yield Aim("peak of `montec`, to `map`'s", 1.01, 1.01, peak("pyrolora montec", "pyrolora map"))
    yield Aim("peak of `flat`, to PEFT LoRA's", 1.02, 1.02, peak("pyrolora flat", LORA))
    draws = {
        row["case"]: row["to plain network"]
        for row in predict["times"]
        if row["contestant"] == "predict"
    }
    yield Aim("`predict`, 16 draws, to 16 plain passes", 1.0, 0.35, draws)
    yield Aim("whole fit of `map`, to PEFT and Trainer", 1.0, 1.0, whole("pyrolora map"))
    for guide in ("map", "meanfield", "montec"):
        yield Aim(f"`{guide}` step without the network, ms, narrow", 1.5, 1.5, alone(guide))
    medians = {name: statistics.median(values) for name, values in fit["seconds"].items()}
    beyond = medians["import torch, pyro, pyrolora"] - medians["import torch, pyro"]
    yield Aim("import beyond torch and pyro, s", 0.3, 0.3, {"pyrolora": beyond})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="the end of the results' file names")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--notes", type=Path, default=NOTES)
    args = parser.parse_args(argv)
    names = ("step_time", "memory", "predict_time", "fit_time")
    found = [json.loads((args.results / f"{n}-{args.device}.json").read_text()) for n in names]
    frame = pd.DataFrame([aim.row(args.device == "cpu") for aim in aims(*found)])
    table = markdown(frame, digits=3)
    print(table)
    text = args.notes.read_text(encoding="utf-8")
    if len(BLOCK.findall(text)) != 1:
        raise SystemExit(f"{args.notes}: expected one block <!-- table: aims --> ... <!-- end -->")
    args.notes.write_text(BLOCK.sub(rf"\1\n{table}\n\2", text), encoding="utf-8")


if __name__ == "__main__":
    main()
