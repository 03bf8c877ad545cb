"""The commands and the Python of the documentation of the server run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from console import pyrolora_
from pages import ROOT, blocks
from servers import get, post, running

from pyrolora.serving import run
from pyrolora.serving.app import create_app
from pyrolora.serving.service import Service

SERVING = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
ADDRESS = "http://127.0.0.1:8000"


def test_the_documented_server_answers_the_documented_request(
    classifiers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "")
    shutil.copytree(classifiers.directory / "reviews", "posteriors/first")
    answers: list[Any] = []
    (body,) = re.findall(r"-d '(\{.*\})'", SERVING)

    def ask(service: Service, *, host: str, port: int, key: str | None) -> None:
        assert (f"http://{host}:{port}", key) == (ADDRESS, None)
        with running(create_app(service)) as url:
            answers.append(post(f"{url}/classify", json=json.loads(body)).json())

    monkeypatch.setattr(run, "run", ask)
    (line,) = re.findall("^pyrolora serve .* --model .*$", SERVING, re.MULTILINE)
    result = pyrolora_(*shlex.split(line.replace(HUB_ID, str(classifiers.base)))[1:])
    assert result.code == 0, result.err
    assert {"score", "uncertainty"} <= answers[0][0].keys()


def test_the_python_of_the_documentation_runs(
    writing: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = blocks(ROOT / "docs" / "serving.md")
    for said, here in ((ADDRESS, writing.url), ('"books"', '"plain"')):
        assert said in code
        code = code.replace(said, here)
    names: dict[str, Any] = {}
    exec(compile(code, "serving.md", "exec"), names)
    names["client"].close()
    assert float(capsys.readouterr().out.split()[-1]) >= 0


def test_every_route_is_documented(writing: Any) -> None:
    paths = get(f"{writing.url}/openapi.json").json()["paths"]
    documented = {
        path.replace("NAME", "{name}") for path in re.findall(r"/[\w/]*NAME|/[\w/]+", SERVING)
    }
    assert {path for path in paths if path not in ("/", *documented)} == set()
