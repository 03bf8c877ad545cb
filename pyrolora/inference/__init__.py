"""Inference: the ELBO, the Trainer around it, and the data that both take."""

from pyrolora.inference.data import Prepared, prepare
from pyrolora.inference.elbo import NamedELBO
from pyrolora.inference.network import load_network
from pyrolora.inference.trainer import Objective, SVITrainer, read_state

__all__ = [
    "NamedELBO",
    "Objective",
    "Prepared",
    "SVITrainer",
    "load_network",
    "prepare",
    "read_state",
]
