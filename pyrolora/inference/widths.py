"""The width of the noise, from what training examples that the fit holds back say of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from pyrolora import defaults
from pyrolora.adapters import FlatFactors
from pyrolora.data.collate import to_device
from pyrolora.data.prepared import Prepared
from pyrolora.guides.centred import CentredProgram
from pyrolora.guides.wrapping import innermost
from pyrolora.inference.objective import NotEvaluated, evaluated
from pyrolora.model import JointModel, evaluating
from pyrolora.seeding import give_way, seeded
from pyrolora.tasks.prediction import log_mean_exp

MEMORY = 0.85
"""The weight of the past in the running means of what is measured."""
POINTS = 1001
"""Widths that are compared, 1 % apart."""


def program_of(joint: JointModel) -> CentredProgram:
    """Return the program whose noise has the width; flat noise, and a head's law, are around it."""
    program = innermost(joint.program)
    assert isinstance(program, CentredProgram)
    return program


def chosen_width(joint: JointModel) -> float:
    """Return c, by which the noise is multiplied."""
    width = program_of(joint).width
    return 1.0 if width is None else float(width[0].exp())


def has_measured(joint: JointModel) -> bool:
    """Return whether a step has measured what c follows; a short fit ends before."""
    width = program_of(joint).width
    return width is not None and bool(width[1:].any())


class ChooseWidth(TrainerCallback):
    r"""Steps of log c towards the width at which a posterior knows how far it overfits.

    A posterior of the right width foretells how much worse it does on examples that it has not
    learnt from (Watanabe's equation of state), from the variance over its draws θ of the
    log-likelihoods of those that it has:

        G − T = V / β,    G = −mean_held back log E p(y|θ),    T = −mean_learnt log E p(y|θ),
                          V = mean_learnt Var log p(y|θ)

    A point has V = 0, however much it overfits: c grows. Noise that drowns what was learnt has no
    gap to account for its V: c falls. V goes as c², and β (G − T) is measured with a standard error
    e, so that the c looked for, with the prior log c ~ N(0, τ²), minimises

        (β (G − T) − V)² / 2 e² + (log c)² / 2 τ²,

    towards which log c moves all through the training, with running means of G − T, V and the
    variance of the scores, from a few examples and draws at a time. Where few examples are held
    back, or little has been learnt, the prior decides.

    Its random numbers depend on the seed and the step alone, and leave those of the training as
    they are; its state is in the program, and so in the checkpoints.

    References
    ----------
    S. Watanabe (2010), "Equations of states in singular statistical estimation", Neural Networks
    23(1), arXiv 0712.0653.
    """

    def __init__(self, joint: JointModel, learnt: Prepared, held_back: Prepared) -> None:
        self.joint, self.learnt, self.held_back = joint, learnt, held_back

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        learnt = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        every = max(1, round(defaults.WIDTH_EVERY / learnt))
        if step and step % every == 0:
            self._follow(self._measured(args, step), step // every)

    @torch.no_grad()
    def _measured(self, args: TrainingArguments, step: int) -> Tensor:
        """Return G - T, V and the variance of scores between examples, of all processes, (3,)."""
        joint = self.joint
        give_way(joint)
        process = PartialState().process_index
        with (
            seeded((args.seed + 6271 * step + 104729 * process) % (defaults.MAX_SEED + 1)),
            evaluating(joint),
        ):
            rows = args.per_device_train_batch_size
            try:
                with evaluated():
                    drawn = program_of(joint).factors(program_of(joint).draw(defaults.WIDTH_DRAWS))
                    learnt = scores(joint, self.learnt, drawn, rows)
                    held_back = scores(joint, self.held_back, drawn, rows)
            except NotEvaluated:  # NaN, in all processes
                nothing = program_of(joint).bank.get_parameter("A_loc").new_full((3,), math.nan)
                return reduce(nothing, "mean")
        of_learnt, of_held_back = log_mean_exp(learnt), log_mean_exp(held_back)
        gap = of_learnt.mean() - of_held_back.mean()
        spread = (of_learnt.var() + of_held_back.var()) / 2
        return reduce(torch.stack([gap, learnt.var(0).mean(), spread]), "mean")

    @torch.no_grad()
    def _follow(self, measured: Tensor, number: int) -> None:
        """Move log c by what was measured for the time of that number."""
        width = program_of(self.joint).width
        assert width is not None
        if not measured.isfinite().all():
            return  # the next step of the training finds out what is wrong
        state = MEMORY * width[1:] + (1 - MEMORY) * measured
        gap, variance, spread = (state / (1 - MEMORY**number)).tolist()
        log_width = float(width[0])
        beta = program_of(self.joint).options.beta(self.joint.num_examples)
        # Of the examples held back there are so many, and of those measured the running means hold
        # about as many as their weights have, in each process.
        past = MEMORY**number
        steps = (1 + MEMORY) * (1 - past) / ((1 - MEMORY) * (1 + past))
        seen = steps * defaults.WIDTH_EXAMPLES * PartialState().num_processes
        error = beta**2 * spread * (1 / len(self.held_back) + 2 / seen)
        best = likeliest(beta * gap, variance, error, log_width)
        log_width += defaults.WIDTH_RATE * min(max(best - log_width, -1.0), 1.0)
        width[0] = log_width
        width[1:] = state


def likeliest(gap: float, variance: float, error: float, log_width: float) -> float:
    """Return the log c of the lowest (gap − V)² / 2 error + (log c)² / 2 τ², of a fine grid.

    V is ``variance`` at ``log_width``, and goes as c². (Between a point with a gap and the width
    that accounts for it, gradients are small.)
    """
    low, high = map(math.log, defaults.WIDTHS)
    grid = torch.linspace(low, high, POINTS, dtype=torch.float64)
    missing = gap - variance * (2 * (grid - log_width)).exp()
    loss = missing.square() / (2 * max(error, 1e-12)) + grid.square() / (
        2 * defaults.WIDTH_PRIOR**2
    )
    return float(grid[loss.argmin()])


def scores(joint: JointModel, data: Prepared, factors: FlatFactors, rows: int) -> Tensor:
    """Return log p(y|θ) of a few examples, picked at random, given each draw: (draws, examples).

    The tags of one example count as one: what was learnt of it, they share. A pass has at most
    ``rows`` rows, those of a step of the training, or an example in all draws.
    """
    device = program_of(joint).bank.get_parameter("A_loc").device
    picked = torch.randint(len(data), (defaults.WIDTH_EXAMPLES,)).tolist()
    parts = []
    for batch in data.loader(max(1, rows // defaults.WIDTH_DRAWS), picked):
        placed = to_device(batch, device)
        parts.append(joint.task.log_prob(joint.network(placed, factors), placed))
    return torch.cat(parts, -1)
