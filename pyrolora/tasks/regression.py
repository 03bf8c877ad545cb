"""Regression with Gaussian noise of a learned scale."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from transformers import PreTrainedModel

from pyrolora.columns import Batch
from pyrolora.errors import DataError
from pyrolora.tasks.base import Task
from pyrolora.tasks.checkpoint import Checkpoint
from pyrolora.tasks.classification import check_one_label
from pyrolora.tasks.evidence import Baseline, Promise
from pyrolora.tasks.heads import load_head, outputs_like
from pyrolora.tasks.prediction import Prediction, joined, table_of, tail_of
from pyrolora.tasks.unsupported import MULTI_LABEL, classes_of

FAR = 5
"""The most standard deviations of the labels between their mean and the network's first output."""
LARGEST = 1e18
"""The largest label whose square, of an error as of a variance, float32 holds."""
WIDE = 100
"""The largest standard deviation of labels that a head is sure to learn."""


@dataclass(frozen=True)
class RegressionPrediction(Prediction):
    """Means: ``draws`` is (S, n), in units of the target.

    ``noise_scale`` is the learned σ, times √T for a calibrated posterior.
    """

    higher_is_better: ClassVar[Mapping[str, bool | None]] = {
        "rmse": False,
        "nll": False,
        "crps": False,
        "coverage": None,
        "aurc": False,
    }

    draws: Tensor
    noise_scale: float

    @staticmethod
    def reduce(task: Regression, outputs: Iterable[Tensor], batch: Batch) -> dict[str, Tensor]:
        means, scores = [], []
        labels = task.targets(batch)
        for output in outputs:
            means.append(output.cpu())
            if labels is not None:
                scores.append(task.log_prob(output, batch).cpu())
        record = {"draws": torch.cat(means)}
        if labels is not None:
            record |= {"log_likelihood": torch.cat(scores), "targets": labels.cpu()}
        return record

    @classmethod
    def collect(
        cls, records: Sequence[dict[str, Tensor]], task: Regression
    ) -> RegressionPrediction:
        return cls(
            draws=torch.cat([record["draws"] for record in records], dim=1),
            targets=joined(records, "targets", 0),
            log_likelihood=joined(records, "log_likelihood", 1),
            noise_scale=float(task.noise().detach()),
        )

    @property
    def mean(self) -> Tensor:
        """The predictive mean, (n,)."""
        return self.draws.mean(0)

    @property
    def predicted(self) -> Tensor:
        """The predictive mean, (n,)."""
        return self.mean

    @property
    def aleatoric(self) -> Tensor:
        """σ: the standard deviation of the noise, (n,)."""
        return torch.full_like(self.mean, self.noise_scale)

    @property
    def epistemic(self) -> Tensor:
        """The standard deviation of the means over draws, (n,)."""
        return self.draws.std(0, correction=0)

    @property
    def std(self) -> Tensor:
        """The predictive standard deviation, √(σ² + epistemic²), (n,)."""
        return (self.aleatoric.square() + self.epistemic.square()).sqrt()

    @property
    def entropy(self) -> Tensor:
        """Entropy of the Gaussian with the predictive variance, (n,): an upper bound, in nats."""
        return 0.5 * (2 * torch.pi * torch.e * self.std.square()).log()

    @property
    def uncertainty(self) -> Tensor:
        """The predictive standard deviation, (n,), in units of the target."""
        return self.std

    @property
    def loss(self) -> Tensor | None:
        """The squared error of the mean, (n,), in units of the target squared."""
        return None if self.targets is None else (self.mean - self.targets).square()

    def interval(self, mass: float = 0.9) -> tuple[Tensor, Tensor]:
        """Return bounds (n,) of the central interval of the predictive law.

        The law is the mixture over draws of N(mean_s, σ²); its distribution function is bisected.
        """
        tail = tail_of(mass)
        return self._quantile(tail), self._quantile(1 - tail)

    def _quantile(self, level: float) -> Tensor:
        width = 10 * self.noise_scale
        low, high = self.draws.amin(0) - width, self.draws.amax(0) + width
        for _ in range(60):
            middle = (low + high) / 2
            below = torch.special.ndtr((middle - self.draws) / self.noise_scale).mean(0) < level
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def predictive_draws(self) -> dict[str, tuple[Tensor, tuple[str, ...]]]:
        noise = self.noise_scale * torch.randn_like(self.draws)
        return {"y": (self.draws + noise, ("example",)), "mean": (self.draws, ("example",))}

    def to_pandas(self) -> pd.DataFrame:
        low, high = self.interval()
        columns = {"mean": self.mean, "std": self.std, "epistemic": self.epistemic}
        return table_of({**columns, "low_90": low, "high_90": high}, self.targets)

    uncertainty_name = "predictive standard deviation"
    risk_name = "mean squared error"
    surprise_note = (
        "The targets that lie furthest from the mean, in predictive standard deviations."
    )

    @property
    def surprise(self) -> Tensor | None:
        """The distance of the target from the mean, in predictive standard deviations, (n,)."""
        return None if self.targets is None else ((self.targets - self.mean) / self.std).abs()

    def promise(self) -> Promise | None:
        """Return the coverage of the central 90 % intervals, and which of them hold the target."""
        if self.targets is None:
            return None
        low, high = self.interval(0.9)
        inside = ((self.targets >= low) & (self.targets <= high)).double()
        return Promise(
            torch.full_like(inside, 0.9),
            inside,
            "The intervals that should hold 90 % of the targets hold {kept:.1%}; with {n} examples "
            "the standard error is {error:.1%}.",
            variance=0.9 * 0.1,
        )

    def baseline(self, without_adapters: Callable[[], Prediction | None]) -> Baseline | None:
        """Return the scores of the normal distribution of these targets, where they differ."""
        if self.targets is None or self.targets.min() == self.targets.max():
            return None
        y = self.targets.double()
        error = (y - y.mean()).square()
        scores = -0.5 * (error / error.mean() + (2 * torch.pi * error.mean()).log())
        return Baseline("normal distribution of the targets", scores, error)

    def facts(self) -> dict[str, str]:
        noise = {"learned noise": f"{self.noise_scale:.3g}, a standard deviation"}
        if self.targets is None:
            return noise
        y = self.targets.double().numpy()
        return {
            **noise,
            "targets": f"{y.min():.3g} to {y.max():.3g}, mean {y.mean():.3g}, "
            f"standard deviation {y.std():.3g}",
        }

    def columns(self, class_name: Callable[[int, int], str]) -> dict[str, Sequence[Any]]:
        known: dict[str, Sequence[Any]] = {}
        if self.targets is not None:
            known["target"] = self.targets.tolist()
            known["error in sd"] = ((self.targets - self.mean) / self.std).tolist()
        bounds = zip(*(bound.tolist() for bound in self.interval(0.9)), strict=True)
        return {
            **known,
            "mean": self.mean.tolist(),
            "90 % interval": [f"{low:.3g} to {high:.3g}" for low, high in bounds],
            "sd": self.std.tolist(),
            "sd between draws": self.epistemic.tolist(),
        }


