"""The files that go to a package index: what is in them, what they say, and that they work."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from lowest import lowest, requirements
from packaging.requirements import Requirement

import pyrolora
from pyrolora.cli import main

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = ("pyrolora/py.typed", "pyrolora/_models/", "pyrolora/posterior.py")
LOCKED = ("peft", "serve", "dev", "docs")
"""The extras of the lock file: what a developer installs."""


def run(*command: object, cwd: Path) -> str:
    """Run a command on this Python, away from the repository."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# What is stated ----------------------------------------------------------------------------------


def test_the_version_is_the_same_wherever_it_is_stated():
    version = PROJECT["version"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) == [version]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changes, re.MULTILINE)[0] == version


def test_the_command_and_the_module_say_which_version_is_installed(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"pyrolora {pyrolora.__version__}\n"
    assert pyrolora.__version__ == metadata.version("pyrolora")


def test_every_dependency_has_a_lower_bound_that_is_tested():
    assert all(lowest(requirement) for requirement in requirements())


def locked() -> Iterator[Requirement]:
    """The requirements of the lock file."""
    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if text:
            yield Requirement(text)


def test_the_lock_file_has_every_dependency_in_a_version_that_is_allowed():
    pins = {pin.name.lower().replace("_", "-"): pin for pin in locked()}
    for pin in pins.values():
        assert pin.url is None
        assert [clause.operator for clause in pin.specifier] == ["=="]
    for text in requirements(LOCKED):
        wanted = Requirement(text)
        name = wanted.name.lower().replace("_", "-")
        assert name in pins, f"{name} is not in requirements.lock; run 'make lock'"
        (clause,) = pins[name].specifier
        assert wanted.specifier.contains(clause.version), f"{text}: run 'make lock'"
    local = [str(pin) for pin in pins.values() if "+" in str(pin.specifier)]
    assert not local, f"{local}: a version of one index alone; run 'make lock'"
    assert "://" not in (ROOT / "requirements.lock").read_text(encoding="utf-8")


# What is built -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.mark.slow
def test_the_wheel_has_the_package_its_types_and_its_models_and_says_what_it_needs(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (stated_in,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        stated = Parser().parsestr(archive.read(stated_in).decode())
    for needed in NEEDED:
        assert any(name.startswith(needed) for name in names), needed
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names} == {"pyrolora", stated_in.split("/")[0]}
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "pyrolora").rglob("*.py")}
    assert modules <= set(names)
    assert stated["Version"] == PROJECT["version"]
    required = {Requirement(r) for r in stated.get_all("Requires-Dist") if "extra" not in r}
    assert required == {Requirement(r) for r in PROJECT["dependencies"]}


@pytest.mark.slow
def test_the_sdist_has_what_the_tests_need(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    for needed in (
        "pyproject.toml",
        "LICENSE",
        "CHANGELOG.md",
        "CITATION.cff",
        "tests/problems.py",
    ):
        assert needed in names, needed


USE = """
import torch, pyrolora
from pyrolora import zoo
from pathlib import Path
assert Path(pyrolora.__file__).is_relative_to(Path.cwd()), pyrolora.__file__
assert Path(zoo.folder("encoder")).is_relative_to(Path.cwd())
data = [{"text": text, "label": i % 2} for i, text in enumerate(["a good film", "a bad book"] * 4)]
posterior = pyrolora.fit(zoo.folder("encoder"), data, epochs=1, seed=0)
posterior.save("saved")
again = pyrolora.load("saved").predict(data, 2, seed=0).probs
assert torch.equal(again, posterior.predict(data, 2, seed=0).probs)
print(pyrolora.__version__)
"""


@pytest.mark.slow
def test_the_installed_wheel_fits_saves_and_loads_with_its_own_model(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    run("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", tmp_path, wheel,
        cwd=tmp_path)  # fmt: skip
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{USE}"
    assert run("-I", "-c", program, cwd=tmp_path).split()[-1] == PROJECT["version"]
    commands = run("-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
        "from pyrolora.cli import main; main(['--help'])", cwd=tmp_path)  # fmt: skip
    assert "generate" in commands
