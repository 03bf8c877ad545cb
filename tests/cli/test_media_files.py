"""Pictures by the command line: paths in a file, and a folder per class."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from PIL import Image

from pyrolora.cli.reading import read_data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate(("cat", "dog")):
        (tmp_path / "pictures" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), (i, i, i)).save(tmp_path / f"pictures/train/{name}/{i}.png")
    return tmp_path


@pytest.mark.parametrize("column", ["image", "file_name"])
def test_paths_are_relative_to_their_file(column: str, folder: Path) -> None:
    paths = ["pictures/train/cat/0.png", str(folder / "pictures/train/dog/1.png")]
    rows = [{column: path, "label": i} for i, path in enumerate(paths)]
    file = folder / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    data = read_data(str(file), None, ("train",))
    assert data.column_names == [column, "label"]
    assert data[column][:] == [str(folder / path) for path in paths]


def test_texts_in_a_column_of_that_name_stay(folder: Path) -> None:
    file = folder / "train.jsonl"
    file.write_text(json.dumps({"file": "no file", "path": "x" * 5000}))
    assert read_data(str(file), None, ("train",))[0] == {"file": "no file", "path": "x" * 5000}


def test_a_folder_of_pictures_has_a_class_per_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    data = read_data(str(folder / "pictures"), None, ("train",))
    assert data.features["label"].names == ["cat", "dog"]
    assert data[1]["image"].getpixel((0, 0)) == (1, 1, 1)
