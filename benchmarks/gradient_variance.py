"""What several draws a batch are worth: the noise of the gradient at each ``draws_per_batch``.

A guide is fitted to the demo's sentences on the embedded encoder, shortly, since at LoRA's start
(B = 0) A has no gradient. Then the gradient of the objective is taken at these parameters, without
dropout: for every one of some batches, several times. Its variance (the trace of its covariance)
over draws of one batch is what ``draws_per_batch`` can lower; the variance over batches, which is
there for a point estimate, too, it cannot.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from common import (
    RESULTS,
    describe_network,
    hardware,
    markdown,
    positive,
    quiet_loading,
    save_json,
    show,
    versions,
)
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

import pyrolora
from pyrolora import defaults, zoo
from pyrolora.data import prepare
from pyrolora.demo import sentences
from pyrolora.guides import Guide, MeanField, MonteCLoRA
from pyrolora.inference import Objective
from pyrolora.posterior import Posterior

GUIDES: dict[str, Guide] = {"meanfield": MeanField(), "montec": MonteCLoRA()}
MEANS = ("bank.A_loc", "bank.B_loc")
PARTS = ("means", "scales")
NAME = "gradient_variance"


def fitted(guide: Guide, data: Any, epochs: int, seed: int) -> Posterior:
    """A short fit on the encoder without dropout."""
    folder = zoo.folder("encoder")
    with quiet_loading():
        network = AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=data.features["label"].num_classes,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    return pyrolora.fit(
        network,
        data,
        guide=guide,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        epochs=epochs,
        learning_rate=defaults.DEMO_LEARNING_RATE,
        seed=seed,
    )


def batches_of(posterior: Posterior, data: Any, size: int, count: int) -> list[Any]:
    """The first batches of the data, all of one size."""
    found = prepare(data, posterior.base, posterior.task, posterior.tokenizer)
    if len(found) < size * count:
        raise SystemExit(f"{count} batches of {size} need more than the {len(found)} sentences")
    starts = range(0, size * count, size)
    return [found.collate([found.examples[i + k] for k in range(size)]) for i in starts]


def gradients(
    posterior: Posterior, batches: list[Any], groups: list[int], repeats: int, label: str
) -> tuple[dict[int, dict[str, Tensor]], dict[int, list[float]]]:
    """draws_per_batch -> (batches, repeats, k) of means and of scales, and milliseconds of each.

    The numbers of draws take turns, so that a slow moment of the machine hits all of them.
    """
    joint, program = posterior.model.train(), posterior.model.program
    objective = Objective(joint, joint.num_examples)
    beta = posterior.options.beta(joint.num_examples)
    parts = {"means": MEANS, "scales": tuple(program.scale_parameters())}
    found: dict[int, dict[str, list[Tensor]]] = {g: {part: [] for part in parts} for g in groups}
    times: dict[int, list[float]] = {g: [] for g in groups}
    objective(batches[0], beta)  # the first evaluation is validated, and slow
    for batch in tqdm([batch for batch in batches for _ in range(repeats)], desc=label):
        for count in groups:
            program.draws_per_batch = count
            joint.zero_grad()
            start = time.perf_counter()
            objective(batch, beta).backward()
            times[count].append(1e3 * (time.perf_counter() - start))
            for part, names in parts.items():
                own = [program.get_parameter(name).grad for name in names]
                found[count][part].append(torch.cat([g.flatten() for g in own if g is not None]))
    shaped = {
        count: {part: torch.stack(rows).unflatten(0, (-1, repeats)) for part, rows in own.items()}
        for count, own in found.items()
    }
    return shaped, times


def variances(gradient: Tensor) -> tuple[float, float]:
    """The traces of the covariance over the draws of a batch, and over batches and draws together,
    of (batches, repeats, k)."""
    within = gradient.double().var(1).mean(0).sum().item()
    means = gradient.double().mean(1).var(0).sum().item()
    between = max(means - within / gradient.shape[1], 0.0)
    return within, within + between


def ratio(gradient: Tensor, first: Tensor) -> tuple[float, float]:
    """The variance over draws relative to that of ``first``, and its standard error: the jackknife
    over batches."""
    own, other = (g.double().var(1).sum(-1) for g in (gradient, first))
    left_out = (own.sum() - own) / (other.sum() - other)
    spread = (left_out - left_out.mean()).square().sum() * (1 - 1 / len(own))
    return (own.sum() / other.sum()).item(), spread.sqrt().item()


def rows_of(
    name: str, found: dict[int, dict[str, Tensor]], times: dict[int, list[float]]
) -> list[dict[str, Any]]:
    """A row for each number of draws: variances, those over draws also relative to the first
    number's, and milliseconds of a gradient."""
    rows = []
    first = next(iter(found.values()))
    for count, own in found.items():
        row: dict[str, Any] = {"guide": name, "draws_per_batch": count}
        for part, gradient in own.items():
            row[f"{part} draws"], row[f"{part} all"] = variances(gradient)
            row[f"{part} ratio"], row[f"{part} error"] = ratio(gradient, first[part])
        row["ms"] = torch.tensor(times[count]).median().item()
        rows.append(row)
    return rows


def table_of(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """What is printed: ratios, their errors, and the share that draws have in the variance."""
    table = []
    first = {row["guide"]: row["ms"] for row in reversed(rows)}
    for row in rows:
        shown = {"guide": row["guide"], "draws_per_batch": row["draws_per_batch"]}
        for part in PARTS:
            shown[part] = row[f"{part} ratio"]
            shown[f"{part} +-"] = row[f"{part} error"]
            shown[f"{part} share"] = row[f"{part} draws"] / row[f"{part} all"]
        table.append({**shown, "time": row["ms"] / first[row["guide"]]})
    return pd.DataFrame(table)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: python benchmarks/gradient_variance.py --batch 32 --draws 1 2 4 8 16",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--guides", nargs="+", choices=list(GUIDES), default=list(GUIDES))
    parser.add_argument("--draws", type=positive, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--batch", type=positive, default=16, help="sentences in a batch")
    parser.add_argument("--batches", type=positive, default=20, help="batches, at least 2")
    parser.add_argument("--repeats", type=positive, default=4, help="gradients a batch, at least 2")
    parser.add_argument("--train", type=positive, default=60, help="sentences a library")
    parser.add_argument("--epochs", type=positive, default=3, help="of the fit before")
    parser.add_argument("--seed", type=int, default=0, help="of the fit and of the draws")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the files")
    args = parser.parse_args(argv)
    if min(args.batches, args.repeats) < 2:
        parser.error("a variance needs --batches and --repeats of at least 2")
    if any(args.batch % count for count in args.draws):
        parser.error(f"--batch {args.batch} has to be a multiple of each of --draws {args.draws}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    data = sentences(train=args.train, test=1, unseen=1)["train"]
    rows: list[dict[str, Any]] = []
    for name in args.guides:
        posterior = fitted(GUIDES[name], data, args.epochs, args.seed)
        batches = batches_of(posterior, data, args.batch, args.batches)
        set_seed(args.seed)
        rows += rows_of(name, *gradients(posterior, batches, args.draws, args.repeats, name))
    table = table_of(rows)
    show(table)
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    save_json(
        args.out / f"{NAME}.json",
        {
            "arguments": settings,
            "network": describe_network(posterior.base),
            "versions": versions(),
            "hardware": hardware(),
            "rows": rows,
        },
    )
    path = args.out / f"{NAME}.md"
    path.write_text(markdown(table, digits=2))
    print(f"saved {path}")


if __name__ == "__main__":
    main()
