"""The notebooks run from top to bottom, and their committed output is whole."""

from __future__ import annotations

from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert "01_quickstart" in [path.stem for path in NOTEBOOKS]


FIRST = {"01_quickstart"}  # the others take longer: `make verify`
RUN = [
    pytest.param(path, marks=[] if path.stem in FIRST else [pytest.mark.slow], id=path.stem)
    for path in NOTEBOOKS
]


@pytest.mark.parametrize("path", RUN)
def test_a_notebook_runs_in_an_empty_folder(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYROLORA_SMOKE", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # raises CellExecutionError with the cell's traceback


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_committed_output_is_that_of_one_run_without_errors(path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = str(outputs)
    assert "Warning" not in text
    assert str(Path(__file__).parents[1]) not in text  # no path of the machine that ran it