class Regression(Task):
    """Real numbers: y ~ N(f, σ²), with f (..., b) the network's single output.

    σ, ``noise_scale``, is learned. It starts at the standard deviation of the training labels: that
    of the errors of a network that predicts their mean. A new head starts near 0 and moves by no
    more than the learning rate per step, so labels far from 0, or of a large standard deviation,
    need to be standardised.
    """

    name = "regression"
    reads = "a number per example"
    classes = classes_of("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION")
    problem_type = "regression"
    prediction = RegressionPrediction
    serves = "value"
    linearisable = True
    tempers = True

    def __init__(self) -> None:
        super().__init__()
        self.declare("noise_scale", torch.tensor(1.0), constraints.positive)

    @classmethod
    def matches(cls, network: nn.Module) -> bool:
        config: Any = getattr(network, "config", None)
        return super().matches(network) and (
            config.problem_type == cls.problem_type
            or (config.num_labels == 1 and config.problem_type != MULTI_LABEL)
        )

    @classmethod
    def implied(cls, checkpoint: Checkpoint) -> bool:
        return checkpoint.layout == "example" and checkpoint.has_real_labels

    @classmethod
    def load(cls, checkpoint: Checkpoint, like: nn.Module | None = None) -> PreTrainedModel:
        return load_head(checkpoint, outputs_like(like) or {"num_labels": 1})

    def output(self, raw: Any) -> Tensor:
        output = super().output(raw)
        return output.squeeze(-1) if output.dim() == 2 else output

    def law(self, output: Tensor, batch: Batch) -> dist.TorchDistribution:
        return dist.Normal(output, self.noise(), validate_args=False)

    def noise(self) -> Tensor:
        """Return the standard deviation of the noise: σ, or σ √T at a temperature T."""
        scale = self.param("noise_scale")
        return scale if self.temperature == 1 else scale * self.temperature**0.5

    def targets(self, batch: Batch) -> Tensor | None:
        labels = batch.get("labels")
        return None if labels is None else labels.flatten().float()

    def curvature(self, output: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Yield 1 / σ, whose square is the Hessian."""
        yield torch.ones_like(output) / self.param("noise_scale").detach()

    def check_labels(self, labels: Tensor, network: nn.Module) -> None:
        check_one_label(labels, "regression needs one number per example")
        if not torch.isfinite(labels.double()).all():
            bad = int((~torch.isfinite(labels.double().flatten())).nonzero()[0])
            raise DataError(f"the label of example {bad} is {labels.flatten()[bad]}; remove it")
        if (largest := float(labels.double().abs().max())) > LARGEST:
            raise DataError(
                f"the squares of labels up to {largest:g} are too large for float32; standardise "
                "them, (y - y.mean()) / y.std()"
            )
        outputs = getattr(getattr(network, "config", None), "num_labels", 1)
        if outputs != 1:
            raise DataError(
                f"regression needs a network with one output, this one has {outputs}; load it "
                "with num_labels=1"
            )

    def check_output(self, output: Tensor, labels: Tensor) -> None:
        if output.dim() != 1:
            raise DataError(
                "regression needs a network with one output, (n,) or (n, 1); this one gave shape "
                f"{tuple(output.shape)}"
            )

    def check_start(self, output: Tensor, labels: Tensor) -> None:
        y = labels.double().flatten()
        mean, deviation, first = float(y.mean()), float(y.std(correction=0)), float(output.mean())
        if len(y) < 2 or (abs(first - mean) <= FAR * deviation and deviation <= WIDE):
            return
        scaled = "y -> (y - mean) / deviation" if deviation else "y -> y - mean"
        warnings.warn(
            f"the labels have mean {mean:.4g} and standard deviation {deviation:.4g}, and the "
            f"network starts at {first:.4g}: training may not get there; standardise them, "
            f"{scaled}, and scale the predictions back",
            RuntimeWarning,
            stacklevel=2,
        )

    def pool(self, others: Sequence[Task]) -> None:
        """Set σ² = mean σ_k²: with it the mixture of the fits keeps its variance."""
        squares = torch.stack([other.param("noise_scale").detach().square() for other in others])
        self.assign("noise_scale", squares.mean().sqrt())

    def start(self, labels: Tensor, output: Tensor | None = None) -> None:
        """Set σ to the root mean square of y − f, or, without f, to the labels' deviation."""
        y = labels.double().flatten()
        if len(y) > 1:
            rest = y.std() if output is None else (y - output.double()).square().mean().sqrt()
            scale = rest.clamp(min=1e-3).to(self.get_parameter("noise_scale"))
            self.assign("noise_scale", scale)
