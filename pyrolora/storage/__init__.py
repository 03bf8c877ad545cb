"""Save, load and merge posteriors; exchange adapters with PEFT."""

from pyrolora.storage.base import check_base, check_description, describe_base
from pyrolora.storage.folder import (
    META_FILE,
    as_json,
    finite,
    read_folder,
    write_folder,
    write_whole,
)
from pyrolora.storage.from_name import load_base
from pyrolora.storage.merge import merged
from pyrolora.storage.peft import CONFIG_FILE as PEFT_FILE
from pyrolora.storage.peft import Adapter, read_adapter, write_adapter

__all__ = [
    "META_FILE",
    "PEFT_FILE",
    "Adapter",
    "as_json",
    "check_base",
    "check_description",
    "describe_base",
    "finite",
    "load_base",
    "merged",
    "read_adapter",
    "read_folder",
    "write_adapter",
    "write_folder",
    "write_whole",
]
