"""Ranks that move between layers in training, by their importance."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor
from transformers import TrainerCallback

from pyrolora import defaults
from pyrolora.adapters import moved, pruned
from pyrolora.adapters.config import RankAllocation
from pyrolora.columns import Batch
from pyrolora.data.collate import to_device
from pyrolora.data.prepared import Prepared
from pyrolora.errors import ConfigError
from pyrolora.guides import Program, full_name
from pyrolora.inference.importance import ablation, signal_to_noise
from pyrolora.model import JointModel
from pyrolora.seeding import seeded


def check_allocation(joint: JointModel, held_out: Prepared | None) -> None:
    """Raise `ConfigError` where the ranks of this model cannot move as configured."""
    allocation = joint.program.bank.config.allocation
    if allocation is None or joint.program.previous is not None:
        return
    if not joint.program.supports.rank_allocation:
        members = joint.program.members > 1
        reason = "; all draws have the same ranks, and members would differ" if members else ""
        raise ConfigError(
            f"rank_allocation={allocation.importance!r} moves ranks in training, which guide "
            f"{full_name(joint.program.options)!r} does not support{reason}; use "
            "rank_allocation='uniform', or another guide"
        )
    if allocation.importance == "alora" and held_out is None:
        raise ConfigError(
            "rank_allocation='alora' judges ranks on held-out data, and there are none; pass "
            "eval_data=, or use rank_allocation='snr'"
        )


class AllocateRanks(TrainerCallback):
    """Rounds of the adapter configuration's `RankAllocation`, after the optimiser's step.

    They are the same in all processes, and after a resume: the ranks in use are part of the saved
    state, and the random numbers of a round depend on the seed and the step alone.

    Parameters
    ----------
    joint
        The model that is trained.
    held_out
        The evaluation data, from which ``"alora"`` takes a batch, always the same one.

    Raises
    ------
    ConfigError
        Where ranks are to be judged by their noise, and the guide has none; where a guide collects
        iterates while ranks still change.
    """

    def __init__(self, joint: JointModel, held_out: Prepared | None) -> None:
        allocation = joint.program.bank.config.allocation
        assert allocation is not None
        self.joint = joint
        self.allocation: RankAllocation = allocation
        self.batch: Batch | None = None
        if allocation.importance == "snr":
            _check_width(joint.program)
        else:
            assert held_out is not None
            count = min(defaults.ALLOCATION_EXAMPLES, len(held_out))
            numbers = [i * len(held_out) // count for i in range(count)]
            self.batch = held_out.collate([held_out.examples[i] for i in numbers])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        guide = self.joint.program.options
        held = round(guide.rate_held_from() * state.max_steps)
        last = self.allocation.steps(state.max_steps)[-1]
        if held < last:
            raise ConfigError(
                f"{full_name(guide)!r} collects iterates after step {held} of {state.max_steps}, "
                f"and with end={self.allocation.end:g} ranks still change after step {last}; pass "
                "RankAllocation(end=...) of less, or collect later"
            )

    def on_step_end(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        steps = self.allocation.steps(state.max_steps)
        if state.global_step not in steps:
            return
        bank = self.joint.program.bank
        before = bank.mask().cpu().clone()
        program = self.joint.program
        with seeded((args.seed + state.global_step) % (defaults.MAX_SEED + 1)):
            importance = broadcast(self.importance()).cpu()
            if self.allocation.schedule == "prune":
                surplus = int(bank.slots().sum()) - bank.budget()
                left = surplus * (len(steps) - 1 - steps.index(state.global_step)) / len(steps)
                after = pruned(importance, before, bank.budget() + round(left))
            else:
                share = self.allocation.share or defaults.ALLOCATION_SHARE
                after = moved(importance, before, bank.slots(), share)
            for name, entries in bank.activate(after).items():
                _forget(optimizer, bank.get_parameter(name), entries)
            for name, entries in program.renew(after != before).items():
                _forget(optimizer, program.get_parameter(name), entries)
        ranks = bank.ranks().values()
        # The Trainer's `log` would count as the log of this step.
        state.log_history.append(
            {
                "ranks_lost": int((before & ~after).sum()),
                "lowest_rank": min(ranks),
                "highest_rank": max(ranks),
                "step": state.global_step,
                "epoch": state.epoch,
            }
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        bank = self.joint.program.bank
        above = int(bank.mask().sum()) - bank.budget()
        if above > 0:
            warnings.warn(
                f"the posterior has {above} ranks more than the budget of {bank.budget()}: the "
                "training ended before the last round of rank_allocation, or went back to a "
                "checkpoint from before it; end the rounds earlier, with RankAllocation(end=...)",
                stacklevel=2,
            )

    def importance(self) -> Tensor:
        """Return the importance of the ranks as they are, (L, r_max)."""
        if self.batch is None:
            return signal_to_noise(self.joint.program)
        device = self.joint.program.bank.get_parameter("A_loc").device
        return ablation(self.joint, to_device(self.batch, device))


@torch.no_grad()
def _check_width(program: Program) -> None:
    with seeded(0):
        factors = program.factors(program.draw(2))
    point = all(t.dim() == 1 or torch.equal(t[0], t[1]) for t in (factors.A, factors.B))
    if point or not program.supports.distinct_prior:
        raise ConfigError(
            "rank_allocation='snr' judges ranks by the width of the posterior in training, and "
            f"{full_name(program.options)!r} infers none there; use "
            "rank_allocation='alora' with eval_data=, or the guide 'montec', 'meanfield' or "
            "'lowrank'"
        )


@torch.no_grad()
def _forget(optimizer: Any, parameter: torch.nn.Parameter, entries: Tensor) -> None:
    """Zero these entries in the optimiser's state, such as its moments."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value.masked_fill_(entries, 0.0)
