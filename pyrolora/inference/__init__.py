"""Inference: the ELBO, the Trainer around it, and the data that both take."""

from pyrolora.inference.arguments import (
    checkpoint_step,
    checkpoints,
    last_checkpoint,
    training_arguments,
)
from pyrolora.inference.data import Prepared, prepare
from pyrolora.inference.elbo import NamedELBO
from pyrolora.inference.network import load_network
from pyrolora.inference.trainer import Objective, SVITrainer, read_state

__all__ = [
    "NamedELBO",
    "Objective",
    "Prepared",
    "SVITrainer",
    "checkpoint_step",
    "checkpoints",
    "last_checkpoint",
    "load_network",
    "prepare",
    "read_state",
    "training_arguments",
]
