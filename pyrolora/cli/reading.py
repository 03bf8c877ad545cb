"""Data by name: files, folders, and data sets on the hub; their splits."""

from __future__ import annotations

import mimetypes
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrolora.cli.readers import KINDS, READERS, read_file
from pyrolora.columns import PICTURE_PATHS, PICTURES, SOUND_PATHS, SOUNDS
from pyrolora.errors import ConfigError, DataError

if TYPE_CHECKING:
    import datasets


def read_data(source: str, split: str | None, defaults: Sequence[str]) -> datasets.Dataset:
    """Return the data set that a source holds.

    Parameters
    ----------
    source
        A file (`KINDS`), a folder written by ``save_to_disk``, a folder of pictures or sounds as
        ``datasets`` reads them (a folder per class), or ``name`` or ``name:config`` of a data set
        on the hub. Paths of pictures and sounds in a file are relative to its folder, where such a
        file lies there, else to the working directory.
    split
        The split of a source that has several; None: the first of ``defaults`` that it has.

    Raises
    ------
    DataError, ConfigError
        For a file or split that does not exist, and a file that its name's format cannot read.
    """
    path = Path(source)
    if path.is_dir():
        data = _from_folder(path)
    elif path.is_file():
        data = _placed(read_file(path), path.parent)
    elif path.suffix.lower() in READERS or path.is_absolute() or source.startswith("."):
        raise DataError(f"there is no file {source!r} (seen from {Path.cwd()})")
    else:
        data = _from_hub(source)
    if not isinstance(data, dict):
        if split is not None:
            raise ConfigError(f"{source} has no splits; leave out --split {split}")
        return data
    names = defaults if split is None else [split]
    for name in names:
        if name in data:
            return data[name]
    raise ConfigError(
        f"{source} has no split {' or '.join(map(repr, names))}; it has {sorted(data)}: choose one "
        "with --split"
    )


def _from_folder(path: Path) -> Any:
    import datasets

    try:
        builder = _builder(path)
        if builder is not None:
            return datasets.load_dataset(builder, data_dir=str(path))
        return datasets.load_from_disk(str(path))
    except Exception as error:  # a damaged folder raises anything
        raise DataError(
            f"the folder {path} holds no data set written by save_to_disk, or a damaged one, and "
            f"no pictures or sounds; pass such a folder, or a file ({KINDS})"
        ) from error


def _builder(path: Path) -> str | None:
    """Return the name of datasets' reader of a folder of pictures or sounds; None for others."""
    if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        return None
    for file in path.rglob("*"):
        kind = str(mimetypes.guess_type(file.name)[0]).partition("/")[0]
        if kind in ("image", "audio"):
            return f"{kind}folder"
    return None


def _placed(data: datasets.Dataset, folder: Path) -> datasets.Dataset:
    """Return the data with whole paths of the pictures and sounds that lie in that folder."""
    for name in {*PICTURES, *SOUNDS, *PICTURE_PATHS, *SOUND_PATHS} & {*data.column_names}:
        cells = data[name][:]
        if not any(isinstance(cell, str) and _is_file(folder / cell) for cell in cells):
            continue
        whole = [
            str(folder / c) if isinstance(c, str) and _is_file(folder / c) else c for c in cells
        ]
        place = data.column_names
        data = data.remove_columns(name).add_column(name, whole).select_columns(place)
    return data


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a text that is no path
        return False


def _from_hub(source: str) -> Any:
    import datasets

    name, _, config = source.partition(":")
    try:
        return datasets.load_dataset(name, config or None)
    except Exception as error:  # network, hub and loader raise anything
        reason = " ".join(str(error).split())
        raise DataError(
            f"{source!r} is no file or folder here, and no data set within reach: {reason[:200]}"
        ) from error
