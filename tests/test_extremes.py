"""Extreme numbers end in a finite posterior, or in an error of ours: `benchmarks/extremes.py`."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import ABSOLUTE, mlp

import pyrolora
from pyrolora import AdapterConfig, guides
from pyrolora.errors import ConfigError, DataError, NonFiniteError

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
    """Every other extreme of data and network that is no option, with one guide after another."""
    size = len(extremes.GUIDES)
    chosen = extremes.cases()[: size * len(extremes.EXTREMES)][:: 2 * size + 1]
    assert len({case.guide for case in chosen}) == min(size, len(chosen))
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
SMALL = AdapterConfig(r=2)
OPTIONS = {"task": "classification", "adapter": SMALL, "epochs": 1}


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


ALPHA = AdapterConfig(r=2, lora_alpha=1e30)
CURVATURE = guides.MeanField(scale_updates="curvature", latent="AB")
REFUSED: dict[str, tuple[Any, AdapterConfig, str]] = {
    "a singular covariance": (
        guides.LowRank(init_scale=1e-30, scale_updates="gradient"),
        SMALL,
        r"before step 1, .* cannot be evaluated .*cholesky.* with init_scale=1e-30, r=2. Choose",
    ),
    "draws of infinity": (
        guides.LowRank(init_scale=1e30, scale_updates="gradient"),
        SMALL,
        r"before step 1, .* is not finite at site .* with init_scale=1e\+30, r=2. Choose",
    ),
    "noise of 1e30": (
        guides.MonteCLoRA(sample_scale=1e30, latent="AB"),
        SMALL,
        r"before step 1, .* with sample_scale=1e\+30, r=2. Choose",
    ),
    "scales by an infinite curvature": (
        dataclasses.replace(CURVATURE, init_scale=1e30),
        SMALL,
        r"before step 1, .* optimal scales \(.* is not finite: .* with init_scale=1e\+30",
    ),
    "scales that underflow": (
        dataclasses.replace(CURVATURE, prior_scale=1e-30),
        SMALL,
        r"'A_scale', 'B_scale' is no positive number.* with prior_scale=1e-30",
    ),
    "a curvature of infinity": (
        guides.Laplace(prior_scale=1.0, latent="A"),
        ALPHA,
        r"curvature in '\S+A' is not finite: .*choose",
    ),
    "a precision beyond single": (
        guides.Laplace(curvature="full", num_draws=2),
        ALPHA,
        "precision is .*and single precision goes .*choose|Jacobian .* is not finite",
    ),
    "chains without a start": (
        guides.NUTS(inner=guides.MeanField(prior_scale=1e-30, **ABSOLUTE), chains=1, num_samples=4),
        SMALL,
        r"chain of 'nuts' cannot start: .* with .*prior_scale=1e-30.*Choose",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_fit_that_cannot_start_has_no_posterior_and_names_the_numbers(case: str) -> None:
    guide, adapter, words = REFUSED[case]
    network = mlp()
    with pytest.raises(NonFiniteError, match=words) as caught:
        pyrolora.fit(network, DATA, guide, **{**OPTIONS, "adapter": adapter})
    assert caught.value.posterior is None
    assert type(network[0]) is torch.nn.Linear


def test_a_covariance_that_becomes_singular_goes_back_to_the_step_before() -> None:
    guide = guides.LowRank(scale_learning_rate=1e3, scale_updates="gradient")
    options = {**OPTIONS, "epochs": 3}
    with pytest.raises(NonFiniteError, match=r"evaluated .*cholesky.*good step") as caught:
        pyrolora.fit(mlp(), DATA, guide, **options)
    assert caught.value.posterior.predict(DATA, 3, seed=0).draws.isfinite().all()


def test_a_last_good_state_that_does_not_predict_is_no_posterior(extremes: Any) -> None:
    """Steps that break a network whose adapters are beyond its precision: it had no good state."""
    fit = extremes.EXTREMES["pissa at lora_alpha 1e30"]
    network = fit.network()
    with pytest.raises(
        NonFiniteError, match=r"before step 2.*no error\.posterior: .*'map'"
    ) as caught:
        pyrolora.fit(network, fit.data(), "map", **fit.arguments(guides.MAP()))
    assert caught.value.posterior is None


def test_a_last_good_state_of_which_some_draws_overflow_is_no_posterior(extremes: Any) -> None:
    fit = extremes.EXTREMES["a float16 network at rate 1e3"]
    guide = extremes.GUIDES["meanfield by curvature"]
    with pytest.raises(NonFiniteError, match=r"no error\.posterior") as caught:
        pyrolora.fit(fit.network(), fit.data(), guide, **fit.arguments(guide))
    assert caught.value.posterior is None


@pytest.mark.parametrize("value", [1e-300, 1e-39, 3.5e38, 1e300])
def test_options_that_single_precision_does_not_hold_are_refused(value: float) -> None:
    for make in (
        lambda: guides.MAP(prior_scale=value),
        lambda: guides.MonteCLoRA(sample_scale=value),
        lambda: AdapterConfig(lora_alpha=value),
    ):
        with pytest.raises(ConfigError, match=r"single precision holds, from 1.2e-38.* got \d"):
            make()


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_from_a_weight_that_is_not_finite_names_the_layer(start: str) -> None:
    network = mlp()
    with torch.no_grad():
        network[0].weight[0, 0] = torch.nan
    adapter = AdapterConfig(r=2, init_lora_weights=start)
    with pytest.raises(NonFiniteError, match=f"'{start}' in layer '0' is not finite.* 1 of"):
        pyrolora.fit(network, DATA, "map", **{**OPTIONS, "adapter": adapter})
    assert type(network[0]) is torch.nn.Linear


def test_an_error_of_the_network_itself_is_no_number() -> None:
    """A ValueError that no law raised is the network's own, and stays as it is."""

    class Refuses(torch.nn.Sequential):
        def forward(self, x: Any) -> Any:
            if self.training:
                raise ValueError("no training today")
            return super().forward(x)

    with pytest.raises(ValueError, match="no training today"):
        pyrolora.fit(Refuses(*mlp()), DATA, "map", **OPTIONS)
