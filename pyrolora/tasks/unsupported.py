"""Tasks that no likelihood here reads, by transformers' own lists and by what a network gives."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.auto import modeling_auto

from pyrolora.errors import ConfigError

# Named first that a class may stand in several lists for.
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
# Of classes in several lists, these have a likelihood.
_READ = frozenset(
    name
    for kind in ("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "MULTIPLE_CHOICE")
    for value in getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").values()
    for name in ([value] if isinstance(value, str) else value)
)


def unsupported_task(architecture: str) -> str | None:
    """The task of that class of transformers, if no likelihood reads it."""
    for title, kind in _LISTS.items():
        names = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES", {}).values()
        if architecture in names and architecture not in _READ:
            return title
    return None


def check_task(network: nn.Module) -> None:
    """Refuse a network of a task without a likelihood, whichever is named.

    Raises
    ------
    ConfigError
        For a network that writes what its decoder is given apart from its input, several labels per
        example, and outputs that are neither classes of an example nor tokens.
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
    task = unsupported_task(name)
    if task is not None:
        raise ConfigError(
            f"{name} is a network for {task}, which is not supported yet, whichever likelihood is "
            "named; fit a classifier, or a language model, on the same encoder"
        )
