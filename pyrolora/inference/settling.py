"""Setting the scales of a posterior to the optimum that the curvature of the loss gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainingArguments

from pyrolora import defaults
from pyrolora.columns import Batch
from pyrolora.data.collate import to_device
from pyrolora.data.prepared import Prepared
from pyrolora.errors import NonFiniteError, listed
from pyrolora.guides import Curvature, Guide
from pyrolora.guides.wrapping import innermost
from pyrolora.inference.gauss_newton import gauss_newton
from pyrolora.inference.objective import NotEvaluated, evaluated
from pyrolora.matrices import decomposing
from pyrolora.model import JointModel
from pyrolora.progress import progress
from pyrolora.seeding import give_way, seeded

REMEDY = "choose a prior_scale, an init_scale and a lora_alpha nearer to the defaults"


class SettleScales(TrainerCallback):
    """Settling of the scales on a few examples before steps 0, 1, 2, 4, 8, ... of the optimiser.

    Scales change on the scale of log time, as the means do. Those that steps train on are set once
    more where `defaults.SETTLED_LAST` of the steps are done: from there on the means hardly move.

    Its random numbers depend on the seed and the step alone, and leave those of the training as
    they are, so that a resumed fit has the result of an uninterrupted one.
    """

    def __init__(
        self, joint: JointModel, guide: Guide, data: Prepared, failure: Callable[[str], Exception]
    ) -> None:
        self.joint, self.guide, self.data, self.failure = joint, guide, data, failure

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        last = step == int(defaults.SETTLED_LAST * state.max_steps)
        last = last and self.joint.program.settles_at_first
        if last or step & (step - 1) == 0:
            progress = (step + 1) / max(state.max_steps, 1)
            beta = self.guide.beta(self.joint.num_examples, progress)
            few = max(args.per_device_train_batch_size, defaults.CURVATURE_FEW)
            number = defaults.CURVATURE_EXAMPLES if last else few
            try:
                settle(self.joint, self.data, beta, args, step, number)
            except NonFiniteError as error:
                raise self.failure(f"has no optimal scales ({error})") from error


def settle_finally(
    joint: JointModel, guide: Guide, data: Prepared, args: TrainingArguments, rounds: int
) -> None:
    """Settle the scales given the final means, in ``rounds`` rounds.

    Several are needed where no training came before: the curvature is one under the posterior
    itself.
    """
    for number in range(rounds):
        most = defaults.CURVATURE_EXAMPLES
        settle(joint, data, guide.beta(joint.num_examples), args, -1 - number, most, "curvature")


def settle(
    joint: JointModel,
    data: Prepared,
    beta: float,
    args: TrainingArguments,
    step: int,
    most: int,
    title: str | None = None,
) -> None:
    """Settle the scales by the curvature of at most ``most`` examples, picked at random.

    Raises
    ------
    NonFiniteError
        When the curvature, or an optimal scale, is not finite, or such a scale is zero.
    """
    process = PartialState().process_index
    seed = (args.seed + 7919 * (step + 1) + 104729 * process) % (defaults.MAX_SEED + 1)
    with seeded(seed):
        picked = torch.randperm(len(data))[:most].tolist()
        try:
            with evaluated():
                batches = _batches(joint, data, picked, args, title)
                curvature = gauss_newton(joint, batches, passes=1)
        except NotEvaluated as error:
            raise NonFiniteError(f"the curvature cannot be evaluated: {error}; {REMEDY}") from error
    entries, ranks = (reduce(t, "mean") for t in (curvature.entries, curvature.ranks))
    with decomposing("the curvature of the loss", entries, ranks, remedy=REMEDY):
        joint.program.settle(Curvature(entries, ranks), beta)
    program = innermost(joint.program)
    if broken := program.outside():
        raise NonFiniteError(
            f"the optimum of {listed(broken)} is no positive number in single precision; {REMEDY}"
        )


def _batches(
    joint: JointModel, data: Prepared, picked: list[int], args: TrainingArguments, title: str | None
) -> Iterator[Batch]:
    loader: Any = data.loader(args.per_device_train_batch_size, picked)
    if title is not None:
        loader = progress(loader, title=title, hidden=args.disable_tqdm)
    device = joint.program.bank.get_parameter("A_loc").device
    for batch in loader:
        give_way(joint)
        yield to_device(batch, device)
