"""Files that others prepared: plain ones are read, links are never written through."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyrolora.errors import CheckpointError
from pyrolora.files import MOST_JSON, read_bytes, read_strict_json, replacing, shown, write_whole


def test_a_link_to_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"content")
    (tmp_path / "link").symlink_to("blob")
    assert read_bytes(tmp_path / "link", 7) == b"content"
    with pytest.raises(CheckpointError, match=r"7 bytes.*at most 6"):
        read_bytes(tmp_path / "link", 6)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop", "missing", "long name"])
def test_what_is_no_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    file = tmp_path / ("x" * 300 if kind == "long name" else "file")
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "folder":
        file.mkdir()
    elif kind == "loop":
        file.symlink_to(file.name)
    with pytest.raises(CheckpointError):
        read_bytes(file, 10)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": 1, "a": 2}', "'a' twice"),
        (b'{"a": NaN}', "NaN"),
        (b"[1e999]", "too large"),
        (b"9" * 5000, "digits"),
        (b"[" * 100_000, "too deeply"),
        (b"\xff", "utf-8"),
        (b"{", "Expecting"),
    ],
)
def test_what_is_no_json(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        read_strict_json(tmp_path / "file.json")


def test_json_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "file.json").open("wb") as stream:
        stream.truncate(MOST_JSON + 1)
    with pytest.raises(CheckpointError, match="at most"):
        read_strict_json(tmp_path / "file.json")


def test_a_planted_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "file").symlink_to(victim)
    write_whole(tmp_path / "file", b"new")
    assert victim.read_text() == "mine"
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_write_that_dies_leaves_the_older_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")

    def write() -> None:
        with replacing(tmp_path / "file") as scratch:
            scratch.write_text("ne")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write()
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_written_file_has_the_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_whole(tmp_path / "file", b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_value_is_shown_short_and_without_control_characters() -> None:
    assert shown("\x1b[31m") == r"'\x1b[31m'"
    assert "\u202e" not in shown("\u202e")
    assert len(shown("a" * 10**6)) < 200
    assert len(shown([[{"a": "b" * 1000}] * 100] * 100)) < 2000
