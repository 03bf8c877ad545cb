"""A saved posterior: a folder with ``posterior.json`` and ``adapters.safetensors``, no pickle."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from pyrolora.errors import CheckpointError
from pyrolora.inference import read_state

FORMAT = "pyrolora-posterior"
FORMAT_VERSION = 1
META_FILE = "posterior.json"
STATE_FILE = "adapters.safetensors"
TOKENIZER_FOLDER = "tokenizer"


def write_folder(
    path: Path, meta: Mapping[str, Any], state: Mapping[str, Tensor], tokenizer: Any = None
) -> None:
    """Write a posterior. The files appear together at the end, so that a failure half-way leaves
    an older posterior in the same folder whole."""
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path, prefix=".saving-") as scratch:
        folder = Path(scratch)
        save_file({name: t.contiguous().cpu() for name, t in state.items()}, folder / STATE_FILE)
        header = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "versions": {p: version(p) for p in ("pyrolora", "torch", "pyro-ppl", "transformers")},
            "sha256": _digest(folder / STATE_FILE),
        }
        text = json.dumps({**header, **meta}, indent=1, allow_nan=True)
        (folder / META_FILE).write_text(text + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
            shutil.rmtree(path / TOKENIZER_FOLDER, ignore_errors=True)
        for item in sorted(folder.iterdir(), key=lambda item: item.name == META_FILE):
            item.replace(path / item.name)


def read_folder(path: Path) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """Read what `write_folder` wrote: the description and the tensors.

    Raises
    ------
    CheckpointError
        When files are missing, truncated, edited, or of another program or format version.
    """
    meta_file, state_file = path / META_FILE, path / STATE_FILE
    for file in (meta_file, state_file):
        if not file.is_file():
            raise CheckpointError(
                f"{path} is no saved posterior: it has no {file.name}; pass the folder that "
                "posterior.save(...) wrote"
            )
    try:
        meta = json.loads(meta_file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{meta_file} is damaged, not readable as JSON: {error}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise CheckpointError(f"{meta_file} does not describe a posterior of pyrolora")
    if meta.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {meta.get('format_version')!r}, this pyrolora reads "
            f"{FORMAT_VERSION}; it was saved with {meta.get('versions')}: install that version"
        )
    if _digest(state_file) != meta.get("sha256"):
        raise CheckpointError(
            f"{state_file} is not the file that was saved (its SHA-256 differs): it is truncated, "
            "edited, or from another save; restore it from a copy"
        )
    return meta, read_state(state_file)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
