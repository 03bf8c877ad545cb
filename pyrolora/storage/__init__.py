"""Save, load and merge posteriors."""

from pyrolora.storage.base import check_base, describe_base, load_base
from pyrolora.storage.folder import TOKENIZER_FOLDER, read_folder, write_folder
from pyrolora.storage.merge import merged

__all__ = [
    "TOKENIZER_FOLDER",
    "check_base",
    "describe_base",
    "load_base",
    "merged",
    "read_folder",
    "write_folder",
]
