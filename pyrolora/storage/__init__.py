"""Save, load and merge posteriors."""

from pyrolora.storage.base import check_base, describe_base, load_base
from pyrolora.storage.folder import (
    META_FILE,
    as_json,
    finite,
    read_folder,
    write_folder,
    write_whole,
)
from pyrolora.storage.merge import merged

__all__ = [
    "META_FILE",
    "as_json",
    "check_base",
    "describe_base",
    "finite",
    "load_base",
    "merged",
    "read_folder",
    "write_folder",
    "write_whole",
]
