"""A saved posterior: a folder of JSON, safetensors and the tokenizer's files; no pickle."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save
from torch import Tensor

from pyrolora.errors import CheckpointError, ConfigError
from pyrolora.inference import read_state

FORMAT = "pyrolora-posterior"
FORMAT_VERSION = 1
META_FILE = "posterior.json"
# Everything that a save writes beside the JSON, whole or left over from a save that died.
OWN_NAME = re.compile(
    r"adapters-[0-9a-f]{12}\.safetensors|tokenizer-[0-9a-f]{12}|\.tokenizer\.part"
    r"|\.(adapters-[0-9a-f]{12}\.safetensors|posterior\.json)\.part"
)


def write_folder(
    path: Path, meta: Mapping[str, Any], state: Mapping[str, Tensor], tokenizer: Any = None
) -> None:
    """Write a posterior.

    Tensors and tokenizer get names of their own content; the JSON that names them is replaced in
    one move at the end, and only then are older files removed. A save that dies leaves the older
    posterior in the folder whole.

    Raises
    ------
    ConfigError
        When ``path`` is a file.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"a posterior is saved to a folder, and {path} is a file; name another")
    path.mkdir(parents=True, exist_ok=True)
    content = save({name: tensor.contiguous().cpu() for name, tensor in state.items()})
    digest = hashlib.sha256(content).hexdigest()
    state_file = path / f"adapters-{digest[:12]}.safetensors"
    write_whole(state_file, content)
    folder = None if tokenizer is None else _write_tokenizer(path, tokenizer)
    described = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": {p: version(p) for p in ("pyrolora", "torch", "pyro-ppl", "transformers")},
        "state_file": state_file.name,
        "sha256": digest,
        "tokenizer": None if folder is None else folder.name,
        **meta,
    }
    write_whole(path / META_FILE, as_json(described).encode())
    for item in path.iterdir():
        if OWN_NAME.fullmatch(item.name) and item not in (state_file, folder):
            shutil.rmtree(item) if item.is_dir() else item.unlink()


def as_json(value: Any) -> str:
    """JSON as the standard has it: `finite`, one value a line."""
    return json.dumps(finite(value), indent=1, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """What JSON can hold: NaN and infinity become null, tuples lists, NumPy's numbers Python's."""
    if isinstance(value, Mapping):
        return {str(key): finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(file: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    scratch = file.with_name(f".{file.name}.part")
    scratch.write_bytes(content)
    scratch.replace(file)


def _write_tokenizer(path: Path, tokenizer: Any) -> Path:
    """The tokenizer's files in a folder named by their content."""
    scratch = path / ".tokenizer.part"
    if scratch.exists():
        shutil.rmtree(scratch)
    tokenizer.save_pretrained(scratch)
    digest = hashlib.sha256()
    for file in sorted(file for file in scratch.rglob("*") if file.is_file()):
        digest.update(str(file.relative_to(scratch)).encode() + b"\0" + file.read_bytes())
    folder = path / f"tokenizer-{digest.hexdigest()[:12]}"
    if not folder.is_dir():  # else it is the same, and the scratch folder goes with the old files
        scratch.replace(folder)
    return folder


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
    for key in ("state_file", "sha256", "tokenizer"):
        if key not in meta:
            raise CheckpointError(
                f"{path} was edited or is incomplete: {META_FILE} has no {key!r}; restore it "
                "from a copy"
            )
    state_file = path / Path(str(meta["state_file"])).name
    folder = None if meta["tokenizer"] is None else path / Path(str(meta["tokenizer"])).name
    for part in (state_file, *([folder] if folder else [])):
        if part == path or not part.exists():
            raise CheckpointError(
                f"{path} is no whole posterior: {META_FILE} names {part.name}, which is missing; "
                "restore it from a copy"
            )
    with state_file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != meta["sha256"]:
        raise CheckpointError(
            f"{state_file} is not the file that was saved (its SHA-256 differs): it is truncated, "
            "edited, or from another save; restore it from a copy"
        )
    return meta, read_state(state_file), folder
