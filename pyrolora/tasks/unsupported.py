"""Networks that no task reads, by transformers' own lists and by their configuration."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from transformers.models.auto import modeling_auto

from pyrolora.errors import ConfigError

MULTI_LABEL = "multi_label_classification"
"""The ``problem_type`` in transformers' configurations of several labels per example."""

# In the order in which a class of several lists is named.
_LISTS = {
    "token classification (a tag per token)": "TOKEN_CLASSIFICATION",
    "extractive question answering": "QUESTION_ANSWERING",
    "visual question answering": "VISUAL_QUESTION_ANSWERING",
    "question answering on documents": "DOCUMENT_QUESTION_ANSWERING",
    "question answering on tables": "TABLE_QUESTION_ANSWERING",
    "object detection": "OBJECT_DETECTION",
    "zero-shot object detection": "ZERO_SHOT_OBJECT_DETECTION",
    "semantic segmentation": "SEMANTIC_SEGMENTATION",
    "instance segmentation": "INSTANCE_SEGMENTATION",
    "segmentation": "UNIVERSAL_SEGMENTATION",
    "depth estimation": "DEPTH_ESTIMATION",
    "speech recognition": "CTC",
    "classification of audio frames": "AUDIO_FRAME_CLASSIFICATION",
}


# Those of them that a task reads, which is named in its place.
_SUPPORTED = {
    "token classification (a tag per token)": "token-classification",
    "extractive question answering": "question-answering",
}


def classes_of(*kinds: str) -> frozenset[str]:
    """Return the names of transformers' classes for these kinds of heads ("CAUSAL_LM")."""
    lists = (getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES", {}) for kind in kinds)
    values = (value for names in lists for value in names.values())
    return frozenset(
        name for value in values for name in ([value] if isinstance(value, str) else value)
    )


# Some of the classes above are also in these lists, which tasks read.
_READ = classes_of(
    "SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "MULTIPLE_CHOICE"
)


def other_task(architecture: str, classes: Collection[str] = ()) -> str | None:
    """Return what that class of transformers does, if neither ``classes`` nor a task reads it."""
    if architecture in _READ or architecture in classes:
        return None
    return next((title for title, kind in _LISTS.items() if architecture in classes_of(kind)), None)


def check_problem_type(network: nn.Module, wanted: str | None) -> None:
    """Refuse a network whose ``problem_type`` has several labels per example, or has not.

    Raises
    ------
    ConfigError
        Where its configuration and the task, whose problem type is ``wanted``, disagree on that.
    """
    known = getattr(getattr(network, "config", None), "problem_type", None)
    if known is None or (known == MULTI_LABEL) == (wanted == MULTI_LABEL):
        return
    several = "several labels" if known == MULTI_LABEL else "one label"
    name = "leave task= out, or name 'multi-label-classification'"
    if known != MULTI_LABEL:
        name = "name the task of one label, 'classification' or 'regression'"
    raise ConfigError(
        f"the config of this {type(network).__name__} says problem_type={known!r}, {several} per "
        f"example, and the task says otherwise; {name}, or load the network with problem_type="
        f"{wanted or 'single_label_classification'!r}"
    )


def check_supported(network: nn.Module, classes: Collection[str] = ()) -> None:
    """Refuse a network that no task reads, or a task other than that of these ``classes``.

    Raises
    ------
    ConfigError
        For a network whose decoder writes another text than its input, and outputs that are neither
        classes of an example nor tokens.
    """
    config: Any = getattr(network, "config", None)
    name = type(network).__name__
    writes = getattr(network, "can_generate", None)
    if getattr(config, "is_encoder_decoder", False) and callable(writes) and writes():
        raise ConfigError(
            f"{name} reads one text with its encoder and writes another with its decoder, which "
            "the labels of another task would not reach; name task='text2text-generation', with "
            "the texts to write, or fit a classifier or a causal language model"
        )
    title = other_task(name, classes)
    if title in _SUPPORTED:
        raise ConfigError(
            f"{name} is a network for {title}, and another task is named; leave task= out, or name "
            f"{_SUPPORTED[title]!r}"
        )
    if title is not None:
        raise ConfigError(
            f"{name} is a network for {title}, which is not supported yet, whichever task is "
            "named; fit a classifier, or a language model, on the same encoder"
        )
