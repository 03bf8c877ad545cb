"""The Python and the commands of README and documentation run, page by page, as a reader would."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hubs import Hub
from huggingface_hub import ModelCard
from pages import PAGES, README, ROOT, START, blocks, furnish, run, yours

import pyrolora
from pyrolora.cli import main

# tests/serving/test_serving_docs.py has a server for its Python; a test below, a hub.
ELSEWHERE = {"serving.md", "hub.md"}
STAYS = {"serve", "demo"}  # commands that do not end, or take minutes; they have tests of their own
PYTHON = [p for p in PAGES if blocks(p) and p != START and p.name not in ELSEWHERE]
PRINTED = {
    "README.md": ["'ece'", "nll_difference"],
    "decisions.md": ["'ood_auroc'", "nll_difference", "Calibration(temperature="],
    "posterior.md": ["elpd_loo", "torch.Size([10, 8])"],
}


def commands(page: Path) -> list[list[str]]:
    """The commands of a page that a test can run."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    found = [shlex.split(line) for line in lines if line.startswith("pyrolora ")]
    return [command[1:] for command in found if command[1] not in STAYS]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The names that someone has who has followed Start, and stands in their folder."""
    folder = tmp_path_factory.mktemp("reader")
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        furnish(folder)
        run(START, names)
        yield names


def is_posterior(known: Any) -> bool:
    return isinstance(known, pyrolora.Posterior)


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(
    page: Path, reader: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    names = {} if page == README else {**reader, **yours().get(page.name, {})}
    kept = {name: known.temperature for name, known in reader.items() if is_posterior(known)}
    run(page, names)
    for name, temperature in kept.items():  # whatever the page has calibrated
        reader[name].temperature = temperature
    printed = capsys.readouterr().out
    for words in PRINTED.get(page.name, []):
        assert words in printed


def test_the_python_of_the_hubs_page_runs_with_a_hub_that_is_a_folder(
    reader: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path("hub").absolute()
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub(root))
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **options: str(root / repo)
    )
    names = dict(reader)
    for block in blocks(README.parent / "docs" / "hub.md"):
        if "PeftModel" in block:  # PEFT has the repository here, where it looks first
            shutil.copytree("hub/me", "me")
        exec(compile(block, "hub.md", "exec"), names)
    assert names["mean"].peft_config["default"].peft_type == "LORA"
    assert Path("reviews/README.md").is_file()
    assert ModelCard.load(root / "me/reviews/README.md").data.license == "mit"


def test_start_ends_with_what_it_promises(reader: dict[str, Any]) -> None:
    assert set(reader["rivals"]) == {"adapter", "temperature", "tfb", "laplace"}
    assert reader["given"].options.name == "map"
    assert reader["calibrated"].temperature != 1
    assert Path("run").is_dir()
    assert Path("mean/adapter_config.json").is_file()


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda page: page.name)
def test_the_commands_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path)
    for command in commands(page):
        with pytest.raises(SystemExit) as done:
            main(command)
        assert done.value.code == 0, command


def test_the_page_of_the_command_line_shows_the_verbs() -> None:
    shown = {command[0] for page in PAGES for command in commands(page)}
    assert {"fit", "evaluate", "predict", "compare", "report", "export"} <= shown


def test_the_readme_is_short_and_names_commands_that_exist() -> None:
    text = README.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    verbs = re.findall(r"^make (\w+)", text, flags=re.MULTILINE)
    assert {"demo", "test"} <= set(verbs)
    for verb in [*verbs, *re.findall(r"`make (\w+)`", text)]:
        assert re.search(rf"^{verb}:", makefile, flags=re.MULTILINE), verb
    assert "docs/demo.png" in text
    assert len(text.splitlines()) <= 130
    assert len([line for line in blocks(README)[0].splitlines() if line.strip()]) <= 20


def test_the_excerpts_in_contributing_are_those_of_the_code() -> None:
    sources = [*(README.parent / "pyrolora").rglob("*.py"), README.parent / "tests/counting.py"]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    for block in blocks(README.parent / "CONTRIBUTING.md"):
        for kind, name, rest in re.findall(r"^ *(class|def) (\w+)\(([\w.]*)", block, re.MULTILINE):
            base = re.escape(rest.removeprefix("pyrolora.tasks.")) if kind == "class" else ""
            assert re.search(rf"{kind} {name}\((?:\w+\.)*{base}", code), name


def test_the_commands_that_show_what_is_promised_exist() -> None:
    """What they name is there: files, options of scripts, and the words that choose tests."""
    shown = re.findall(
        r"`((?:pytest|python|make) [^`]+)`", (ROOT / "docs" / "reliability.md").read_text()
    )
    assert len(shown) >= 15
    for command in shown:
        program, *words = shlex.split(command)
        if program == "make":
            assert f"\n{words[0]}:" in (ROOT / "Makefile").read_text(), command
            continue
        files = [ROOT / word for word in words if word.endswith(".py")]
        text = "".join(file.read_text() for file in files)
        assert text, command
        if program == "python":
            assert all(f'"{word}"' in text for word in words if word.startswith("--")), command
        elif "-k" in words:
            chosen = words[words.index("-k") + 1].split(" or ")
            assert all(re.search(rf"def test_\w*{word}", text) for word in chosen), command
        if "slow" in words:
            assert "mark.slow" in text, command
