"""Extreme numbers end in a finite posterior, or in an error of ours: `benchmarks/extremes.py`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import mlp

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.errors import DataError, NonFiniteError

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# What Trainer, guides and searches say of such numbers is not the subject.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def extremes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("extremes")
    for name in ("extremes", "fuzz", "fuzz_mutations"):
        sys.modules.pop(name, None)


def test_a_part_of_the_table(extremes: Any) -> None:
    """All extremes of data and network that are no options, each with another guide."""
    size = len(extremes.GUIDES)
    chosen = extremes.cases()[: size * len(extremes.EXTREMES)][:: 2 * size + 1]
    assert len({case.guide for case in chosen}) == len(chosen)
    assert extremes.run(chosen) == 0


@pytest.mark.slow
def test_the_whole_table(extremes: Any) -> None:
    assert extremes.run(extremes.cases()) == 0


def test_the_table_tells_a_failure(extremes: Any, monkeypatch: Any, capsys: Any) -> None:
    def broken(network: Any, *given: Any, **options: Any) -> None:
        with torch.no_grad():
            next(network.parameters()).add_(1)
        raise pyrolora.errors.ConfigError("refused, after the damage was done")

    monkeypatch.setattr(extremes.pyrolora, "fit", broken)
    assert extremes.run(extremes.cases()[:1]) == 1
    monkeypatch.setattr(extremes.pyrolora, "fit", lambda *given, **options: 1 / 0)
    assert extremes.run(extremes.cases()[:1]) == 1
    said = capsys.readouterr().out
    assert "silent: " in said
    assert "raw: " in said
    assert "ZeroDivisionError" in said


DATA = (torch.linspace(-2, 2, 32).view(8, 4), torch.arange(8) % 3)
OPTIONS = {"task": "classification", "adapter": AdapterConfig(r=2), "epochs": 1}


@pytest.mark.parametrize("form", ["tensors", "dicts", "own class"])
def test_features_beyond_the_first_thousand_are_checked(extremes: Any, form: str) -> None:
    fit = extremes.with_feature(float("nan"), 1600, 1500, form)
    network = fit.network()
    with pytest.raises(DataError, match="example 1500 is not finite"):
        pyrolora.fit(network, fit.data(), "map", **OPTIONS)
    with pytest.raises(DataError, match="example 1500 is not finite"):
        pyrolora.fit(network, extremes.features(8), "map", eval_data=fit.data(), **OPTIONS)


def test_a_weight_that_is_not_finite_is_named_before_any_step(steps: list[int]) -> None:
    network = mlp()
    with torch.no_grad():
        network[0].weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"before any step.*'base\.0") as caught:
        pyrolora.fit(network, DATA, "montec", **OPTIONS)
    assert caught.value.posterior is None
    assert not steps
    assert type(network[0]) is torch.nn.Linear


def test_a_prior_as_wide_as_no_float_is_an_error_of_the_fit() -> None:
    guide = pyrolora.guides.Laplace(prior_scale=1e30)
    with pytest.raises(NonFiniteError, match="'laplace' cannot be used"):
        pyrolora.fit(mlp(), DATA, guide, **OPTIONS)


def test_labels_whose_squares_are_infinite_are_refused() -> None:
    with pytest.raises(DataError, match="standardise"):
        pyrolora.fit(mlp(outputs=1), (torch.randn(8, 4), torch.full((8,), 1e30)), task="regression")
