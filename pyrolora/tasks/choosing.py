"""The short names of the laws by which a causal language model chooses."""

from __future__ import annotations

from pyrolora.errors import ConfigError
from pyrolora.tasks.base import Task
from pyrolora.tasks.causal_choice import LetterChoice, TextChoice, TokenMeanChoice
from pyrolora.tasks.registry import task_class

BY_CAUSAL_LM: dict[str, type[LetterChoice] | type[TextChoice]] = {
    kind.short: kind for kind in (LetterChoice, TextChoice, TokenMeanChoice)
}


def choice_task(choices: str | None, task: str | Task | None = None) -> str | Task | None:
    """Return the task that ``choices`` names beside ``task``; ``task`` where it is None.

    Raises
    ------
    ConfigError
        For another value, and beside another task.
    """
    if choices is None:
        return task
    if not isinstance(choices, str) or choices not in BY_CAUSAL_LM:
        raise ConfigError(
            f"choices must be one of {', '.join(map(repr, BY_CAUSAL_LM))}, got {choices!r}"
        )
    kind = BY_CAUSAL_LM[choices]
    if task is None:
        return kind.name
    named = task_class(task)
    if named is not kind:
        raise ConfigError(
            f"choices={choices!r} is the task {kind.name!r}, and task= names {named.name!r}; leave "
            "one of them out"
        )
    return task
