"""From what a user passes as data to batches of tensors."""

from pyrolora.data.chats.text_options import TextOptions
from pyrolora.data.collate import Collator, pass_rows, to_device
from pyrolora.data.finite import check_finite
from pyrolora.data.prepared import Prepared, prepare

__all__ = [
    "Collator",
    "Prepared",
    "TextOptions",
    "check_finite",
    "pass_rows",
    "prepare",
    "to_device",
]
