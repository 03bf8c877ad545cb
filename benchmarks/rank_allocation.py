"""Layers that share one budget of ranks, on a task where equal ranks waste it.

A residual network of equal layers with random frozen weights. Its teacher is the same network with
a low-rank update of each weight: of rank 6 in one layer, and of rank 1 in the others, all of their
directions of one strength. The students end with 12 ranks, where the teacher has 11: 2 a layer
(uniform); or, by either importance, those that are left of 6 a layer, or those that moved from 2 a
layer. Beside them, with the same scaling: 6 ranks a layer, and the ranks that the teacher has. Both
importances are then taken of one posterior, that with 6 ranks a layer.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from common import RESULTS, markdown, positive, provenance, save_json, show
from torch import Tensor, nn
from tqdm.auto import tqdm

import pyrolora
from pyrolora import AdapterConfig, Posterior, RankAllocation, defaults
from pyrolora.data import prepare
from pyrolora.inference import ablation, signal_to_noise

NAME = "rank_allocation"
WIDTH, LAYERS, CLASSES = 24, 6, 8
RICH, HIGH, LOW = 2, 6, 1  # which layer has the update of high rank; the ranks of the teacher
RANK, SCALING = 2, 2.0
STRENGTH = 1.5  # the singular values of the updates; those of the weights are up to 2
SHARPNESS = 3.0  # of the logits: unsure labels, that depend on the inputs
TEST = 4000
Data = tuple[Tensor, Tensor]


# The task ---------------------------------------------------------------------------------------


class Residual(nn.Module):
    """h + tanh(W h), layer after layer, and logits of what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.logits = nn.Linear(WIDTH, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layers:
            inputs = inputs + torch.tanh(layer(inputs))
        return SHARPNESS * self.logits(inputs)


def task(seed: int, train: int, held_out: int) -> tuple[nn.Module, nn.Module, dict[str, Data]]:
    """The frozen network, its teacher, and data that the teacher labels by its probabilities."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    network = Residual().requires_grad_(False)
    for layer in (*network.layers, network.logits):
        layer.weight.copy_(normal(*layer.weight.shape) / WIDTH**0.5)
        layer.bias.zero_()
    teacher = copy.deepcopy(network)
    for number, layer in enumerate(teacher.layers):
        rank = HIGH if number == RICH else LOW
        left, right = (torch.linalg.qr(normal(WIDTH, rank)).Q for _ in range(2))
        layer.weight.add_(STRENGTH * left @ right.T)
    data = {}
    for name, size in (("train", train), ("held out", held_out), ("test", TEST)):
        inputs = normal(size, WIDTH)
        probs = teacher(inputs).softmax(-1)
        data[name] = (inputs, torch.multinomial(probs, 1, generator=generator)[:, 0])
    return network, teacher, data


# The students -----------------------------------------------------------------------------------


def adapters(quick: bool) -> dict[str, AdapterConfig]:
    """Contestant -> its adapters: one scaling, and slots up to the teacher's highest rank."""
    rounds = 2 if quick else defaults.ALLOCATION_ROUNDS

    def config(rank: int, **options: Any) -> AdapterConfig:
        targets = [f"layers.{number}" for number in range(LAYERS)]
        options = {"target_modules": targets, "lora_alpha": SCALING * rank, **options}
        return AdapterConfig(r=rank, **options)

    def shared(importance: str, schedule: str = "prune") -> AdapterConfig:
        allocation = RankAllocation(
            importance=importance, schedule=schedule, rounds=rounds, growth=HIGH / RANK
        )
        return config(RANK, rank_allocation=allocation)

    own = rf"layers\.{RICH}"
    return {
        f"uniform {RANK}": config(RANK),
        "alora": shared("alora"),
        "snr": shared("snr"),
        "alora, moved": shared("alora", "move"),
        "snr, moved": shared("snr", "move"),
        "teacher's": config(LOW, rank_pattern={own: HIGH}, alpha_pattern={own: SCALING * HIGH}),
        f"uniform {HIGH}": config(HIGH),
    }


def fitted(
    network: nn.Module, data: dict[str, Data], adapter: AdapterConfig, args: Any, seed: int
) -> Posterior:
    """Mean field on the training data; ablation alone is given the data held out."""
    ablates = adapter.allocation is not None and adapter.allocation.importance == "alora"
    return pyrolora.fit(
        network,
        data["train"],
        guide="meanfield",
        task="classification",
        eval_data=data["held out"] if ablates else None,
        adapter=adapter,
        epochs=args.epochs,
        learning_rate=args.learning_rate,
        batch_size=64,
        seed=seed,
    )


def importances(posterior: Posterior, held_out: Data, repeats: int = 5) -> dict[str, Any]:
    """Both scores of every rank, layer by layer, and the median of the seconds that each takes."""
    prepared = prepare(held_out, posterior.base, posterior.task)
    count = min(defaults.ALLOCATION_EXAMPLES, len(prepared))
    batch = prepared.collate([prepared.examples[i] for i in range(count)])
    found: dict[str, Any] = {}
    for name, score in {
        "alora": lambda: ablation(posterior.model, batch),
        "snr": lambda: signal_to_noise(posterior.model.program),
    }.items():
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            values = score()
            times.append(time.perf_counter() - start)
        found[name] = values.tolist()
        found[f"{name} seconds"] = float(torch.tensor(times).median())
    return found


def measured(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row a fit, and of each seed both scores of the posterior with the most ranks."""
    rows, scores = [], []
    contestants = adapters(args.quick)
    runs = [(seed, name) for seed in range(args.seeds) for name in contestants]
    for seed, name in tqdm(runs, desc="fits"):
        network, teacher, data = task(seed, args.train, args.held_out)
        inputs, labels = data["test"]
        if name == runs[0][1]:
            probs = teacher(inputs).log_softmax(-1)
            nll = -float(probs.gather(-1, labels[:, None]).mean())
            accuracy = float((probs.argmax(-1) == labels).double().mean())
            rows.append({"ranks of": "(the teacher)", "seed": seed} | _pair(nll, accuracy))
        start = time.perf_counter()
        posterior = fitted(network, data, contestants[name], args, seed)
        seconds = time.perf_counter() - start
        found = posterior.evaluate(data["test"], 16, batch_size=512, seed=0)
        ranks = list(posterior.ranks.values())
        row = {"ranks of": name, "seed": seed, **_pair(found["nll"], found["accuracy"])}
        rows.append({**row, "ranks": ranks, "seconds": seconds})
        if name == f"uniform {HIGH}":
            scores.append({"seed": seed, **importances(posterior, data["held out"])})
    return rows, scores


def _pair(nll: float, accuracy: float) -> dict[str, float]:
    return {"nll": nll, "accuracy": accuracy}


# Tables -----------------------------------------------------------------------------------------


def table_of(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Means over seeds, with standard deviations; the differences in NLL to the uniform ranks are
    of the same seed."""
    frame = pd.DataFrame(rows)
    base = frame[frame["ranks of"] == f"uniform {RANK}"].set_index("seed")["nll"]
    frame["to uniform"] = frame["nll"] - frame["seed"].map(base)
    table = []
    for name, own in frame.groupby("ranks of", sort=False):
        row: dict[str, Any] = {"ranks of": name}
        for column in ("nll", "to uniform", "accuracy"):
            row[column] = own[column].mean()
            row[f"{column} sd"] = own[column].std()
        ranks = own["ranks"].dropna().tolist()
        means = torch.tensor(ranks).double().mean(0).tolist() if ranks else []
        row["ranks, mean"] = " ".join(f"{mean:.1f}" for mean in means)
        row["budget"] = str(sum(ranks[0])) if ranks else ""
        row["seconds"] = f"{own['seconds'].mean():.1f}" if ranks else ""
        table.append(row)
    return pd.DataFrame(table)


def score_table(scores: list[dict[str, Any]]) -> pd.DataFrame:
    """Of each seed: how alike the two scores rank the ranks, how many of the best few are in the
    layer that needs them, and what they cost."""
    table = []
    for found in scores:
        flat = pd.DataFrame(
            {n: torch.tensor(found[n]).flatten().tolist() for n in ("alora", "snr")}
        )
        in_rich = pd.Series(flat.index // HIGH == RICH)
        row: dict[str, Any] = {"seed": found["seed"]}
        row["rank correlation"] = flat["alora"].rank().corr(flat["snr"].rank())
        for name in ("alora", "snr"):
            best = flat[name].nlargest(HIGH + LOW * (LAYERS - 1)).index
            row[f"{name}: of the best 11 in it"] = int(in_rich[best].sum())
            row[f"{name} ms"] = 1e3 * found[f"{name} seconds"]
        table.append(row)
    return pd.DataFrame(table)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", type=positive, default=5, help="tasks, and fits of each")
    parser.add_argument("--train", type=positive, default=12000, help="training examples")
    parser.add_argument("--held-out", type=positive, default=500, help="examples for the ablation")
    parser.add_argument("--epochs", type=positive, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--quick", action="store_true", help="one seed, few examples: a try")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the files")
    args = parser.parse_args(argv)
    if args.quick:
        args.seeds, args.train, args.held_out, args.epochs = 1, 256, 64, 2
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rows, scores = measured(args)
    table, alike = table_of(rows), score_table(scores)
    show(table, digits=3)
    show(alike, digits=2)
    save_json(args.out / f"{NAME}.json", {**provenance(args), "rows": rows, "scores": scores})
    path = args.out / f"{NAME}.md"
    path.write_text(f"{markdown(table)}\n{markdown(alike, digits=2)}")
    print(f"saved {path}")


if __name__ == "__main__":
    main()
