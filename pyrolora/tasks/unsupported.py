"""Networks that no task reads, by transformers' own lists and by their configuration."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from transformers.models.auto import modeling_auto

from pyrolora.errors import ConfigError

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


def check_supported(network: nn.Module, classes: Collection[str] = ()) -> None:
    """Refuse a network that no task reads, or a task other than that of these ``classes``.

    Raises
    ------
    ConfigError
        For a network whose decoder writes another text than its input, several labels per example,
        and outputs that are neither classes of an example nor tokens.
    """
    config: Any = getattr(network, "config", None)
    name = type(network).__name__
    writes = getattr(network, "can_generate", None)
    if getattr(config, "is_encoder_decoder", False) and callable(writes) and writes():
        raise ConfigError(
            f"{name} reads one text with its encoder and writes another with its decoder; such "
            "tasks (translation, summaries, transcription) are not supported yet: their labels "
            "would not reach the decoder. Fit a causal language model, or a classifier"
        )
    if getattr(config, "problem_type", None) == "multi_label_classification":
        raise ConfigError(
            f"the config of this {name} says problem_type='multi_label_classification', and "
            "several labels per example are not supported yet; with one label per example, load "
            "it with problem_type='single_label_classification'"
        )
    title = other_task(name, classes)
    if title is not None and title.startswith("token classification"):
        raise ConfigError(
            f"{name} is a network for {title}, and another task is named; leave task= out, or name "
            "'token-classification'"
        )
    if title is not None:
        raise ConfigError(
            f"{name} is a network for {title}, which is not supported yet, whichever task is "
            "named; fit a classifier, or a language model, on the same encoder"
        )
