"""Does a Gaussian law of the task head help? The same fits with the head as a point and drawn.

A fit has the same means and adapters either way, so that each is scored twice, on the same draws of
the adapters: with the trained head, and with a head drawn beside each of them. Beside both, the
trained head with a temperature from 200 held-out examples.

    python benchmarks/head.py --model FOLDER --data FOLDER

writes ``benchmarks/results/head.json`` and ``head.md``; results that are there stay.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import pandas as pd
import torch
from common import (
    RESULTS,
    existing_folder,
    hardware,
    markdown,
    model_folder,
    save_json,
    show,
    versions,
)
from study_fits import best_temperature, tempered
from tasks import load_network, load_task
from transformers import AutoConfig

import pyrolora
from pyrolora.guides import as_guide
from pyrolora.predictive import ClassPrediction, draw_factors, evaluate, predict

TASKS = ("sst2", "trec", "cola", "books")
GUIDES = ("map", "montec")
SCORES = ("accuracy", "nll", "ece")
DRAWS = 10
NAME = "head"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=model_folder, required=True, help="an encoder")
    parser.add_argument("--data", type=existing_folder, required=True, help="TASK/SPLIT.jsonl")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--guides", nargs="+", default=GUIDES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    width = AutoConfig.from_pretrained(args.model).hidden_size
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    done = {_key(run) for run in runs}
    for seed in args.seeds:
        for task in args.tasks:
            for guide in args.guides:
                job = {
                    "width": width,
                    "task": task,
                    "guide": guide,
                    "seed": seed,
                    "examples": args.examples,
                    "epochs": args.epochs,
                }
                if _key(job) in done:
                    continue
                runs.append({**job, **measured(job, args)})
                save_json(path, {"versions": versions(), "hardware": hardware(), "runs": runs})
                print(runs[-1], flush=True)
    table = summary(runs)
    show(table, 3)
    (RESULTS / f"{NAME}.md").write_text(markdown(table) + "\n")


def measured(job: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The scores of one fit, by head."""
    splits = load_task(args.data, job["task"], job["examples"], job["seed"])
    network, tokenizer = load_network(args.model, job["task"], job["seed"], "float32")
    posterior = pyrolora.fit(
        network,
        splits.train,
        dataclasses.replace(as_guide(job["guide"]), head="gaussian"),
        tokenizer=tokenizer,
        epochs=job["epochs"],
        seed=job["seed"],
    )

    def predicted(data: Any, head: str) -> ClassPrediction:
        factors = draw_factors(posterior.model, DRAWS, seed=job["seed"])
        if head == "point":
            factors = dataclasses.replace(factors, head=None)
        prepared = posterior.predictor.prepare(data, need_labels=True)
        prediction = predict(posterior.model, prepared, factors)
        assert isinstance(prediction, ClassPrediction)
        return prediction

    point, drawn = (predicted(splits.scored, head) for head in ("point", "gaussian"))
    temperature = best_temperature(predicted(splits.held_out, "point"))
    by_head = {
        "point": point,
        "gaussian": drawn,
        "point, with a temperature": tempered(point, temperature),
    }
    return {
        "precision": posterior.history[-1]["head_precision"],
        "scores": {
            head: {name: evaluate(prediction)[name] for name in SCORES}
            for head, prediction in by_head.items()
        },
    }


def summary(runs: list[dict[str, Any]]) -> pd.DataFrame:
    """Means over seeds, with their standard errors."""
    frame = pd.DataFrame(
        {**{n: run[n] for n in ("width", "task", "guide")}, "head": head, **scores}
        for run in runs
        for head, scores in run["scores"].items()
    )
    groups = frame.groupby(["width", "task", "guide", "head"], sort=False)
    means, errors = groups.mean(), groups.sem()
    table = means.join(errors, rsuffix=" ±")
    columns = [column for name in SCORES for column in (name, f"{name} ±")]
    return table[columns].assign(seeds=groups.size()).reset_index()


def _key(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(run[name] for name in ("width", "task", "guide", "seed", "examples", "epochs"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
