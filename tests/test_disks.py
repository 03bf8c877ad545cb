"""Disks that are full, read-only or gone: the fit is not lost, and what was there stays whole."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import arviz
import pytest
import torch
from console import done, pyrolora_, refused, saved
from problems import arguments, bert, reviews, tokens
from safetensors import SafetensorError
from transformers import TrainerCallback

import pyrolora
from pyrolora import AdapterConfig, Posterior
from pyrolora.arviz import netcdf
from pyrolora.errors import ConfigError, SaveError
from pyrolora.files import flush_tree, replacing_folder, write_whole
from pyrolora.inference import last_checkpoint
from pyrolora.inference.checkpoints import damage

Disk = Callable[[str], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """``disk("200k")``: an empty disk of that size, for root."""
    mounted = []

    def mount(size: str) -> Path:
        place = tmp_path / f"disk-{size}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("only root mounts a disk")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(folder: Path, left: int = 0) -> Path:
    """Write a file that leaves so many bytes of the disk."""
    file = folder / "filling"
    with file.open("wb") as stream:
        for size in (2**16, 2**12):
            while shutil.disk_usage(folder).free >= left + size:
                stream.write(b"\0" * size)
                stream.flush()
    return file


class AfterSave(TrainerCallback):
    """Does something when the first checkpoint is written."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act, self.steps = act, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.act is not None:
            self.act()
            self.act = None


def fitted(folder: Path, callback: Any = ()) -> Posterior:
    args = arguments(folder, save_strategy="steps", save_steps=2)
    args.resume_from_checkpoint = "auto"
    network, adapter = bert(hidden_dropout_prob=0.1), AdapterConfig(r=2)
    return pyrolora.fit(network, tokens(16), training=args, callbacks=callback, adapter=adapter)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return fitted(tmp_path_factory.mktemp("whole")).model.own_state()


def assert_goes_on(folder: Path, whole: dict[str, torch.Tensor]) -> None:
    checkpoint = last_checkpoint(folder)
    assert checkpoint is not None
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert damage(checkpoint) is None
    again = fitted(folder).model.own_state()
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def assert_kept(error: SaveError, step: int, folder: Path) -> None:
    """The error has the posterior of the step, which predicts and can be saved."""
    assert f"checkpoint-{step}" in str(error)
    assert f"after step {step}" in str(error)
    assert torch.isfinite(error.posterior.predict(tokens(4), 2, seed=0).draws).all()
    assert error.posterior.history
    error.posterior.save(folder)
    pyrolora.load(folder, bert())


# Checkpoints --------------------------------------------------------------------------------------


