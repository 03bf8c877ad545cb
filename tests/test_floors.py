"""Imports point one way: a module of floor n imports modules of lower floors only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pyrolora

PACKAGE = Path(pyrolora.__file__).parent
FLOORS = {
    "errors": 0,
    "checks": 0,
    "defaults": 0,
    "columns": 0,
    "visible": 0,
    "files": 1,
    "folder_lock": 1,
    "json_values": 1,
    "matrices": 1,
    "options": 1,
    "parameters": 1,
    "processes": 1,
    "progress": 1,
    "seeding": 1,
    "zoo": 1,
    "distributions": 1,
    "adapters": 2,
    "data": 3,
    "tasks": 4,
    "guides": 4,
    "model": 5,
    "attaching": 5,
    "inference": 6,
    "predictive": 7,
    "storage": 7,
    "peft": 8,
    "arviz": 8,
    "plots": 8,
    "pipelines": 8,
    "diagnostics": 9,
    "report": 10,
    "posterior": 11,
    "loading": 12,
    "comparing": 12,
    "fitting": 13,
    "demo": 14,
    "serving": 14,
    "harness": 14,
    "cli": 15,
    "__main__": 16,
}
# The package's own __init__ names what users see: below floor 1 at once, the others on use.
ROOT = "__init__"
# Checks raise the errors, and options are read like files.
WITHIN_A_FLOOR = {("checks", "errors"), ("options", "files")}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    """The folder or the module of the top level that a file belongs to."""
    return path.parts[0].removesuffix(".py")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(tree: ast.AST, skip_type_checking: bool):
    """Every node, those in functions too; without the bodies of TYPE_CHECKING blocks if asked."""
    for node in ast.iter_child_nodes(tree):
        if skip_type_checking and is_type_checking(node):
            for other in node.orelse:
                yield other
                yield from statements(other, skip_type_checking)
            continue
        yield node
        yield from statements(node, skip_type_checking)


def imports(source: str, package: tuple[str, ...], skip_type_checking: bool = False):
    """Dotted names that a source imports; ``package`` resolves its relative imports."""
    for node in statements(ast.parse(source), skip_type_checking):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            stem = [*package[: len(package) - node.level + 1]] if node.level else []
            stem += [node.module] if node.module else []
            # ``from pyrolora import model`` imports a module, too.
            yield from (".".join([*stem, alias.name]) for alias in node.names)


def imports_of(path: Path) -> list[str]:
    package = ("pyrolora", *path.parts[:-1])
    source = (PACKAGE / path).read_text()
    return list(imports(source, package, skip_type_checking=path == Path("__init__.py")))


def parts_imported(names: list[str]) -> set[str]:
    """The top-level parts of pyrolora among dotted names; ``pyrolora.fit`` and the like are the
    public face, which nothing inside may import."""
    return {name.split(".")[1] for name in names if name.startswith("pyrolora.")}


def test_every_module_of_the_package_has_a_floor_and_every_floor_a_module():
    assert {part(path) for path in MODULES} == {*FLOORS, ROOT}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_module_imports_lower_floors_only(path):
    own = part(path)
    floor = 1 if own == ROOT else FLOORS[own]
    found = parts_imported(imports_of(path)) - {own}
    unknown = found - FLOORS.keys()
    assert not unknown, f"{path} imports {unknown}, which have no floor"
    too_high = {
        name for name in found if FLOORS[name] >= floor and (own, name) not in WITHIN_A_FLOOR
    }
    assert not too_high, f"{path} is on floor {floor} and imports {too_high}"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_module_imports_the_package_by_parts_and_never_the_whole(path):
    assert "pyrolora" not in imports_of(path)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_the_package_never_imports_benchmarks_or_tests(path):
    outside = {"benchmarks", "tests", "problems", "conformance", "conftest"}
    assert not {name.split(".")[0] for name in imports_of(path)} & outside


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import pyrolora.model", {"model"}),
        ("import pyrolora.model as m, os", {"model"}),
        ("from pyrolora import model, guides", {"model", "guides"}),
        ("from pyrolora.guides.base import Guide", {"guides"}),
        ("def f():\n    from pyrolora.model import JointModel", {"model"}),
        ("class A:\n    def f(self):\n        if 1:\n            import pyrolora.model", {"model"}),
        ("from ..model import JointModel", {"model"}),
        ("from .. import model", {"model"}),
        ("from .base import Guide", {"guides"}),
        ("if TYPE_CHECKING:\n    from pyrolora.model import JointModel", {"model"}),
        ("import torch\nfrom collections import abc", set()),
    ],
)
def test_the_parser_finds_imports_of_every_form(source, expected):
    """Otherwise the tests above would pass for want of looking."""
    assert parts_imported(list(imports(source, ("pyrolora", "guides")))) == expected


def test_the_parser_leaves_out_type_checking_blocks_where_they_are_exempt():
    source = "if TYPE_CHECKING:\n    import pyrolora.model\nelse:\n    import pyrolora.guides"
    found = list(imports(source, ("pyrolora",), skip_type_checking=True))
    assert found == ["pyrolora.guides"]


def test_importing_pyrolora_imports_no_heavy_library():
    """A fresh process, as this one has long imported them all."""
    script = (
        "import sys, pyrolora\n"
        "heavy = {'transformers', 'datasets', 'arviz', 'pandas', 'pyro', 'torch'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", pyrolora.__all__)
def test_every_public_name_can_be_had(name):
    assert getattr(pyrolora, name) is not None
    assert name in dir(pyrolora)


def test_a_name_that_is_not_public_raises_an_attribute_error():
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = pyrolora.nothing
