"""The tasks by their names."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from pyrolora.checks import is_redefined
from pyrolora.errors import ConfigError, UnknownNameError
from pyrolora.tasks.base import Task
from pyrolora.tasks.causal_choice import LetterChoice, TextChoice, TokenMeanChoice
from pyrolora.tasks.causal_lm import CausalLM
from pyrolora.tasks.classification import Classification
from pyrolora.tasks.masked_lm import MaskedLM
from pyrolora.tasks.multi_label import MultiLabel
from pyrolora.tasks.multiple_choice import MultipleChoice
from pyrolora.tasks.prediction import Prediction
from pyrolora.tasks.question_answering import QuestionAnswering
from pyrolora.tasks.regression import Regression
from pyrolora.tasks.reward import RewardModelling
from pyrolora.tasks.seq2seq import Seq2Seq
from pyrolora.tasks.token_classification import TokenClassification
from pyrolora.tasks.unsupported import check_supported

K = TypeVar("K", bound=type[Task])

_REGISTRY: dict[str, type[Task]] = {
    kind.name: kind
    for kind in (
        Classification,
        Regression,
        CausalLM,
        MultipleChoice,
        Seq2Seq,
        MaskedLM,
        TokenClassification,
        MultiLabel,
        QuestionAnswering,
        LetterChoice,
        TextChoice,
        TokenMeanChoice,
        RewardModelling,
    )
}


def available() -> list[str]:
    """Return the names of all tasks."""
    return list(_REGISTRY)


def kinds() -> list[type[Task]]:
    """Return the classes of all tasks, those of pyrolora first."""
    return list(_REGISTRY.values())


def register(kind: K) -> K:
    """Make a task known by its name, and return it; also usable as a decorator.

    A registered task can be named in `pyrolora.fit`, is chosen by itself for the networks that it
    `matches` and no earlier task does, and is known to `pyrolora.load`. The same class statement
    may be run again, as in a notebook.

    Raises
    ------
    ConfigError
        For something that is no subclass of `Task`, a class that lacks parts, here or in its
        prediction, options, which `pyrolora.load` would not have, and names that are taken.
    """
    if not (inspect.isclass(kind) and issubclass(kind, Task)):
        raise ConfigError(
            f"register takes a subclass of pyrolora.tasks.Task, got {kind!r}; pass the class itself"
        )
    if missing := _missing(kind):
        raise ConfigError(
            f"the task {kind.__name__} lacks {', '.join(missing)}; define them in the class"
        )
    if options := [*inspect.signature(kind).parameters]:
        raise ConfigError(
            f"a task is made from its name alone, and loaded without options, got {kind.__name__}("
            f"{', '.join(options)}); declare a number as a parameter, which is saved, or register "
            "a class for each value"
        )
    for name in (kind.name, *kind.aliases):
        if name != plain(name) or not name:
            raise ConfigError(
                f"the names of tasks are in lower case, with '-' between words, got {name!r}; call "
                f"it {plain(name)!r}"
            )
        owner = find(name)
        if owner is not None and not is_redefined(owner, kind):
            raise ConfigError(
                f"the name {name!r} is taken by {owner.__name__}, got it for {kind.__name__}; "
                "choose another name"
            )
    _REGISTRY[kind.name] = kind
    return kind


def _missing(kind: type[Task]) -> list[str]:
    """Return the parts that a task needs and this one lacks."""
    parts = [] if isinstance(getattr(kind, "name", None), str) else ["a name"]
    made = getattr(kind, "prediction", None)
    if not (inspect.isclass(made) and issubclass(made, Prediction)):
        parts.append("a prediction (a subclass of pyrolora.tasks.Prediction)")
    else:
        left = sorted(made.__abstractmethods__)
        parts += [f"{name} of its prediction, {made.__name__}" for name in left]
    return [*parts, *(f"{name}()" for name in sorted(kind.__abstractmethods__))]


def plain(name: str) -> str:
    """Return a name as names are compared: in lower case, with '-' between words."""
    return name.strip().lower().replace("_", "-").replace(" ", "-")


def find(name: str) -> type[Task] | None:
    """Return the task with that name, or with that other name; None without such a task."""
    wanted = plain(name)
    return next((k for k in kinds() if wanted in (k.name, *k.aliases)), None)


def task_class(task: str | Task) -> type[Task]:
    """Return the class of a task that is named, or given as an object.

    Raises
    ------
    UnknownNameError
        For a name that does not exist.
    ConfigError
        For anything but a name or an object.
    """
    if isinstance(task, Task):
        return type(task)
    if not isinstance(task, str):
        made = f"; make an object of it, {task.__name__}()" if inspect.isclass(task) else ""
        raise ConfigError(
            f"task must be one of {', '.join(available())}, or a Task object, got {task!r}{made}"
        )
    kind = find(task)
    if kind is None:
        raise UnknownNameError(
            f"unknown task {task!r}; choose one of {', '.join(available())}, or register another "
            "with pyrolora.tasks.register (from a shell: pyrolora --import MODULE ...)"
        )
    return kind


def task_for(
    network: nn.Module, task: str | Task | None = None, row: Mapping[str, Any] | None = None
) -> Task:
    """Return the task that is named or given, or the one that the class of ``network`` calls for.

    An object is copied: a fit sets its parameters. ``row`` is an example of the data, if they are
    known, which may call for another task than the class alone.

    Raises
    ------
    UnknownNameError
        For a name that does not exist.
    ConfigError
        For a network of another task; without a name, when the class of ``network`` says nothing.
    """
    if task is None:
        return _implied_by(network, row or {})
    kind = task_class(task)
    made = copy.deepcopy(task) if isinstance(task, Task) else kind()
    made.check_network(network)
    return made


def _implied_by(network: nn.Module, row: Mapping[str, Any]) -> Task:
    claiming = [kind for kind in kinds() if kind.claims(network, row)]
    for kind in claiming or kinds():
        if claiming or kind.matches(network):
            made = kind()
            made.check_network(network)
            return made
    check_supported(network)
    raise ConfigError(
        f"cannot tell the task from a {type(network).__name__}; "
        f"pass task= one of {', '.join(available())}"
    )
