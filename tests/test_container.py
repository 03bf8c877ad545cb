"""The Dockerfile, as far as it can be checked without Docker."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from pathlib import Path

from typer.main import get_command

from pyrolora.cli import app

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
LINES = re.sub(r"\\\n\s*", " ", TEXT).splitlines()


def instruction(name: str) -> list[str]:
    return [line.removeprefix(f"{name} ") for line in LINES if line.startswith(f"{name} ")]


def test_what_it_copies_is_there_and_sent_to_the_build() -> None:
    copied = [
        name
        for line in instruction("COPY")
        if not line.startswith("--from")
        for name in line.split()[:-1]
    ]
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sent = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert "*" in ignored
    assert sent == set(copied)
    assert all((ROOT / name).exists() for name in copied)


def test_the_package_builds_from_what_is_copied() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    copied = {name for line in instruction("COPY") for name in line.split()[:-1]}
    build = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*build["packages"], *build["force-include"], project["project"]["readme"]}
    assert needed | {*project["project"]["license-files"], "pyproject.toml"} <= copied
    assert "serve" in project["project"]["optional-dependencies"]
    assert any("[serve]" in line for line in instruction("RUN"))


def test_it_serves_as_a_user_without_rights() -> None:
    stages = TEXT.split("FROM ")[1:]
    (user,) = instruction("USER")
    assert len(stages) == 2
    assert user != "root"
    assert f"useradd --create-home --uid 10001 {user}" in stages[-1]
    assert stages[-1].index("USER") < stages[-1].index("ENTRYPOINT")
    (command,) = (json.loads(line) for line in instruction("ENTRYPOINT"))
    (options,) = (json.loads(line) for line in instruction("CMD"))
    assert command == ["pyrolora", "serve"]
    parser = get_command(app).commands["serve"]
    context = parser.make_context("serve", list(options))  # as the command line reads them
    assert context.params["host"] == "0.0.0.0"
    assert context.params["model"] == "/network"


def test_its_health_check_is_a_program_that_asks_the_server() -> None:
    (check,) = instruction("HEALTHCHECK")
    words = json.loads(check[check.index("[") :])
    assert words[:2] == ["python", "-c"]
    compile(words[2], "healthcheck", "exec")
    assert ":8000/health" in words[2]
    assert instruction("EXPOSE") == ["8000"]
    assert shutil.which("python") or shutil.which("python3")
