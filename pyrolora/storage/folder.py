"""A saved posterior: a folder of JSON, safetensors and the tokenizer's files; no pickle.

The description has a digest of itself, of the tensors' file and of every file of the tokenizer's.
A digest tells damage and edits; it is no signature, and whoever edits a folder on purpose can
write new ones. Nothing is trusted for having the right one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from pyrolora.errors import CheckpointError, ConfigError
from pyrolora.files import MOST_JSON, SCRATCH, read_strict_json, shown, write_whole, writing
from pyrolora.json_values import as_json, finite
from pyrolora.storage.description import (
    DIGEST,
    FORMAT,
    FORMAT_VERSION,
    STATE_NAME,
    TOKENIZER_NAME,
    Description,
    check_registered,
    described,
    digest_of,
)
from pyrolora.storage.tensor_file import TensorFile, check_digest, tensor_file
from pyrolora.storage.tokenizer_files import read_tokenizer, remove, write_tokenizer

META_FILE = "posterior.json"
# Names that a save writes beside the JSON, whole or left over from a save that died.
OWN_NAME = re.compile(rf"{STATE_NAME}|{TOKENIZER_NAME}|\.tokenizer\.\w+\.part|{SCRATCH}")
MEAN_FOLDER = "peft"
"""The folder with the mean as an adapter of PEFT's, beside the JSON."""
OWN_FILES = (META_FILE, "adapters-*.safetensors", "tokenizer-*/*", f"{MEAN_FOLDER}/*")
"""Patterns of the files of a posterior in a repository."""


@dataclass(frozen=True)
class Saved:
    """A folder with a posterior: its description, checked, and its tensors, not yet read."""

    path: Path
    description: Description
    tensors: TensorFile

    def state(self) -> dict[str, Tensor]:
        """Read the tensors, which have to be those of the digest."""
        return self.tensors.read(self.description.sha256)

    def tokenizer(self, *, trust_remote_code: bool = False) -> Any:
        """Load the tokenizer; return None without one."""
        if self.description.tokenizer is None:
            return None
        return read_tokenizer(
            self.path / self.description.tokenizer,
            self.description.tokenizer_files,
            trust_remote_code=trust_remote_code,
        )


def write_folder(
    path: Path, meta: Mapping[str, Any], state: Mapping[str, Tensor], tokenizer: Any = None
) -> None:
    """Write a posterior.

    Tensors and tokenizer get names of their own content; the JSON that names them is replaced in
    one move at the end, and only then are older files removed. A save that dies leaves the older
    posterior in the folder whole. Links that lie there are replaced, never followed.

    Raises
    ------
    ConfigError
        When ``path`` is a file, or the description is too long to be read again.
    SaveError
        When it cannot be written. What was in the folder is whole.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"a posterior is saved to a folder, and {path} is a file; name another")
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    older, described = {item.name for item in path.iterdir()}, _content(path / META_FILE)
    try:
        kept = _write(path, meta, state, tokenizer)
    except BaseException:
        if _content(path / META_FILE) == described:  # it names none of the new files
            _clear(path, older)
        raise
    _clear(path, kept)


def _write(
    path: Path, meta: Mapping[str, Any], state: Mapping[str, Tensor], tokenizer: Any
) -> set[str | None]:
    """Write all files, the description last; return the names of the others."""
    content = save({name: tensor.contiguous().cpu() for name, tensor in state.items()})
    digest = hashlib.sha256(content).hexdigest()
    state_file = path / f"adapters-{digest[:12]}.safetensors"
    write_whole(state_file, content)
    folder, digests = None, None
    if tokenizer is not None:
        folder, digests = write_tokenizer(path, tokenizer)
    description = finite(
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "versions": {p: version(p) for p in ("pyrolora", "torch", "pyro-ppl", "transformers")},
            "state_file": state_file.name,
            "sha256": digest,
            "tokenizer": folder,
            "tokenizer_files": digests,
            "classes": None,
            **meta,
        }
    )
    text = as_json({**description, DIGEST: digest_of(description)}).encode()
    if len(text) > MOST_JSON:
        raise ConfigError(
            f"the description of this posterior has {len(text):,} bytes, and at most {MOST_JSON:,} "
            "are read again; shorten posterior.history"
        )
    write_whole(path / META_FILE, text)
    return {state_file.name, folder}


def _clear(path: Path, kept: Collection[str | None]) -> None:
    """Remove what saves wrote beside the description, but for ``kept``.

    Surplus files do no harm, so that one which cannot be removed is no reason to fail.
    """
    for item in path.iterdir():
        if OWN_NAME.fullmatch(item.name) and item.name not in kept:
            with suppress(OSError):
                remove(item)


def read_description(path: Path) -> Description:
    """Read and check the description of a saved posterior, and nothing else.

    Raises
    ------
    CheckpointError
        When it is missing, truncated, edited, or of another program or format version.
    """
    meta_file = path / META_FILE
    if not _is_file(meta_file):
        raise CheckpointError(
            f"{path} is no saved posterior: it has no {META_FILE}; pass the folder that "
            "posterior.save(...) wrote"
        )
    meta = read_strict_json(meta_file)
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise CheckpointError(
            f"{meta_file} does not describe a posterior of pyrolora; pass the folder that "
            "posterior.save(...) wrote"
        )
    saved_version = meta.get("format_version")
    if type(saved_version) is not int or saved_version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {shown(saved_version)}, this pyrolora reads "
            f"{FORMAT_VERSION}; it was saved with {shown(meta.get('versions'))}: install that "
            "version"
        )
    try:
        digest = digest_of(meta)
    except RecursionError as error:
        raise CheckpointError(
            f"{meta_file} is damaged: it is nested too deeply; restore it from a copy"
        ) from error
    if meta.get(DIGEST) != digest:
        raise CheckpointError(
            f"{path} was edited or is incomplete: {META_FILE} is not what was saved (its digest "
            "differs, or it has none); restore it from a copy"
        )
    check_registered(str(path), meta)
    try:
        return described(meta)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} was edited or is incomplete: in {META_FILE}, {error}; restore it from a copy"
        ) from error


def read_folder(path: Path) -> Saved:
    """Read a folder that `write_folder` wrote: its description, and the header of its tensors.

    Raises
    ------
    CheckpointError
        When files are missing, truncated, edited, or of another program or format version.
    """
    description = read_description(path)
    for name in (description.state_file, description.tokenizer):
        if name is not None and not (path / name).exists():
            raise CheckpointError(
                f"{path} is no whole posterior: {META_FILE} names {name}, which is missing; "
                "restore it from a copy"
            )
    state_file = path / description.state_file
    check_digest(state_file, description.sha256)
    return Saved(path, description, tensor_file(state_file))


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if _is_file(file) else None


def _is_file(file: Path) -> bool:
    """Return whether the name is taken, and by no folder; reading tells what else it is."""
    try:
        return file.exists() and not file.is_dir()
    except (OSError, ValueError):
        return False
