"""Save, load and merge posteriors."""

from pyrolora.storage.base import check_base, describe_base, load_base
from pyrolora.storage.folder import finite, read_folder, write_folder
from pyrolora.storage.merge import merged

__all__ = [
    "check_base",
    "describe_base",
    "finite",
    "load_base",
    "merged",
    "read_folder",
    "write_folder",
]