def no_room(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def no_room_in_rust(*_: Any, **__: Any) -> None:
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def no_room_in_torch(*_: Any, **__: Any) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:668] . PytorchStreamWriter failed")


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        ("safetensors.torch.serialize_file", no_room_in_rust),
        ("torch.save", no_room_in_torch),
        ("transformers.TrainerState.save_to_json", no_room),
        ("pyrolora.inference.resuming.seal", no_room),
        ("os.fsync", no_room),
    ],
)
def test_a_checkpoint_that_cannot_be_written_keeps_the_fit(
    target: str, fault: Any, whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        breaks = AfterSave(lambda: patch.setattr(target, fault))
        with pytest.raises(SaveError, match=r"cannot write .*checkpoint-4") as caught:
            fitted(run, breaks)
    assert breaks.steps == 4
    assert_kept(caught.value, 4, tmp_path / "kept")
    assert_goes_on(run, whole)


def test_what_is_no_fault_of_the_disk_stays_what_it_is(tmp_path: Path) -> None:
    def wrong(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    with pytest.MonkeyPatch.context() as patch:
        breaks = AfterSave(lambda: patch.setattr("torch.save", wrong))
        with pytest.raises(RuntimeError, match="a bug"):
            fitted(tmp_path, breaks)


def test_a_disk_that_fills_up(disk: Disk, whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    run = disk("2m") / "run"
    with pytest.raises(SaveError, match=r"cannot write .*checkpoint-4") as caught:
        fitted(run, AfterSave(lambda: fill(run.parent, left=8192)))
    assert_kept(caught.value, 4, tmp_path / "kept")
    (run.parent / "filling").unlink()
    assert_goes_on(run, whole)


def test_a_folder_that_becomes_read_only(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    run = tmp_path / "run"

    def change(how: str) -> None:
        command = ["chattr", how, str(run)]
        if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("only root, and not on every disk, makes a folder immutable")

    try:
        with pytest.raises(SaveError, match="Operation not permitted") as caught:
            fitted(run, AfterSave(lambda: change("+i")))
        assert_kept(caught.value, 4, tmp_path / "kept")
        with pytest.raises(ConfigError, match=r"output_dir=.*Operation not permitted"):
            fitted(run)
    finally:
        change("-i")
    (run / ".lock").unlink()  # could not be removed; the kernel has let go of it
    assert_goes_on(run, whole)


def test_a_folder_that_is_taken_away(tmp_path: Path, whole: dict[str, torch.Tensor]) -> None:
    """It is made anew: nothing of the fit is lost but the older checkpoint."""
    run = tmp_path / "run"
    own = fitted(run, AfterSave(lambda: shutil.rmtree(run))).model.own_state()
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    assert all(torch.equal(own[name], value) for name, value in whole.items())


# Before the first step ----------------------------------------------------------------------------


def test_a_full_disk_is_told_before_the_first_step(disk: Disk, steps: list[int]) -> None:
    full = disk("64k")
    fill(full)
    with pytest.raises(ConfigError, match=r"output_dir=.*No space left"):
        fitted(full)
    assert not steps


def test_a_disk_without_room_for_a_checkpoint_is_told_before_the_first_step(
    disk: Disk, steps: list[int]
) -> None:
    with pytest.raises(ConfigError, match=r"bytes left, and each checkpoint needs [\d,]+; make"):
        fitted(disk("8k"))
    assert not steps


def test_a_folder_without_permission_is_told_before_the_first_step(
    tmp_path: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = os.open

    def refuse(path: Any, *more: Any, **options: Any) -> int:
        if str(path).startswith(str(tmp_path)) and str(path).endswith(".part"):
            raise PermissionError(13, "Permission denied", str(path))
        return usual(path, *more, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConfigError, match=f"output_dir='{tmp_path}'.*Permission denied"):
        fitted(tmp_path)
    assert not steps
    assert not list(tmp_path.iterdir())


# What is renamed was flushed ----------------------------------------------------------------------


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Paths that were flushed, that got a name, and that were removed, as it happened."""
    seen: list[tuple[str, str]] = []
    flush, replace, remove = os.fsync, Path.replace, shutil.rmtree

    def fsync(handle: int) -> None:
        seen.append(("flushed", os.readlink(f"/proc/self/fd/{handle}")))
        flush(handle)

    def renamed(path: Path, target: Path) -> Path:
        seen.append(("named", str(path)))
        seen.append(("as", str(target)))
        return replace(path, target)

    def removed(path: Any, *more: Any, **options: Any) -> None:
        seen.append(("removed", str(path)))
        remove(path, *more, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", renamed)
    monkeypatch.setattr(shutil, "rmtree", removed)
    return seen


def flushed_before(order: list[tuple[str, str]], end: int) -> set[str]:
    return {path for what, path in order[:end] if what == "flushed"}


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")


@needs_proc
def test_a_save_flushes_what_it_renames_and_then_the_folder(
    order: list[tuple[str, str]], tmp_path: Path
) -> None:
    posterior = pyrolora.fit(bert(), tokens(8), "map", epochs=1, tokenizer=saved_words())
    order.clear()
    posterior.save(tmp_path)
    named = [(i, Path(path)) for i, (what, path) in enumerate(order) if what == "named"]
    assert len(named) == 4  # tensors, tokenizer, description, model card
    for i, path in named:
        before = flushed_before(order, i)
        assert str(path) in before
        if "tokenizer" in path.name:
            folder = Path(dict(order[i + 1 : i + 2])["as"])
            names = {str(path / file.name) for file in folder.iterdir()}
            assert len(names) > 1
            assert names <= before
        later = [path for what, path in order[i:] if what == "flushed"]
        assert later[0] == str(tmp_path), "the name is on the disk before the next file is"


def saved_words() -> Any:
    from problems import tokenizer

    return tokenizer()


@needs_proc
def test_a_checkpoint_is_on_the_disk_before_an_older_one_is_removed(
    order: list[tuple[str, str]], tmp_path: Path
) -> None:
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1)
    pyrolora.fit(bert(), tokens(8), "map", training=args)
    gone = [i for i, (what, path) in enumerate(order) if what == "removed" and "ckpt" not in path]
    gone = [i for i in gone if "checkpoint-" in order[i][1]]
    assert [Path(order[i][1]).name for i in gone] == ["checkpoint-2", "checkpoint-4"]
    for i, newer in zip(gone, ("checkpoint-4", "checkpoint-6"), strict=True):
        before = flushed_before(order, i)
        folder = tmp_path / newer
        assert str(tmp_path) in before
        if folder.exists():
            parts = {str(file) for file in folder.iterdir() if file.name != "parts.json"}
            assert len(parts) == 6
            assert parts <= before
        assert ("as", str(folder / "parts.json")) in order[:i]


def test_a_folder_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    def half() -> None:
        with replacing_folder(tmp_path / "made") as scratch:
            (scratch / "a").write_text("a")
            no_room()

    with pytest.raises(SaveError, match=r"cannot write .*made: No space"):
        half()
    assert not list(tmp_path.iterdir())
    with replacing_folder(tmp_path / "made") as scratch:
        (scratch / "within").mkdir()
        (scratch / "within" / "a").write_text("a")
        flush_tree(scratch)
    assert (tmp_path / "made" / "within" / "a").read_text() == "a"
    with pytest.raises(SaveError, match="not empty"), replacing_folder(tmp_path / "made"):
        pass


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match=r"cannot write .*nowhere/file: No such file") as caught:
        write_whole(tmp_path / "nowhere" / "file", b"")
    assert caught.value.posterior is None


# The command --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    saved(bert(), place / "encoder")
    reviews(8).to_json(place / "train.jsonl")
    done(*command(place, place / "run"))
    return place


def command(place: Path, output: Path) -> list[Any]:
    words = ["fit", place / "train.jsonl", "--model", place / "encoder", "--output-dir", output]
    return [*words, "--epochs", 2, "--batch-size", 4, "--json"]


def test_a_command_whose_posterior_cannot_be_written_goes_on_from_its_checkpoint(
    place: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyrolora.report.publish.write_folder", _unsaved)
        said = refused(pyrolora_(*command(place, run)), "cannot write", "goes on from", code=1)
    assert "checkpoint-4" in said
    assert done(*command(place, run)).json["resumed_from_step"] == 4
    assert_same(run, place / "run")
    assert not list(run.glob("checkpoint-*"))


def _unsaved(path: Path, *_: Any) -> None:
    raise SaveError(f"cannot write {path}: No space left on device")


def assert_same(one: Path, other: Path) -> None:
    first, second = (pyrolora.load(run).model.own_state() for run in (one, other))
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_a_command_whose_checkpoint_cannot_be_written_keeps_the_step(
    place: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.save", no_room_in_torch)
        words = ("checkpoint-1", str(run / "last_good"), "begins anew")
        refused(pyrolora_(*command(place, run)), *words, code=1)
    assert len(pyrolora.load(run / "last_good").history) == 1
    assert done(*command(place, run)).json["resumed_from_step"] == 0
    assert_same(run, place / "run")


def test_checkpoints_that_a_kill_at_the_very_end_left_are_removed(
    place: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyrolora.cli.runs.Run.tidy", lambda run: None)
        done(*command(place, run))
    assert list(run.glob("checkpoint-*"))
    assert "finished" in done(*command(place, run)).err
    assert not list(run.glob("checkpoint-*"))


def test_an_export_to_a_full_disk_is_a_message(place: Path, disk: Disk) -> None:
    full = disk("40k")
    for form, name in (("arviz", "a.nc"), ("transformers", "merged"), ("peft", "adapter")):
        fill(full)
        result = pyrolora_("export", place / "run", full / name, "--to", form)
        refused(result, "cannot write", name, code=1)
        (full / "filling").unlink()
    assert [path.name for path in full.iterdir() if path.is_file()] == []


def test_the_file_for_arviz_is_what_arviz_writes(place: Path, tmp_path: Path) -> None:
    idata = pyrolora.load(place / "run").to_arviz(5, data=reviews(3), seed=0)
    idata.to_netcdf(str(tmp_path / "theirs.nc"))
    (tmp_path / "ours.nc").write_bytes(netcdf(idata))
    ours, theirs = (arviz.from_netcdf(tmp_path / f"{name}.nc") for name in ("ours", "theirs"))
    assert set(_groups(ours)) == set(_groups(theirs))
    for group in _groups(theirs):
        assert ours[group].identical(theirs[group])


def _groups(idata: Any) -> Any:
    return idata.children if hasattr(idata, "children") else idata.groups()
