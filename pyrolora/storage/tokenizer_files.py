"""Files of a posterior's tokenizer or processor: named one by one, each with its digest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from pyrolora.errors import CheckpointError
from pyrolora.files import flush, flush_tree, read_bytes, read_strict_json, shown, writing
from pyrolora.storage.processor_files import PART, PROCESSOR, auto_class
from pyrolora.storage.tensor_file import other_file

MOST_BYTES = 2**29
"""The largest file of a tokenizer that is read."""
CONFIG = "tokenizer_config.json"
GENERAL = {
    CONFIG,
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    PROCESSOR,
    PART,
}
TEMPLATES = "additional_chat_templates"


def write_tokenizer(path: Path, tokenizer: Any) -> tuple[str, dict[str, str]]:
    """Write the tokenizer or processor to a folder in ``path`` that is named by its content.

    Returns
    -------
    tuple
        The folder's name, and the SHA-256 of each of its files.

    Raises
    ------
    SaveError
        When it cannot be written.
    """
    with writing(path):
        scratch = Path(tempfile.mkdtemp(prefix=".tokenizer.", suffix=".part", dir=path))
        try:
            return _written(path, scratch, tokenizer)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)  # unless it has got its name


def _written(path: Path, scratch: Path, tokenizer: Any) -> tuple[str, dict[str, str]]:
    scratch.chmod(0o777 & ~_umask(path))
    tokenizer.save_pretrained(scratch)
    for config in (CONFIG, PROCESSOR, PART):
        if (scratch / config).exists():
            _forget_origins(scratch / config, own_code=not _is_transformers(tokenizer))
    digests = {name: digest(scratch / name) for name in _files(scratch)}
    whole = hashlib.sha256("".join(f"{n}\0{d}\n" for n, d in digests.items()).encode())
    folder = path / f"tokenizer-{whole.hexdigest()[:12]}"
    if os.path.lexists(folder):
        if not folder.is_symlink() and folder.is_dir() and digests == _digests(folder):
            return folder.name, digests
        remove(folder)
    flush_tree(scratch)
    scratch.replace(folder)
    flush(path)
    return folder.name, digests


def read_tokenizer(
    folder: Path, digests: Mapping[str, str], *, trust_remote_code: bool = False
) -> Any:
    """Load the tokenizer or processor whose files have these digests.

    Its class is one of transformers' own.

    Raises
    ------
    CheckpointError
        When a file is missing, surplus or another one, or the configuration asks for code that is
        not transformers' (unless that is trusted).
    """
    present = set(_files(folder)) if folder.is_dir() else set()
    for name in sorted(present ^ set(digests)):
        what = "has no" if name in digests else "has a file more than was saved,"
        raise CheckpointError(
            f"the tokenizer's folder {folder} {what} {shown(name)}; restore it from a copy"
        )
    for name, expected in digests.items():
        if digest(folder / name) != expected:
            raise CheckpointError(other_file(folder / name))
    auto = auto_class(folder, trust_remote_code=trust_remote_code)
    kind = _kind(folder, trust_remote_code) if auto is None or CONFIG in digests else None
    read = {*GENERAL, *(() if kind is None else kind.vocab_files_names.values())}
    for name in digests:
        place = Path(name)
        template = place.parent.name == TEMPLATES and place.suffix == ".jinja"
        code = trust_remote_code and place.suffix == ".py"
        if name not in read and not template and not code:
            raise CheckpointError(
                f"{folder / name} is no file of a {_title(kind)}'s; restore the folder from a copy"
            )
    try:
        return (auto or AutoTokenizer).from_pretrained(
            folder.resolve(), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except BaseException as error:
        # The tokenizers' own library, in Rust, panics on some files, and that is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be loaded ({type(error).__name__}: "
            f"{str(error)[:200]}); restore it from a copy"
        ) from error


def remove(path: Path) -> None:
    """Remove a file, a link (not what it points to), or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def digest(file: Path) -> str:
    """Return the SHA-256 of a regular file."""
    return hashlib.sha256(read_bytes(file, MOST_BYTES)).hexdigest()


def _kind(folder: Path, trust_remote_code: bool) -> type[PreTrainedTokenizerBase]:
    """Return the class that the configuration names, one of transformers' tokenizers."""
    config = read_strict_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{folder / CONFIG} is no configuration of a tokenizer; restore it from a copy"
        )
    for origin in _origins(config):
        raise CheckpointError(
            f"{folder / CONFIG} names other files, by {shown(origin)}={shown(config[origin])}; a "
            "tokenizer is read from its own folder alone"
        )
    if trust_remote_code and "auto_map" in config:
        return PreTrainedTokenizerBase
    if "auto_map" in config:
        raise CheckpointError(
            f"{folder / CONFIG} asks for code of its own, auto_map={shown(config['auto_map'])}; if "
            "you trust whoever wrote it, pass pyrolora.load(path, trust_remote_code=True)"
        )
    name = config.get("tokenizer_class")
    kind = tokenizer_class_from_name(name) if isinstance(name, str) else None
    if isinstance(kind, type) and issubclass(kind, PreTrainedTokenizerBase):
        return kind
    raise CheckpointError(
        f"{folder / CONFIG} names the class {shown(name)}, which is no tokenizer of transformers'"
    )


def _title(kind: type | None) -> str:
    return "processor" if kind is None else kind.__name__


def _origins(config: Mapping[str, Any]) -> list[str]:
    """Return the entries that name files, which transformers would read wherever they are."""
    names = [name for name in config if name.endswith(("_file", "_files")) and config[name]]
    return [*names, *(["init_inputs"] if config.get("init_inputs") else [])]


def _forget_origins(file: Path, *, own_code: bool) -> None:
    """Remove from a configuration the files and the code that a tokenizer was loaded from."""
    config = read_strict_json(file)
    surplus = [*_origins(config), *([] if own_code else ["auto_map"])]
    if any(name in config for name in surplus):
        left = {name: value for name, value in config.items() if name not in surplus}
        file.write_text(json.dumps(left, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_transformers(tokenizer: Any) -> bool:
    return type(tokenizer).__module__.startswith("transformers.")


def _files(folder: Path) -> list[str]:
    """Return the names of all files below ``folder``, in order; links to folders count."""
    names = []
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        names += [str((Path(place) / n).relative_to(folder).as_posix()) for n in (*files, *links)]
    return sorted(names)


def _digests(folder: Path) -> dict[str, str] | None:
    try:
        return {name: digest(folder / name) for name in _files(folder)}
    except CheckpointError:
        return None


def _umask(path: Path) -> int:
    """Return the permission bits that folders do not get here, as ``path`` did not get them."""
    return ~path.stat().st_mode & 0o777
