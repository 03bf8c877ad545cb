"""Save, load and merge posteriors; exchange adapters with PEFT."""

from pyrolora.storage.base import check_base, check_description, describe_base
from pyrolora.storage.description import Description, digest_of
from pyrolora.storage.folder import (
    META_FILE,
    Saved,
    read_description,
    read_folder,
    write_folder,
)
from pyrolora.storage.from_name import load_base
from pyrolora.storage.merge import merged
from pyrolora.storage.numbers import as_json, finite
from pyrolora.storage.peft import CONFIG_FILE as PEFT_FILE
from pyrolora.storage.peft import Adapter, as_uniform, read_adapter, write_adapter

__all__ = [
    "META_FILE",
    "PEFT_FILE",
    "Adapter",
    "Description",
    "Saved",
    "as_json",
    "as_uniform",
    "check_base",
    "check_description",
    "describe_base",
    "digest_of",
    "finite",
    "load_base",
    "merged",
    "read_adapter",
    "read_description",
    "read_folder",
    "write_adapter",
    "write_folder",
]
