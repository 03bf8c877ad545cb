"""The width of the noise, from the likelihood of training examples that the fit holds back."""

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
from pyrolora.model import JointModel, evaluating
from pyrolora.seeding import give_way, seeded
from pyrolora.tasks.prediction import log_mean_exp

MEMORY = 0.7, 0.9
"""Weights of the past in the running means of the gradient, and of its square."""
TINY = 1e-12


def program_of(joint: JointModel) -> CentredProgram:
    """Return the program whose noise has the width; flat noise is around it."""
    program = getattr(joint.program, "inner", joint.program)
    assert isinstance(program, CentredProgram)
    return program


class ChooseWidth(TrainerCallback):
    """Steps of log c up the likelihood of the examples held back, all through the training.

    With the means as they are, and K draws a_k from the guide, the likelihood of a few examples is

        f(log c) = Σ_i log 1/K Σ_k p(y_i | m + c/c₀ (a_k − m)),

    of which log c follows the gradient g at c₀, as Adam would: by the rate times m̂ / √v̂, with m̂
    and v̂ running means of g and g². It moves both ways, towards the width with which what has been
    learnt predicts best: that is small as long as the means still learn, and grows when they begin
    to learn by heart. The prior log c ~ N(0, τ²) counts beside the examples, so that a few of them
    that the means get right do not take the noise away.

    Its random numbers depend on the seed and the step alone, and leave those of the training as
    they are; its state is in the program, and so in the checkpoints.
    """

    def __init__(self, joint: JointModel, data: Prepared) -> None:
        self.joint, self.data = joint, data

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step and step % defaults.WIDTH_EVERY == 0:
            number = step // defaults.WIDTH_EVERY
            fall = 1 - 0.8 * step / max(state.max_steps, 1)
            self._follow(self._gradient(args, step), number, defaults.WIDTH_RATE * fall)

    def _gradient(self, args: TrainingArguments, step: int) -> Tensor:
        """Return the gradient of the mean of −f per example, (), over all processes."""
        joint = self.joint
        device = program_of(joint).bank.get_parameter("A_loc").device
        process = PartialState().process_index
        give_way(joint)
        with seeded((args.seed + 6271 * step + 104729 * process) % (defaults.MAX_SEED + 1)):
            picked = torch.randint(len(self.data), (defaults.WIDTH_EXAMPLES,)).tolist()
            drawn = drawn_noise(joint, defaults.WIDTH_DRAWS)
            log_width = torch.zeros((), device=device, requires_grad=True)
            width = program_of(joint).width
            assert width is not None
            with evaluating(joint), torch.enable_grad():
                (batch,) = self.data.loader(len(picked), picked)
                batch = to_device(batch, device)
                output = joint.network(batch, widened(joint, drawn, log_width))
                loss = -log_mean_exp(joint.task.row_log_prob(output, batch)).mean()
                loss = loss + _price(width[0] + log_width) / len(self.data)
                (gradient,) = torch.autograd.grad(loss, log_width)
        return reduce(gradient, "mean")

    @torch.no_grad()
    def _follow(self, gradient: Tensor, number: int, rate: float) -> None:
        width = program_of(self.joint).width
        assert width is not None
        if not gradient.isfinite():
            return  # the next step of the training finds out what is wrong
        log_width, mean, square = width.clone()
        mean = MEMORY[0] * mean + (1 - MEMORY[0]) * gradient
        square = MEMORY[1] * square + (1 - MEMORY[1]) * gradient.square()
        step = mean / (1 - MEMORY[0] ** number) / (square / (1 - MEMORY[1] ** number) + TINY).sqrt()
        low, high = map(math.log, defaults.WIDTHS)
        width.copy_(torch.stack([(log_width - rate * step).clamp(low, high), mean, square]))


def drawn_noise(joint: JointModel, num_samples: int) -> FlatFactors:
    """Return factors of draws from the guide."""
    program = program_of(joint)
    with torch.no_grad():
        return program.factors(program.draw(num_samples))


def widened(joint: JointModel, drawn: FlatFactors, log_width: Tensor) -> FlatFactors:
    """Return the draws with their noise times exp(``log_width``), and B as a constant."""
    program = program_of(joint)
    bank, latent = program.bank, program.options.latent
    with torch.no_grad():
        means = bank.means()
        noise = bank.latent_part(latent, drawn) - bank.latent_part(latent, means)
        means = FlatFactors(means.A.detach(), means.B.detach())
    return bank.shifted(latent, noise * log_width.exp(), means)


def _price(log_width: Tensor) -> Tensor:
    """Return −log of the prior of log c, N(0, τ²), but for a constant."""
    return 0.5 * (log_width / defaults.WIDTH_PRIOR).square()
