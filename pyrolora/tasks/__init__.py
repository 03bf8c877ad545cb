"""Tasks, one per file; chosen by name or from the network's class."""

from __future__ import annotations

from torch import nn

from pyrolora.errors import ConfigError, UnknownNameError
from pyrolora.tasks.base import Task
from pyrolora.tasks.causal_lm import CausalLM
from pyrolora.tasks.classification import Classification, ClassPrediction
from pyrolora.tasks.masked_lm import MaskedLM
from pyrolora.tasks.multiple_choice import MultipleChoice
from pyrolora.tasks.prediction import Prediction
from pyrolora.tasks.regression import Regression, RegressionPrediction
from pyrolora.tasks.tokens import TokenPrediction, TokenScores, TokenTask
from pyrolora.tasks.unsupported import check_task, unsupported_task

_REGISTRY: dict[str, type[Task]] = {
    kind.name: kind for kind in (Classification, Regression, CausalLM, MultipleChoice, MaskedLM)
}


def available() -> list[str]:
    """The names of all tasks."""
    return list(_REGISTRY)


def task_for(network: nn.Module, name: str | None = None) -> Task:
    """The task called ``name``, or the one that the class of ``network`` calls for.

    Raises
    ------
    UnknownNameError
        For a name that does not exist.
    ConfigError
        For a network of a task without a likelihood; without a name, when the class of ``network``
        says nothing.
    """
    if name is None or name in _REGISTRY:
        check_task(network)
    if name is not None:
        if name not in _REGISTRY:
            raise UnknownNameError(f"unknown task {name!r}; choose one of {', '.join(available())}")
        return _REGISTRY[name]()
    for kind in _REGISTRY.values():
        if kind.matches(network):
            return kind()
    raise ConfigError(
        f"cannot tell the task from a {type(network).__name__}; "
        f"pass task= one of {', '.join(available())}"
    )


__all__ = [
    "CausalLM",
    "ClassPrediction",
    "Classification",
    "MaskedLM",
    "MultipleChoice",
    "Prediction",
    "Regression",
    "RegressionPrediction",
    "Task",
    "TokenPrediction",
    "TokenScores",
    "TokenTask",
    "available",
    "task_for",
    "unsupported_task",
]
