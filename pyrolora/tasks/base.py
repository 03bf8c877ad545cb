"""The base class of tasks: the law of the targets given the network's output, and their data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import Any, ClassVar, Literal, Self

import pyro
import pyro.distributions as dist
import torch
import transformers
from pyro import poutine
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyrolora.columns import LABELS, PLACES, Batch
from pyrolora.data import Collator, TextOptions
from pyrolora.errors import ConfigError
from pyrolora.parameters import ParamModule
from pyrolora.tasks.checkpoint import Checkpoint
from pyrolora.tasks.prediction import Prediction
from pyrolora.tasks.unsupported import check_problem_type, check_supported


class Task(ParamModule, ABC):
    """One kind of target: p(y | output), with one observed Pyro site ``y`` in the plate ``data``.

    A subclass states all that the library knows about the kind. It needs a `name`, a `prediction`,
    and the abstract methods: `law`, `targets`, `curvature`, `check_labels`, `check_output`.
    `pyrolora.tasks.register` makes its name known. It has no options: `pyrolora.load` makes it anew
    from its name, and then reads its parameters.

    `output` gives (b, ...) from the network's return value; with S draws the law gets (S, b, ...)
    and has batch shape (S, b), else (b,).
    """

    # Names --------------------------------------------------------------------------------------

    name: ClassVar[str]
    """The name that is stored; that of `transformers.pipeline`, if it has exactly one."""
    aliases: ClassVar[tuple[str, ...]] = ()
    """Other names that are accepted, such as those of `transformers.pipeline` and PEFT."""

    # Data ---------------------------------------------------------------------------------------

    reads: ClassVar[str] = "this task"
    """The data as the task reads them, in a few words, for the error that lists several tasks."""
    collator: ClassVar[type[Collator]] = Collator
    """Makes batches of examples, with the labels of this kind."""
    extras: ClassVar[tuple[str, ...]] = ()
    """Columns of the batch that the law reads and the network does not take."""
    discrete: ClassVar[bool] = False
    """Whether labels are the numbers of classes or choices; -1 then stands for a secret label."""
    names_classes: ClassVar[bool] = False
    """Whether the numbers of classes have names, in the network or in the data."""
    keeps_labels: ClassVar[bool] = False
    """Whether data without labels of their own still need them: they say which tokens count."""
    class_names: Sequence[str] | None = None
    """The names of the classes in the data of a fit, if its network has none."""
    texts: TextOptions | None = None
    """How a fit read its texts, where the user has said it."""

    # The network --------------------------------------------------------------------------------

    classes: ClassVar[frozenset[str]] = frozenset()
    """transformers' classes of networks that call for the task."""
    auto: ClassVar[str] = ""
    """transformers' Auto class that loads a network by its name."""
    problem_type: ClassVar[str | None] = None
    """The ``problem_type`` of transformers' configurations that the task is."""

    writes: ClassVar[Literal["on", "apart"] | None] = None
    """Whether the network writes texts: on from its input, or apart, with a decoder of its own."""
    serves: ClassVar[Literal["classes", "tags", "value", "text"] | None] = None
    """The answer of a server to a single text: its classes, tags or number, or what follows it."""

    # The law ------------------------------------------------------------------------------------

    prediction: ClassVar[type[Prediction]]
    """The class of predictions."""
    linearisable: ClassVar[bool] = False
    """Whether `curvature` is exact, with few vectors per example."""
    tempers: ClassVar[bool] = False
    """Whether `at` is defined."""
    temperature: float = 1.0
    """T of `at`; 1 in a fit and in the joint model, always."""

    @classmethod
    def matches(cls, network: nn.Module) -> bool:
        """Return whether the class of ``network`` calls for this task."""
        return type(network).__name__ in cls.classes

    @classmethod
    def claims(cls, network: nn.Module, row: Mapping[str, Any]) -> bool:
        """Return whether data with such an example call for this task, whatever `matches`."""
        return False

    @classmethod
    def implied(cls, checkpoint: Checkpoint) -> bool:
        """Return whether data and checkpoint may be meant for this task, which nobody named.

        Where several tasks may be meant, the user is asked.
        """
        return False

    @classmethod
    def call(cls) -> str:
        """Return the keyword of `pyrolora.fit` that names the task."""
        return f"task={cls.name!r}"

    @classmethod
    def load(cls, checkpoint: Checkpoint, like: nn.Module | None = None) -> PreTrainedModel:
        """Load the network of a checkpoint, with the outputs that its data or ``like`` need.

        Raises
        ------
        ConfigError
            For a task whose networks cannot be loaded by name.
        """
        if not cls.auto:
            raise ConfigError(
                f"networks for {cls.name!r} are not loaded by name, got {checkpoint.name!r}; pass "
                "the network itself"
            )
        loader = getattr(transformers, cls.auto)
        return loader.from_pretrained(checkpoint.name, dtype="auto")

    def check_network(self, network: nn.Module) -> None:
        """Raise `ConfigError` for a network of another task."""
        check_supported(network, self.classes)
        check_problem_type(network, self.problem_type)

    def output(self, raw: Any) -> Tensor:
        """Return the tensor that the law reads, rows first, in at least float32."""
        if not isinstance(raw, Tensor) and not isinstance(getattr(raw, "logits", None), Tensor):
            fields = list(raw) if isinstance(raw, Mapping) else type(raw).__name__
            raise ConfigError(
                f"a network must give a tensor, or an output with 'logits', for {self.name}; this "
                f"one gives {fields}: such a task is not supported yet"
            )
        return in_float32(raw if isinstance(raw, Tensor) else raw.logits)

    def at(self, temperature: float) -> Self:
        """Return this task with every law p(y | output) replaced by its power 1/T, normalised.

        That is a softmax of logits / T, or a Gaussian of T times the variance; for texts it is the
        law of each token. The parameters are shared.

        Raises
        ------
        ConfigError
            For another temperature than 1, where the task has none.
        """
        if temperature != 1 and not self.tempers:
            raise ConfigError(
                f"the task {self.name!r} has no temperature, so that its posteriors cannot "
                "be calibrated by one; pyrolora.predictive.Conformal has sets of answers for "
                "predictions of classes and of regressions"
            )
        tempered = copy(self)
        tempered.temperature = temperature
        return tempered

    def tempered(self, logits: Tensor) -> Tensor:
        """Return the logits of the law at this temperature."""
        return logits if self.temperature == 1 else logits / self.temperature

    def inputs(self, batch: Batch, network: nn.Module) -> dict[str, Tensor]:
        """Return what the network is given of a batch: all but labels, places and `extras`."""
        own = {LABELS, PLACES, *self.extras}
        return {name: tensor for name, tensor in batch.items() if name not in own}

    def places(self, batch: Batch) -> Tensor | None:
        """Return the places whose logits `scores` reads; None: those of all tokens.

        They are (K,) for all rows, or (rows, K). transformers' language models compute no others
        then.
        """
        places = batch.get(PLACES)
        return None if places is None else places[0]

    def scores(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the tensor that the law reads, (b, ...), from `output` at the `places`."""
        return output

    def as_text(self) -> Task | None:
        """Return the task under which draws write text, and score it; None where they do not."""
        return self if self.writes is not None else None

    @abstractmethod
    def law(self, output: Tensor, batch: Batch) -> dist.TorchDistribution:
        """Return the law of the targets."""

    @abstractmethod
    def targets(self, batch: Batch) -> Tensor | None:
        """Return the observed value of ``y``, or None without labels in the batch."""

    @abstractmethod
    def curvature(self, output: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Yield tensors v, of the shape of ``output`` without gradient; Σ v vᵀ is the Hessian.

        It is the Hessian of −log p(y_i | output) in the example's own output. A task that is not
        `linearisable` yields one random v with E[v vᵀ] that Hessian.
        """

    @abstractmethod
    def check_labels(self, labels: Tensor, network: nn.Module) -> None:
        """Raise `DataError` for labels that this task cannot score."""

    @abstractmethod
    def check_output(self, output: Tensor, labels: Tensor) -> None:
        """Raise `DataError` where the network's output does not fit the labels."""

    def check_reading(self, output: Tensor, batch: Batch, network: nn.Module) -> None:
        """Raise `ConfigError` where the network's output does not fit its batch."""

    def check_start(self, output: Tensor, labels: Tensor) -> None:
        """Warn of labels that training may not reach from the first outputs of a network."""

    def start(self, labels: Tensor, output: Tensor | None = None) -> None:
        """Set the task's parameters from the training labels; most tasks have none.

        ``output`` is the output for them of a network that is trained already.
        """

    def pool(self, others: Sequence[Task]) -> None:
        """Set the task's parameters from those of independent fits; most tasks have none."""

    def count(self, labels: Tensor) -> int:
        """Return the number of observations: examples, or tokens."""
        return int(labels.shape[0])

    def forward(self, output: Tensor, batch: Batch, rows: float) -> Tensor:
        """Sample the data part of the model, in which b rows stand for all ``rows``."""
        law = self.law(output, batch)
        size = law.batch_shape[-1]
        with pyro.plate("data", size, dim=-1), poutine.scale(scale=rows / size):
            return pyro.sample("y", law, obs=self.targets(batch))

    def log_prob(self, output: Tensor, batch: Batch) -> Tensor:
        """Return log p(y_i | output), (b,) or (S, b), in nats."""
        return self.law(output, batch).log_prob(self.targets(batch))

    def row_log_prob(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the log-likelihood of each row of the prediction, (n,) or (S, n), in nats."""
        return self.log_prob(output, batch)


def in_float32(tensor: Tensor) -> Tensor:
    """Return a tensor of 16 bits in float32, any other as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
