"""Inference: the engines that guides share, and the Trainer's arguments and checkpoints."""

from pyrolora.inference.arguments import (
    OF_STEPS,
    check_arguments,
    set_for_steps,
    training_arguments,
)
from pyrolora.inference.checkpoints import (
    checkpoint_step,
    checkpoints,
    last_checkpoint,
    member_folders,
    newest_whole,
    read_state,
)
from pyrolora.inference.curvature import Eigen, Kronecker, kfac
from pyrolora.inference.elbo import NamedELBO
from pyrolora.inference.evidence import best_precision, log_marginal_likelihood
from pyrolora.inference.gradients import weight_gradients
from pyrolora.inference.identity import differences
from pyrolora.inference.importance import ablation, signal_to_noise
from pyrolora.inference.objective import Objective
from pyrolora.inference.ranks import AllocateRanks, check_allocation
from pyrolora.inference.run import Run
from pyrolora.inference.trainer import SVITrainer

__all__ = [
    "OF_STEPS",
    "AllocateRanks",
    "Eigen",
    "Kronecker",
    "NamedELBO",
    "Objective",
    "Run",
    "SVITrainer",
    "ablation",
    "best_precision",
    "check_allocation",
    "check_arguments",
    "checkpoint_step",
    "checkpoints",
    "differences",
    "kfac",
    "last_checkpoint",
    "log_marginal_likelihood",
    "member_folders",
    "newest_whole",
    "read_state",
    "set_for_steps",
    "signal_to_noise",
    "training_arguments",
    "weight_gradients",
]
