"""The faults that `make verify` plants can all be planted, and a fault that nobody sees is told."""

from __future__ import annotations

import ast
import importlib
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def mutations(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("mutations")


def test_every_fault_applies_to_the_code_as_it_is_and_names_tests_that_exist(
    mutations: ModuleType,
) -> None:
    assert len(mutations.FAULTS) >= 20
    names = Counter(fault.name for fault in mutations.FAULTS)
    assert max(names.values()) == 1
    for fault in mutations.FAULTS:
        before = ast.dump(ast.parse((ROOT / fault.file).read_text()))
        assert ast.dump(ast.parse(mutations.faulty(fault, ROOT))) != before, fault.name
        assert fault.tests
        for test in fault.tests:
            file, _, name = test.partition("::")
            assert f"def {name or 'test_'}" in (ROOT / file).read_text(), fault.name


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A package with one function, a test of it, and one that sees nothing."""
    for name, text in {
        "pyrolora/__init__.py": "",
        "pyrolora/core.py": "def twice(x):\n    return 2 * x\n",
        "tests/test_core.py": "from pyrolora.core import twice\n\n\n"
        "def test_twice():\n    assert twice(3) == 6\n\n\n"
        "def test_zero():\n    assert twice(0) == 0\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def bare(mutations: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, whose processes start at once: this project imports nothing."""
    import multiprocessing

    server: Any = multiprocessing.get_context("spawn")
    monkeypatch.setattr(mutations, "SERVER", server)
    return mutations


@pytest.mark.parametrize(
    ("old", "new", "test", "says"),
    [
        ("2 * x", "3 * x", "test_twice", ""),
        ("2 * x", "3 * x", "test_zero", "SURVIVED"),
        ("return 2", "retrun 2", "test_twice", "could not be run"),
        ("4 * x", "3 * x", "test_twice", "0 times"),
        ("x", "y", "test_twice", "2 times"),
    ],
)
def test_a_fault_is_caught_or_told(
    bare: ModuleType, project: Path, old: str, new: str, test: str, says: str
) -> None:
    fault = bare.Fault("f", "pyrolora/core.py", old, new, (f"tests/test_core.py::{test}",))
    copy = bare.copy_of(project, project.parent / f"{project.name}-copy")
    said = bare.verdict(fault, project, copy)
    assert says in said
    assert bool(said) == bool(says)
    assert (copy / fault.file).read_text() == (project / fault.file).read_text()


def test_tests_that_fail_without_a_fault_are_told(bare: ModuleType, project: Path) -> None:
    fault = bare.Fault("f", "pyrolora/core.py", "2 * x", "3 * x", ("tests/test_core.py",))
    (project / "pyrolora/core.py").write_text("def twice(x):\n    return x\n")
    (wrong,) = bare.run([fault], project, say=lambda line: None)
    assert "fail without a fault" in wrong
    assert bare.run([], project)


@pytest.mark.parametrize(("broken", "says"), [(True, "0 of 2"), (False, "1 of 2")])
def test_a_fault_that_was_not_planted_does_not_count_as_caught(
    bare: ModuleType,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    broken: bool,
    says: str,
) -> None:
    file = "pyrolora/core.py"
    tests = [("tests/test_core.py::test_twice",), ("tests/test_core.py::test_zero",)]
    faults = [bare.Fault(str(i), file, "* x", "* x + x", (*t,)) for i, t in enumerate(tests)]
    if broken:
        (project / file).write_text("def twice(x):\n    return 1 * x\n")
    monkeypatch.setattr(bare, "ROOT", project)
    monkeypatch.setattr(bare, "FAULTS", faults)
    monkeypatch.setattr("sys.argv", ["mutations.py"])
    assert bare.main() == 1
    assert f"{says} faults caught" in capsys.readouterr().out


def test_tests_that_take_too_long_are_stopped_and_told(bare: ModuleType, project: Path) -> None:
    (project / "tests/test_core.py").write_text(
        "import time\n\n\ndef test_long():\n    time.sleep(60)\n"
    )
    status, said = bare.run_tests(["tests/test_core.py"], project, 1)
    assert status not in (bare.PASSED, bare.FAILED)
    assert "stopped after 1 s" in said
