"""The README's Python runs, block after block, in one folder, as a reader would run it."""

from __future__ import annotations

import re
from pathlib import Path

from problems import bert, reviews, tokenizer

README = Path(__file__).parents[1] / "README.md"


def test_the_readmes_python_runs(tmp_path, monkeypatch, capsys):
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    bert(initializer_range=0.3).save_pretrained("encoder")
    tokenizer().save_pretrained("encoder")
    reviews(48).to_json("train.jsonl")
    reviews(24, seed=1).to_json("test.jsonl")
    namespace: dict[str, object] = {}
    for block in blocks:
        # The only change: a folder here for the hub id, which needs a network.
        code = block.replace("sentence-transformers/all-MiniLM-L6-v2", str(tmp_path / "encoder"))
        exec(compile(code, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "'ece'" in printed
    assert "elpd_loo" in printed
    assert "torch.Size([10, 8])" in printed
    main = blocks[0]
    assert len([line for line in main.splitlines() if line.strip()]) <= 20


def test_the_readme_names_the_commands_that_exist():
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for verb in re.findall(r"^make (\w+)", README.read_text(encoding="utf-8"), flags=re.MULTILINE):
        assert re.search(rf"^{verb}:", makefile, flags=re.MULTILINE), verb
