"""Fits that processes of one run make together: a script, whose parts a test also calls alone."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import together
import torch
from problems import arguments, mlp

import pyrolora
from pyrolora import AdapterConfig, RankAllocation
from pyrolora.guides import MAP
from pyrolora.model import JointModel
from pyrolora.posterior import Posterior

TERMS = ("loss", "elbo", "log_likelihood")


def classes() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(12, 4), torch.arange(12) % 3


def fitted(folder: Path, guide: Any, adapter: Any = None, data: Any = None, **options: Any) -> Any:
    return pyrolora.fit(
        mlp(),
        classes(),
        guide,
        task="classification",
        adapter=adapter or AdapterConfig(r=2),
        training=arguments(folder, ddp_find_unused_parameters=False, **options),
        eval_data=data,
    )


def weighed(folder: Path, processes: int = 1) -> Posterior:
    """Two steps of gradient descent over twelve examples each."""
    return fitted(
        folder,
        MAP(prior_scale=0.3),
        optim="sgd",
        max_steps=2,
        max_grad_norm=0.0,
        learning_rate=1.0,
        per_device_train_batch_size=6 // processes,
        gradient_accumulation_steps=2,
        logging_steps=1,
    )


def allocated(folder: Path, processes: int = 1) -> Posterior:
    """A fit whose ranks move once."""
    allocation = RankAllocation(schedule="move", rounds=1, share=0.3, start=0.5)
    return fitted(
        folder,
        MAP(prior_scale=0.3),
        AdapterConfig(r=2, rank_allocation=allocation),
        classes(),
        learning_rate=0.05,
        per_device_train_batch_size=12 // processes,
    )


def noisy(folder: Path) -> dict[str, Any]:
    """The noise of every step of a fit, its parameters and its log."""
    drawn, original = [], JointModel.binding

    def binding(self: JointModel, factors: Any, rows: int = 1) -> Any:
        if self.training:
            drawn.append([float(factors.A.sum()), int(factors.seeds)])
        return original(self, factors, rows)

    JointModel.binding = binding
    options = {"max_steps": 4, "per_device_train_batch_size": 3, "logging_steps": 2}
    found = fitted(folder, "flat+montec", **options)
    JointModel.binding = original
    return {"drawn": drawn, "state": listed(found), "elbo": found.history[0]["elbo"]}


class PartlyUnused(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.unused = mlp(), torch.nn.Linear(2, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.inner(inputs)


def full() -> Posterior:
    """A fit of all weights, some of which the network does not use."""
    torch.manual_seed(0)
    options = {"task": "classification", "epochs": 1, "batch_size": 3}
    return pyrolora.fit(PartlyUnused(), classes(), "full", **options)


def listed(posterior: Posterior) -> dict[str, Any]:
    return {name: value.tolist() for name, value in posterior.model.own_state().items()}


def logged(folder: Path, processes: int = 1) -> list[dict[str, float]]:
    """Return the terms of the objective at each step, of two micro-batches."""
    posterior = weighed(folder, processes)
    return [
        {name: entry[name] for name in entry if name in TERMS or name.startswith("kl/")}
        for entry in posterior.history
        if "elbo" in entry
    ]


def fits(folder: Path, processes: int) -> dict[str, Any]:
    """Make the fits whose result is that of one process."""
    return {
        "weighed": listed(weighed(folder, processes)),
        "logged": logged(folder, processes),
        "allocated": listed(allocated(folder, processes)),
        "full": listed(full()),
    }


def noise(folder: Path, processes: int) -> dict[str, Any]:
    """Make the same noisy fit twice."""
    return {"noise": noisy(folder), "noise again": noisy(folder)}


def main(folder: Path, longer: bool = False) -> None:
    """Make everything in a process of several, and write what each part came to."""
    torch.set_num_threads(1)
    rank, processes = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
    parts = {"fits": fits, "noise": noise, **together.PARTS}  # the last one breaks the group
    for name, part in (together.LONGER if longer else parts).items():
        found = together.as_json(part(folder / name, processes))
        (folder / f"{name}.{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()  # else its threads may abort the exit


if __name__ == "__main__":
    main(Path(sys.argv[1]), longer="longer" in sys.argv)
