"""Settings on the command line: ``--set guide.kl_weight=0.1``, by the names of Python."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pyrolora.errors import ConfigError

PARTS = ("guide", "adapter", "texts", "training")
WORDS = {"True": True, "False": False, "None": None}  # Python's, beside JSON's

# Options of TrainingArguments that have their own option on the command line, or that resuming and
# clean output depend on.
TAKEN = {
    "output_dir": "use --output-dir",
    "num_train_epochs": "use --epochs",
    "learning_rate": "use --learning-rate",
    "per_device_train_batch_size": "use --batch-size",
    "seed": "use --seed",
    "resume_from_checkpoint": "repeat the command, and it resumes",
    "save_only_model": "a run could not resume",
    "disable_tqdm": "progress goes to standard error, 2>/dev/null hides it",
}


def parse(settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return part -> option -> value from strings ``part.option=value``.

    A value is read as JSON (``0.1``, ``true``, ``null``, ``["query", "value"]``), or else as a
    string.
    """
    parsed: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
    for setting in settings:
        name, equals, text = setting.partition("=")
        part, dot, option = name.strip().partition(".")
        if not equals or not dot or not option or part not in parsed:
            raise ConfigError(
                f"--set {setting!r} is not understood; write PART.OPTION=VALUE, for example "
                f"guide.kl_weight=0.1; PART is one of {', '.join(PARTS)}"
            )
        if option in parsed[part]:
            raise ConfigError(f"--set {part}.{option} was given twice")
        parsed[part][option] = _value(text.strip())
    return parsed


def build(kind: type, part: str, values: Mapping[str, Any]) -> Any:
    """Return ``kind(**values)``, for a dataclass of options."""
    check(kind, part, values)
    return kind(**values)


def refined(guide: Any, values: Mapping[str, Any], part: str = "guide") -> Any:
    """Return a guide with these options; ``inner.kl_weight`` is one of the guide inside."""
    outer = {name: value for name, value in values.items() if not name.startswith("inner.")}
    nested = {n.removeprefix("inner."): v for n, v in values.items() if n.startswith("inner.")}
    inner = getattr(guide, "inner", None)
    if "inner" in outer:
        raise ConfigError(f"--set {part}.inner: name it in --guide, as in {guide.name}+montec")
    check(type(guide), part, outer)
    if nested:
        if inner is None:
            raise ConfigError(f"--set {part}.inner: {guide.name!r} has no guide inside")
        outer["inner"] = refined(inner, nested, f"{part}.inner")
    return dataclasses.replace(guide, **outer)


def check(kind: type, part: str, values: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for names that are no option of ``kind``, and values of another type."""
    from pyrolora.options import check_options

    check_options(kind, values, f"--set {part}.")


def check_training(values: Mapping[str, Any]) -> None:
    """Apply `check` to ``TrainingArguments``, without those that the command line sets itself."""
    from transformers import TrainingArguments

    for name in values:
        if name in TAKEN:
            raise ConfigError(f"--set training.{name}: {TAKEN[name]}")
    check(TrainingArguments, "training", values)


def _value(text: str) -> Any:
    try:
        return WORDS[text] if text in WORDS else json.loads(text)
    except json.JSONDecodeError:
        return text
