"""What every likelihood is: the law of the targets given the network's output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import Any, ClassVar, Self

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from pyrolora.columns import Batch
from pyrolora.errors import ConfigError
from pyrolora.parameters import ParamModule
from pyrolora.tasks.prediction import Prediction


class Task(ParamModule, ABC):
    """p(y | output), with one observed Pyro site ``y`` in the plate ``data``.

    `output` gives (b, ...) from what the network returns; with S draws the law gets (S, b, ...) and
    has batch shape (S, b), else (b,).
    """

    name: ClassVar[str]
    prediction: ClassVar[type[Prediction]]
    """The class of predictions by this task."""
    extras: ClassVar[tuple[str, ...]] = ()
    """Keys of the batch that the law reads and the network does not take."""
    linearisable: ClassVar[bool] = False
    """Whether `curvature` is exact, with few vectors an example."""

    class_names: Sequence[str] | None = None
    """What the data of a fit call the classes of a network that has no names for them."""

    tempers: ClassVar[bool] = False
    """Whether `at` is defined."""
    temperature: float = 1.0
    """T of `at`; 1 in a fit and in the joint model, always."""

    classes: ClassVar[frozenset[str]] = frozenset()
    """transformers' classes of networks that call for it."""

    @classmethod
    def matches(cls, network: nn.Module) -> bool:
        """Whether the class of ``network`` calls for this likelihood."""
        return type(network).__name__ in cls.classes

    def output(self, raw: Any) -> Tensor:
        """What the law reads of the network's return value, rows first, in at least float32."""
        if not isinstance(raw, Tensor) and not isinstance(getattr(raw, "logits", None), Tensor):
            fields = list(raw) if isinstance(raw, Mapping) else type(raw).__name__
            raise ConfigError(
                f"a network must give a tensor, or an output with 'logits', for {self.name}; this "
                f"one gives {fields}: such a task is not supported yet"
            )
        tensor: Tensor = raw if isinstance(raw, Tensor) else raw.logits
        return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor

    def at(self, temperature: float) -> Self:
        """This likelihood with every law p(y | output) replaced by p(y | output)^(1/T), normalised:
        a softmax of logits / T, a Gaussian of T times the variance. Of texts it is the law of each
        token. The parameters are shared.

        Raises
        ------
        ConfigError
            For another temperature than 1, where the likelihood has none.
        """
        if temperature != 1 and not self.tempers:
            raise ConfigError(
                f"the task {self.name!r} has no temperature, so that its posteriors cannot "
                "be calibrated by one; see pyrolora.predictive.Conformal for sets of answers"
            )
        tempered = copy(self)
        tempered.temperature = temperature
        return tempered

    def tempered(self, logits: Tensor) -> Tensor:
        """The logits of the law at this temperature."""
        return logits if self.temperature == 1 else logits / self.temperature

    @abstractmethod
    def law(self, output: Tensor, batch: Batch) -> dist.TorchDistribution:
        """The law of the targets."""

    @abstractmethod
    def targets(self, batch: Batch) -> Tensor | None:
        """What ``y`` is observed at, or None without labels in the batch."""

    @abstractmethod
    def curvature(self, output: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Tensors v of the shape of ``output``, without gradient, such that for every example
        Σ v vᵀ is the Hessian of −log p(y_i | output) in the example's own output; where it is not
        `linearisable`, one random v with E[v vᵀ] that Hessian."""

    @abstractmethod
    def check_labels(self, labels: Tensor, network: nn.Module) -> None:
        """Raise `DataError` for labels that this likelihood cannot score."""

    @abstractmethod
    def check_output(self, output: Tensor, labels: Tensor) -> None:
        """Raise `DataError` where the network's output does not fit the labels."""

    def check_start(self, output: Tensor, labels: Tensor) -> None:
        """Warn of labels that training may not reach from the first outputs of a network."""

    def start(self, labels: Tensor, output: Tensor | None = None) -> None:
        """Set parameters of the likelihood from the training labels, and from what the network
        gives for them, if it is trained already; most have none."""

    def pool(self, others: Sequence[Task]) -> None:
        """Set parameters of the likelihood from those of independent fits; most have none."""

    def count(self, labels: Tensor) -> int:
        """How many observations the labels hold: examples, or tokens."""
        return int(labels.shape[0])

    def forward(self, output: Tensor, batch: Batch, num_examples: int) -> Tensor:
        """The data part of the model: b examples of the batch stand for all ``num_examples``."""
        law = self.law(output, batch)
        size = law.batch_shape[-1]
        with pyro.plate("data", size, dim=-1), poutine.scale(scale=num_examples / size):
            return pyro.sample("y", law, obs=self.targets(batch))

    def log_prob(self, output: Tensor, batch: Batch) -> Tensor:
        """log p(y_i | output), (b,) or (S, b), in nats."""
        return self.law(output, batch).log_prob(self.targets(batch))
