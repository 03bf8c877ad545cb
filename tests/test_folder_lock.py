"""One fit at a time in a folder, whoever else asks is told who fits in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from problems import arguments, bert, tokens

import pyrolora
from pyrolora.errors import ConfigError
from pyrolora.folder_lock import LOCK_FILE, locked

HOLD = """
import sys, time
from pyrolora.folder_lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""
OPTIONS = {"adapter": pyrolora.AdapterConfig(r=2), "epochs": 1}


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a folder."""
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with process:
        yield process, folder
        process.kill()


def test_a_folder_in_use_is_refused_by_who_uses_it_and_free_once_that_was_killed(holder, steps):
    process, folder = holder
    message = f"in use: process {process.pid} on .* since 20.*choose another output_dir"
    with pytest.raises(ConfigError, match=message):
        pyrolora.fit(bert(), tokens(8), "map", output_dir=folder, **OPTIONS)
    changes = {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(ConfigError, match=message):
        pyrolora.fit(bert(), tokens(8), "map", training=arguments(folder, **changes))
    assert not steps
    assert [path.name for path in folder.iterdir()] == [LOCK_FILE], "the loser changes nothing"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    pyrolora.fit(bert(), tokens(8), "map", output_dir=folder, **OPTIONS)
    assert (folder / "posterior.json").is_file()
    assert not (folder / LOCK_FILE).exists()


FORK = """
import os, sys, time
from pyrolora.folder_lock import locked
with locked(sys.argv[1]):
    if not os.fork():
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def test_a_process_that_the_holder_has_forked_does_not_keep_the_lock(tmp_path):
    """As the workers of a data loader are, which outlive a killed fit by seconds."""
    process = subprocess.Popen(
        [sys.executable, "-c", FORK, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.kill()
        process.wait()
        try:
            with locked(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_fit_that_writes_nothing_needs_no_folder(holder, tmp_path):
    _, folder = holder
    pyrolora.fit(bert(), tokens(8), "map", training=arguments(folder))


def test_a_thread_may_hold_it_again_and_another_may_not(tmp_path):
    errors = []

    def other():
        try:
            with locked(tmp_path / "." / "run"):
                pass
        except ConfigError as error:
            errors.append(str(error))

    with locked(tmp_path / "run"), locked(tmp_path / "run"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(10)
        assert f"process {os.getpid()}" in errors[0]
    assert not (tmp_path / "run").exists(), "it was made for the lock, and is empty"
    other()
    assert len(errors) == 1


def test_what_was_there_before_stays(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    assert tmp_path.is_dir()
    assert not [*tmp_path.iterdir()]


def test_a_file_left_by_a_killed_holder_and_a_planted_one_are_no_lock(tmp_path):
    (tmp_path / LOCK_FILE).write_text('{"pid": 1, "host": "gone", "since": "yesterday"}')
    with locked(tmp_path):
        pass
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    (tmp_path / LOCK_FILE).symlink_to(elsewhere)
    with pytest.raises(ConfigError, match=r"made a folder.*symbolic"), locked(tmp_path):
        pass
    assert elsewhere.read_text() == "mine"


CONTEND = """
import sys, time
from pathlib import Path
from pyrolora.errors import ConfigError
from pyrolora.folder_lock import locked
folder, name = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
for _ in range(300):
    try:
        with locked(folder):
            inside = folder.parent / "inside"
            inside.touch(exist_ok=False)  # fails if somebody else is here
            inside.unlink()
    except ConfigError:
        pass
print("done", flush=True)
"""


def test_two_processes_are_never_inside_at_once(tmp_path):
    """Each removes the file when it leaves, so that the other may lock one that is gone."""
    words = [sys.executable, "-c", CONTEND, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*words, name], **pipes) for name in "ab"]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        assert process.communicate(timeout=60)[0] == "done\n"
        assert process.returncode == 0


def test_two_equal_commands_started_together_make_one_run(tmp_path):
    """The loser says who is at it and takes nothing of the winner's away."""
    from console import saved

    network, output = saved(bert(), tmp_path / "network"), tmp_path / "run"
    rows = "".join(f'{{"text": "good film {i}", "label": {i % 2}}}\n' for i in range(8))
    (tmp_path / "train.jsonl").write_text(rows)
    words = [sys.executable, "-m", "pyrolora", "fit", str(tmp_path / "train.jsonl")]
    words += ["--model", str(network), "--output-dir", str(output), "--epochs", "2"]
    processes = [
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    codes = sorted(process.returncode for process in processes)
    told = " ".join(errors)
    assert codes[0] == 0, errors
    assert (output / "run.json").is_file()
    assert (output / "posterior.json").is_file()
    # By chance the second came when the first had finished: it then finds the run as it is.
    assert (codes[1] == 2 and "is in use: process" in told) or "finished" in told, errors
    assert Path(output / LOCK_FILE).exists() is False
