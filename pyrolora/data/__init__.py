"""From what a user passes as data to batches of tensors."""

from pyrolora.data.collate import pass_rows, to_device
from pyrolora.data.network import load_language_model, load_network
from pyrolora.data.prepared import Prepared, check_finite, prepare

__all__ = [
    "Prepared",
    "check_finite",
    "load_language_model",
    "load_network",
    "pass_rows",
    "prepare",
    "to_device",
]
