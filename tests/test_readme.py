"""The README's Python and its commands run, block after block, in one folder, as a reader would."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from problems import bert, reviews, tokenizer

from pyrolora.cli import main

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"  # stands for a folder here: no network


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bert(initializer_range=0.3).save_pretrained("encoder")
    tokenizer().save_pretrained("encoder")
    reviews(48).to_json("train.jsonl")
    reviews(24, seed=1).to_json("test.jsonl")
    return tmp_path


def test_the_readmes_python_runs(folder, capsys):
    python = blocks("python")
    assert len(python) == 10
    namespace: dict[str, object] = {}
    for block in python:
        code = block.replace(HUB_ID, str(folder / "encoder"))
        exec(compile(code, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "'ece'" in printed
    assert "elpd_loo" in printed
    assert "torch.Size([10, 8])" in printed
    assert "nll_difference" in printed
    assert (folder / "report.html").is_file()
    main_job = python[0]
    assert len([line for line in main_job.splitlines() if line.strip()]) <= 20


def test_the_readmes_commands_run(folder):
    commands = [
        shlex.split(line.replace(HUB_ID, "encoder"))
        for block in blocks("sh")
        for line in block.splitlines()
        if line.startswith("pyrolora ") and not line.startswith("pyrolora serve ")
    ]
    assert {command[1] for command in commands} == {
        *("fit", "evaluate", "predict", "compare", "report", "export"),
    }
    for command in commands:
        with pytest.raises(SystemExit) as done:
            main(command[1:])
        assert done.value.code == 0, command
    assert (folder / "predictions.csv").is_file()
    assert (folder / "posterior.nc").is_file()


def test_the_readme_names_the_commands_that_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    verbs = re.findall(r"^make (\w+)", TEXT, flags=re.MULTILINE)
    assert {"demo", "test"} <= set(verbs)
    for verb in verbs:
        assert re.search(rf"^{verb}:", makefile, flags=re.MULTILINE), verb


def test_the_files_that_the_readme_links_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", TEXT)
    assert "docs/demo.png" in links
    for link in links:
        assert (ROOT / link).exists(), link
