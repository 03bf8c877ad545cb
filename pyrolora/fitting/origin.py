"""The origin of a fit: what it starts from, and what each origin has to answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from torch import nn
from transformers import TrainingArguments

from pyrolora.adapters import Attachment, check_in_memory
from pyrolora.adapters.config import AdapterConfig
from pyrolora.data import Prepared
from pyrolora.fitting.request import Request
from pyrolora.guides import Guide
from pyrolora.model import JointModel
from pyrolora.tasks import Task

Builder = Callable[[Guide], JointModel]
"""Makes the joint model of a guide, as it is before the fit."""


@dataclass
class Origin(ABC):
    """The starting point of a fit; one of `Fresh`, `Given` and `Continued`.

    Attributes
    ----------
    guide
        The guide that was asked for.
    network, tokenizer
        The network to fit, and its tokenizer, if there is one.
    config, task
        The configuration of the adapters, and the task as it is before the fit.
    """

    guide: Guide
    network: nn.Module
    tokenizer: Any
    config: AdapterConfig
    task: Task

    @classmethod
    @abstractmethod
    def of(cls, request: Request) -> Self:
        """Return the origin that ``request`` asks for, with its network in memory."""

    @abstractmethod
    def attach(self, data: Prepared, args: TrainingArguments) -> Attachment:
        """Wrap the layers to adapt and the task heads."""

    @abstractmethod
    def builder(self, attachment: Attachment, data: Prepared, args: TrainingArguments) -> Builder:
        """Return the function that makes the joint model of a guide."""

    @abstractmethod
    def ready(
        self,
        joint: JointModel,
        data: Prepared,
        held_out: Prepared | None,
        args: TrainingArguments,
    ) -> None:
        """Check that ``joint`` can be fitted to the data, and set what depends on its outputs."""


def check_network(model: Any) -> None:
    """Raise an error for a network in memory that no adapter can be put into."""
    if isinstance(model, nn.Module):
        check_in_memory(model)
