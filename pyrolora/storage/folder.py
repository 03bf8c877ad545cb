"""A saved posterior: a folder of JSON, safetensors and the tokenizer's files; no pickle."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from pyrolora.errors import CheckpointError
from pyrolora.inference import read_state

FORMAT = "pyrolora-posterior"
FORMAT_VERSION = 1
META_FILE = "posterior.json"


def write_folder(
    path: Path, meta: Mapping[str, Any], state: Mapping[str, Tensor], tokenizer: Any = None
) -> None:
    """Write a posterior.

    Tensors and tokenizer get names of their own content; the JSON that names them is replaced in
    one move at the end, and only then are older files removed. A save that dies leaves the older
    posterior in the folder whole.
    """
    path.mkdir(parents=True, exist_ok=True)
    content = save({name: tensor.contiguous().cpu() for name, tensor in state.items()})
    digest = hashlib.sha256(content).hexdigest()
    state_file = path / f"adapters-{digest[:12]}.safetensors"
    _write(state_file, content)
    tokenizer_folder = None
    if tokenizer is not None:
        tokenizer_folder = path / f"tokenizer-{digest[:12]}"
        tokenizer.save_pretrained(tokenizer_folder)
    described = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": {p: version(p) for p in ("pyrolora", "torch", "pyro-ppl", "transformers")},
        "state_file": state_file.name,
        "sha256": digest,
        "tokenizer": tokenizer_folder.name if tokenizer_folder else None,
        **meta,
    }
    _write(path / META_FILE, (json.dumps(described, indent=1) + "\n").encode())
    for old in [*path.glob("adapters-*.safetensors"), *path.glob("tokenizer-*")]:
        if old.is_dir() and old != tokenizer_folder:
            shutil.rmtree(old)
        elif old.is_file() and old != state_file:
            old.unlink()


def _write(file: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    scratch = file.with_name(f".{file.name}.part")
    scratch.write_bytes(content)
    scratch.replace(file)


def read_folder(path: Path) -> tuple[dict[str, Any], Mapping[str, Tensor], Path | None]:
    """Read what `write_folder` wrote: the description, the tensors, the tokenizer's folder.

    Raises
    ------
    CheckpointError
        When files are missing, truncated, edited, or of another program or format version.
    """
    meta_file = path / META_FILE
    if not meta_file.is_file():
        raise CheckpointError(
            f"{path} is no saved posterior: it has no {META_FILE}; pass the folder that "
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
    state_file = path / Path(str(meta.get("state_file"))).name
    if not state_file.is_file():
        raise CheckpointError(
            f"{path} is no whole posterior: {META_FILE} names {state_file.name}, which is missing"
        )
    with state_file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != meta.get("sha256"):
        raise CheckpointError(
            f"{state_file} is not the file that was saved (its SHA-256 differs): it is truncated, "
            "edited, or from another save; restore it from a copy"
        )
    folder = path / Path(str(meta["tokenizer"])).name if meta.get("tokenizer") else None
    return meta, read_state(state_file), folder
