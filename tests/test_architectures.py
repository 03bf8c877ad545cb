"""The short version of the table of architectures, and that the docs have it as it is."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from pyrolora.adapters import projections

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs" / "architectures.md"
SHORT = ["deberta", "gpt2", "qwen3_moe", "mamba", "t5", "vit"]
"""A fused projection, a Conv1D, experts, no attention, two stacks, pictures."""


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("architectures")


def documented() -> dict[str, str]:
    lines = DOCS.read_text().splitlines()
    return {line.split("`")[1]: line for line in lines if line.startswith("| `")}


@pytest.mark.parametrize("name", SHORT)
def test_an_architecture_is_as_the_docs_have_it(name: str, matrix: Any) -> None:
    found = matrix.row(name)
    assert found.wrong == 0
    assert matrix.table([found]).splitlines()[-1] == documented()[name]


def test_the_docs_have_every_architecture_and_nothing_wrong(matrix: Any) -> None:
    rows = documented()
    assert list(rows) == list(matrix.ARCHITECTURES)
    assert not [name for name, line in rows.items() if "**" in line]
    refused = [name for name, line in rows.items() if "refused" in line]
    text = DOCS.read_text().partition("## Table")[0]
    assert all(f"`{name}`" in text for name in refused)


def test_without_peft_the_layers_are_the_same(matrix: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for RWKV, as the docs say."""
    networks = {name: matrix.build(name) for name in matrix.ARCHITECTURES}
    found = {name: projections.projections(network) for name, network in networks.items()}
    monkeypatch.setattr(projections, "_of_peft", lambda network: [])
    other = {name: projections.projections(network) for name, network in networks.items()}
    assert [name for name in networks if found[name] != other[name]] == ["rwkv"]
    assert other["rwkv"] == []


def test_a_wrong_update_is_seen(matrix: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With A and B of another scaling the cells are wrong."""
    monkeypatch.setattr(matrix, "ALPHA", 1.0)
    posterior = matrix.fitted("gpt2", "auto", data := matrix.Examples("CausalLM"))
    with torch.no_grad():
        posterior.bank.get_parameter("B_loc").normal_()
    monkeypatch.setattr(matrix, "ALPHA", 2.0)
    found = matrix.Row([])
    found.check(lambda: matrix.draws(posterior, matrix.build("gpt2"), data))
    assert found.wrong == 1
    assert "off by" in found.cells[0]
