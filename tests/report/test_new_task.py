"""A task and a prediction from outside get a report, ArviZ's groups and plots, with what they
support: nothing in the package knows them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from problems import mlp
from torch import Tensor, nn

import pyrolora
from pyrolora import AdapterConfig, Posterior
from pyrolora.arviz.containers import group_names
from pyrolora.diagnostics.chance import without_adapters
from pyrolora.plots import risk_coverage_curve
from pyrolora.report import report_on
from pyrolora.report.findings import no_better_than_chance
from pyrolora.tasks import Prediction, Regression, Task


@dataclass(frozen=True)
class CountPrediction(Prediction):
    """Rates of counts: ``draws`` is (S, n)."""

    draws: Tensor

    @staticmethod
    def reduce(task: Task, outputs: Iterable[Tensor], batch: Any) -> dict[str, Tensor]:
        outputs = list(outputs)
        record = {"draws": torch.cat([output.exp() for output in outputs])}
        if "labels" in batch:
            scores = [task.log_prob(output, batch) for output in outputs]
            record |= {"log_likelihood": torch.cat(scores), "targets": batch["labels"]}
        return record

    @classmethod
    def collect(cls, records: Sequence[dict[str, Tensor]], task: Task) -> CountPrediction:
        labelled = "targets" in records[0]
        return cls(
            targets=torch.cat([r["targets"] for r in records]) if labelled else None,
            log_likelihood=torch.cat([r["log_likelihood"] for r in records], 1)
            if labelled
            else None,
            draws=torch.cat([r["draws"] for r in records], 1),
        )

    @property
    def uncertainty(self) -> Tensor:
        return self.draws.mean(0).sqrt()

    @property
    def loss(self) -> Tensor | None:
        return None if self.targets is None else (self.draws.mean(0) - self.targets).abs()

    def predictive_draws(self) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
        return {"y": (torch.poisson(self.draws), ("example",))}

    def to_pandas(self) -> pd.DataFrame:
        return pd.DataFrame({"rate": self.draws.mean(0).numpy()})


class Counts(Regression):
    """y ~ Poisson(exp f): the rest is as in a regression of one number."""

    name = "counts"
    classes = frozenset()
    prediction = CountPrediction
    tempers = False
    linearisable = False

    def law(self, output: Tensor, batch: Any) -> dist.TorchDistribution:
        return dist.Poisson(output.exp(), validate_args=False)

    def curvature(self, output: Tensor, batch: Any) -> Iterator[Tensor]:
        yield (output / 2).exp().detach()

    def start(self, labels: Tensor, output: Tensor | None = None) -> None:
        pass

    def check_start(self, output: Tensor, labels: Tensor) -> None:
        pass


def data(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    return inputs, inputs[:, 0].exp().round()


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    network: nn.Module = mlp(4, 1)
    options = {"adapter": AdapterConfig(r=1), "epochs": 3, "batch_size": 8, "learning_rate": 0.01}
    return pyrolora.fit(network, data(24), "montec", task=Counts(), **options)


def test_a_prediction_from_outside_has_a_page(posterior: Posterior) -> None:
    made = report_on(posterior, data(20, 1), outside=(data(9, 2)[0] + 5,), num_samples=3, seed=0)
    assert {"nll", "ood_auroc"} <= set(made.metrics)
    for heading in ("Risk and coverage", "Uncertainty", "Most certain", "Least certain"):
        assert f"<h3>{heading}</h3>" in made.html
    for heading in ("Reliability", "Confident errors", "Token by token"):
        assert f"<h3>{heading}</h3>" not in made.html
    assert "overconfident" not in {finding.name for finding in made.findings}
    prediction = posterior.predict(data(20, 1), 3, seed=0)
    columns = prediction.columns(lambda row, number: str(number))
    assert list(columns) == ["target", "loss", "uncertainty"]


def test_it_has_a_page_without_labels(posterior: Posterior) -> None:
    made = report_on(posterior, (data(20, 1)[0],), num_samples=3, seed=0)
    assert not made.metrics
    assert "<h3>Uncertainty</h3>" in made.html
    assert "<h3>Risk and coverage</h3>" not in made.html


def test_it_is_compared_with_the_network_without_its_adapters(posterior: Posterior) -> None:
    prediction = posterior.predict(data(20, 1), 3, seed=0)
    without = without_adapters(posterior, data(20, 1), 8)
    assert without is not None
    assert not torch.equal(without.log_predictive, prediction.log_predictive)
    same = no_better_than_chance(without, lambda: without)
    assert same is not None
    assert "network without the adapters by +0.000 nats" in same.found
    better = replace(without, log_likelihood=without.log_likelihood + torch.rand(20))
    assert no_better_than_chance(better, lambda: without) is None


def test_its_draws_and_scores_go_to_arviz(posterior: Posterior) -> None:
    idata = posterior.to_arviz(4, data=data(24), log_likelihood=True, seed=0)
    groups = {"posterior", "posterior_predictive", "log_likelihood", "observed_data"}
    assert groups <= set(group_names(idata))
    assert idata["log_likelihood"]["y"].dims == ("chain", "draw", "example")
    assert idata["posterior_predictive"]["y"].sizes["example"] == 24


def test_its_risk_is_drawn_over_coverage(posterior: Posterior) -> None:
    _, ax = plt.subplots()
    risk_coverage_curve(posterior.predict(data(20, 1), 3, seed=0), ax=ax)
    assert ax.get_ylabel() == "risk: mean loss"
    plt.close("all")
