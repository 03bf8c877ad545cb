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
    classifiers: Any, writers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    folders = {"encoder": classifiers.base, "decoder": writers.base}
    monkeypatch.setattr(zoo, "folder", folders.__getitem__)
    spec = importlib.util.spec_from_file_location("benchmark_serve", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_serve", module)
    spec.loader.exec_module(module)
    small = {
        "posteriors": 3,
        "draws": 2,
        "concurrency": 4,
        "requests": 6,
        "soak": 20,
        "texts": 3,
        "repeats": 1,
    }
    small |= {"writing-requests": 4, "writing-soak": 20, "new-tokens": 4}
    options = [str(part) for name, value in small.items() for part in (f"--{name}", value)]
    module.main([*options, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "serve-cpu.json").read_text())
    for route in ("/classify", "/generate"):
        assert found[f"{route} f: answered"] + found[f"{route} f: hung up"] == 20
        assert found[f"{route} f: hung up"] > 0
        assert found[f"{route} f: failed"] == 0
        assert found[f"{route} f: answered otherwise than alone"] == 0
        assert found[f"{route} f: left in the queue"] == 0
        assert found[f"{route} d: MiB of tensors that a posterior adds"] > 0
        loads = {row["load"] for row in found["loads"]}
        assert loads >= {f"{route}: one posterior", f"{route}: 3 in turn"}
    for name in ("forward", "generate"):
        ours, theirs, ratio = found[f"c: {name}: milliseconds of ours, of PEFT's, ratio"]
        assert ratio == pytest.approx(ours / theirs, rel=0.2)
    assert "answers per second" in (tmp_path / "serve-cpu.md").read_text()
