"""Save, load and merge posteriors."""

from pyrolora.json_values import as_json, finite
from pyrolora.storage.base import check_base, check_description, describe_base
from pyrolora.storage.card_file import write_card
from pyrolora.storage.describe import describe
from pyrolora.storage.description import Description, digest_of
from pyrolora.storage.folder import (
    MEAN_FOLDER,
    META_FILE,
    Saved,
    read_description,
    read_folder,
    write_folder,
)
from pyrolora.storage.from_name import load_base
from pyrolora.storage.hub import located, upload
from pyrolora.storage.merge import merged

__all__ = [
    "MEAN_FOLDER",
    "META_FILE",
    "Description",
    "Saved",
    "as_json",
    "check_base",
    "check_description",
    "describe",
    "describe_base",
    "digest_of",
    "finite",
    "load_base",
    "located",
    "merged",
    "read_description",
    "read_folder",
    "upload",
    "write_card",
    "write_folder",
]
