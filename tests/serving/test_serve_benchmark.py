"""The benchmark of the server on a tiny network: that it measures what it says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pyrolora import zoo

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve.py"


def test_every_answer_is_right_and_none_is_lost(
    classifiers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(zoo, "folder", lambda name: classifiers.base)
    spec = importlib.util.spec_from_file_location("benchmark_serve", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_serve", module)
    spec.loader.exec_module(module)
    small = {"posteriors": 3, "draws": 2, "concurrency": 4, "requests": 6, "soak": 20, "texts": 3}
    options = [str(part) for name, value in small.items() for part in (f"--{name}", value)]
    module.main([*options, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "serve-cpu.json").read_text())
    assert found["f: answered"] + found["f: hung up"] == 20
    assert found["f: hung up"] > 0
    assert found["f: failed"] == found["f: answered with other numbers than alone"] == 0
    assert found["f: left in the queue"] == 0
    assert {row["load"] for row in found["loads"]} >= {"one posterior", "3 in turn"}
    assert "answers per second" in (tmp_path / "serve-cpu.md").read_text()
