"""``pyrolora serve`` as a process of its own, and what it refuses."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from console import done, pyrolora_, refused
from servers import post

from pyrolora.cli.serve import _bytes
from pyrolora.errors import ConfigError
from pyrolora.serving.run import is_loopback

BODY = {"inputs": "the film was good", "parameters": {"adapter_id": "reviews"}}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "")  # which the command would set for good


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_it_serves_until_it_is_interrupted(classifiers: Any, tmp_path: Path) -> None:
    port = free_port()
    command = [
        *(sys.executable, "-m", "pyrolora", "serve", classifiers.directory),
        *("--model", classifiers.base, "--port", port, "--budget", "10MB", "--num-samples", 4),
    ]
    key = {"PYROLORA_API_KEY": "secret"}
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=log,
            stderr=log,
            env={**os.environ, **key, "TQDM_DISABLE": "1"},
        )
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 240
        try:
            while process.poll() is None and time.monotonic() < deadline:
                try:
                    httpx.get(f"{url}/health")
                    break
                except httpx.ConnectError:
                    time.sleep(0.1)
            assert post(f"{url}/classify", json=BODY).status_code == 401
            headers = {"Authorization": "Bearer secret"}
            response = post(f"{url}/classify", json=BODY, headers=headers)
            assert response.json()[0]["uncertainty"]["num_samples"] == 4
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        said = log.read()
    assert "posteriors (3): other, reviews, third" in said
    assert f"serving at http://127.0.0.1:{port}" in said
    assert "secret" not in said


def test_its_help_teaches() -> None:
    said = re.sub(r"\x1b\[[0-9;]*m", "", done("serve", "--help").out)
    for word in ("/v1/completions", "adapter_id", "PYROLORA_API_KEY", "--budget", "uncertainty"):
        assert word in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget", "much"], "500MB or 2GB"),
        (["--budget", "0"], "500MB or 2GB"),
        (["--default", "nobody"], "--default names 'nobody'"),
        (["--api-key", " "], "the key is empty"),
        (["--api-key", "secret "], "begins or ends with a space"),
        (["--api-key", "two\nlines"], "control character"),
    ],
)
def test_wrong_options_are_refused(classifiers: Any, options: list[str], words: str) -> None:
    command = ["serve", str(classifiers.directory), "--model", str(classifiers.base)]
    refused(pyrolora_(*command, *options), words)


def test_an_empty_key_in_the_environment_is_not_no_key(
    classifiers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYROLORA_API_KEY", "")
    command = ["serve", str(classifiers.directory), "--model", str(classifiers.base)]
    refused(pyrolora_(*command), "the key is empty")


def test_a_directory_that_there_is_not_is_refused(tmp_path: Path) -> None:
    refused(pyrolora_("serve", tmp_path / "x", "--model", "y"), "there is no folder")


def test_without_the_extra_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "fastapi" else original(name)
    )
    result = pyrolora_("serve", tmp_path, "--model", "y")
    refused(result, "fastapi", "pip install 'pyrolora[serve]'")


def test_other_commands_need_no_web_framework() -> None:
    script = (
        "import sys, pyrolora, pyrolora.cli, pyrolora.serving\n"
        "print(sorted({'fastapi', 'uvicorn', 'starlette', 'prometheus_client'} & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "size"),
    [("500", 500), ("500MB", 5 * 10**8), ("1.5 gb", 1_500_000_000), ("2G", 2 * 10**9)],
)
def test_sizes(text: str, size: int) -> None:
    assert _bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-5", "5 apples", "1e9", "0.1"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="500MB or 2GB"):
        _bytes(text)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *(("127.0.0.1", True), ("127.1.2.3", True), ("localhost", True), ("::1", True)),
        *(("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("localhost.evil", False)),
    ],
)
def test_which_addresses_are_of_this_machine_alone(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
