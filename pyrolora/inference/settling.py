"""Puts the scales of a posterior where the curvature of the loss has their optimum."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments

from pyrolora import defaults
from pyrolora.columns import Batch
from pyrolora.data.collate import to_device
from pyrolora.data.prepared import Prepared
from pyrolora.guides import Guide
from pyrolora.inference.gauss_newton import gauss_newton
from pyrolora.model import JointModel
from pyrolora.seeding import give_way, seeded


class SettleScales(TrainerCallback):
    """Before the steps 0, 1, 2, 4, 8, ... of the optimiser the scales are settled on a few
    examples: they change on the scale of log time, as the means do.

    The random numbers depend on the seed and on the step alone, and those of the training are as
    without it, so that a resumed fit ends where one in one go does.
    """

    def __init__(self, joint: JointModel, guide: Guide, data: Prepared) -> None:
        self.joint, self.guide, self.data = joint, guide, data

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step & (step - 1) == 0:
            progress = (step + 1) / max(state.max_steps, 1)
            beta = self.guide.beta(len(self.data), progress)
            few = max(args.per_device_train_batch_size, defaults.CURVATURE_FEW)
            settle(self.joint, self.data, beta, args, step, few)


def settle_finally(
    joint: JointModel, guide: Guide, data: Prepared, args: TrainingArguments, rounds: int
) -> None:
    """Settle the scales given the means as they are now; in several rounds where no training has
    come near, since the curvature is one under the posterior itself."""
    for number in range(rounds):
        most = defaults.CURVATURE_EXAMPLES
        settle(joint, data, guide.beta(len(data)), args, -1 - number, most, "curvature")


def settle(
    joint: JointModel,
    data: Prepared,
    beta: float,
    args: TrainingArguments,
    step: int,
    most: int,
    title: str | None = None,
) -> None:
    """Settle the scales by the curvature of at most that many examples, picked at random."""
    process = PartialState().process_index
    seed = (args.seed + 7919 * (step + 1) + 104729 * process) % (defaults.MAX_SEED + 1)
    with seeded(seed):
        picked = torch.randperm(len(data))[:most].tolist()
        passes = max(1, defaults.CURVATURE_PASSES // len(picked))
        found = gauss_newton(joint, _batches(joint, data, picked, args, title), passes)
    entries, ranks = (reduce(t, "mean") for t in (found.entries, found.ranks))
    joint.program.settle(type(found)(entries, ranks), beta)


def _batches(
    joint: JointModel, data: Prepared, picked: list[int], args: TrainingArguments, title: str | None
) -> Iterator[Batch]:
    loader: Any = data.loader(args.per_device_train_batch_size, picked)
    if title is not None:  # not ``disable=False``, which would overrule a user's TQDM_DISABLE
        hidden = {"disable": True} if args.disable_tqdm else {}
        loader = tqdm(loader, desc=title, delay=2, leave=False, **hidden)
    device = joint.program.bank.get_parameter("A_loc").device
    for batch in loader:
        give_way(joint)
        yield to_device(batch, device)
