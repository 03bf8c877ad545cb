"""A task from outside of the package: counts, with a prediction of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrolora.errors import DataError
from pyrolora.tasks import Prediction, Task, load_head, outputs_like


@dataclass(frozen=True)
class CountPrediction(Prediction):
    """Rates: ``draws`` is (S, n)."""

    higher_is_better: ClassVar[Mapping[str, bool | None]] = {
        "nll": False,
        "aurc": False,
        "mean_deviance": False,
    }
    uncertainty_name = "predictive standard deviation"
    risk_name = "mean deviance"

    draws: Tensor

    @staticmethod
    def reduce(task: Any, outputs: Iterable[Tensor], batch: Any) -> dict[str, Tensor]:
        rates, scores, labels = [], [], task.targets(batch)
        for output in outputs:
            rates.append(output.exp().cpu())
            if labels is not None:
                scores.append(task.log_prob(output, batch).cpu())
        if labels is None:
            return {"draws": torch.cat(rates)}
        return {
            "draws": torch.cat(rates),
            "log_likelihood": torch.cat(scores),
            "targets": labels.cpu(),
        }

    @classmethod
    def collect(cls, records: Sequence[dict[str, Tensor]], task: Any) -> CountPrediction:
        labelled = all("targets" in record for record in records)
        return cls(
            draws=torch.cat([record["draws"] for record in records], dim=1),
            targets=torch.cat([r["targets"] for r in records]) if labelled else None,
            log_likelihood=torch.cat([r["log_likelihood"] for r in records], dim=1)
            if labelled
            else None,
        )

    @property
    def mean(self) -> Tensor:
        """The predictive mean, (n,)."""
        return self.draws.mean(0)

    @property
    def uncertainty(self) -> Tensor:
        return (self.mean + self.draws.var(0, correction=0)).sqrt()

    @property
    def loss(self) -> Tensor | None:
        y, mean = self.targets, self.mean
        return None if y is None else 2 * (torch.special.xlogy(y, y / mean) - (y - mean))

    def metrics(self) -> dict[str, float]:
        assert self.loss is not None
        return {"mean_deviance": float(self.loss.mean())}

    def predictive_draws(self) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
        rows = ("example",)
        return {"y": (torch.poisson(self.draws), rows), "rate": (self.draws, rows)}

    def to_pandas(self) -> pd.DataFrame:
        return pd.DataFrame({"mean": self.mean.numpy(), "std": self.uncertainty.numpy()})


class Counts(Task):
    """y ~ Poisson(exp(f)), with f (..., b) the network's single output."""

    name = "counts"
    prediction = CountPrediction
    linearisable = True

    @classmethod
    def load(cls, checkpoint: Any, like: nn.Module | None = None) -> Any:
        return load_head(checkpoint, outputs_like(like) or {"num_labels": 1})

    def output(self, raw: Any) -> Tensor:
        output = super().output(raw)
        return output.squeeze(-1) if output.dim() == 2 else output

    def law(self, output: Tensor, batch: Any) -> dist.TorchDistribution:
        return dist.Poisson(output.exp(), validate_args=False)

    def targets(self, batch: Any) -> Tensor | None:
        labels = batch.get("labels")
        return None if labels is None else labels.flatten().float()

    def curvature(self, output: Tensor, batch: Any) -> Iterator[Tensor]:
        yield (output / 2).exp()

    def check_labels(self, labels: Tensor, network: nn.Module) -> None:
        if bool((labels < 0).any()) or bool((labels != labels.round()).any()):
            raise DataError(f"counts are whole numbers from 0 on, got {labels.min()} among them")

    def check_output(self, output: Tensor, labels: Tensor) -> None:
        if output.dim() != 1:
            raise DataError(f"counts need one output, (n,), got shape {tuple(output.shape)}")
