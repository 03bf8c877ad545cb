"""Heads of classifiers: the outputs that data need, and networks loaded with them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from pyrolora.columns import INPUTS
from pyrolora.data.labels import has_class_numbers, plain_name, raw_labels
from pyrolora.data.media.media import KINDS
from pyrolora.errors import ConfigError, DataError
from pyrolora.tasks.checkpoint import Checkpoint

_HEADS = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification")


def auto_classifier(checkpoint: Checkpoint) -> str:
    """Return transformers' Auto class of a classifier of texts, of pictures or of sounds.

    Raises
    ------
    ConfigError
        For tensors of pictures or sounds, and a network that reads none by transformers' lists.
    """
    media = checkpoint.media
    if media is None:
        return "AutoModelForSequenceClassification"
    if not checkpoint.has_class(media.heads):
        raise ConfigError(
            f"{checkpoint.name!r} is given by its name, the data are {media.column}s, and none of "
            f"transformers' classifiers of {media.column}s is a {checkpoint.config.model_type!r}; "
            "pass the network itself, with task="
        )
    return media.auto_model


def main_input(config: Any) -> str:
    """Return the main input of the classifiers of an architecture, by its configuration."""
    kind = getattr(config, "model_type", None)
    for media in KINDS:
        names = getattr(modeling_auto, f"MODEL_FOR_{media.heads}_MAPPING_NAMES")
        if (
            kind in names
            and kind not in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        ):
            name = names[kind]
            loaded = getattr(transformers, name if isinstance(name, str) else name[0])
            return str(loaded.main_input_name)
    return INPUTS


def load_head(
    checkpoint: Checkpoint, outputs: dict[str, Any], auto: str | None = None
) -> PreTrainedModel:
    """Load a classifier with these outputs, of examples or by the Auto class ``auto``.

    Raises
    ------
    ConfigError
        For a checkpoint that has a trained head of another size.
    """
    config, name = checkpoint.config, checkpoint.name
    size = outputs.get("num_labels", len(outputs.get("id2label", config.id2label)))
    if _classifies(checkpoint, auto) and size != config.num_labels:
        raise ConfigError(
            f"{name!r} is a classifier with {config.num_labels} outputs, and the data needs "
            f"{size}; for a new head pass the model itself, loaded with "
            f"num_labels={size}, ignore_mismatched_sizes=True"
        )
    loader = getattr(transformers, auto or auto_classifier(checkpoint))
    network = loader.from_pretrained(name, dtype="auto", **outputs)
    padding = getattr(checkpoint.tokenizer, "pad_token_id", None)
    if getattr(network.config, "pad_token_id", None) is None and padding is not None:
        network.config.pad_token_id = padding
    return network


def outputs_like(network: nn.Module | None) -> dict[str, Any]:
    """Return the outputs of an earlier network, with their names; none where it names none."""
    known = getattr(getattr(network, "config", None), "id2label", None)
    return _named(known[number] for number in sorted(known)) if known else {}


def outputs_of(
    checkpoint: Checkpoint,
    names: list[str] | None,
    labels: Any = None,
    auto: str | None = None,
) -> dict[str, Any]:
    """Return the classes of the labels, with their names in the data, if they have names there.

    The names of the model itself stay, if it knows those of the data. ``labels`` are a data set of
    labels; by default they are those of the examples.
    """
    examples = checkpoint.examples if labels is None else labels
    known = {int(number): str(name) for number, name in checkpoint.config.id2label.items()}
    if names is None:
        return {"num_labels": max(int(raw_labels(examples).max()) + 1, 2)}
    if {*map(plain_name, names)} <= {*map(plain_name, known.values())}:
        return {}
    if _classifies(checkpoint, auto) and len(names) == len(known):
        return _renamed(examples, names, known)
    return _named(names)


def _classifies(checkpoint: Checkpoint, auto: str | None) -> bool:
    """Return whether a checkpoint has a head for classes already."""
    heads = _HEADS if auto is None else (auto.removeprefix("AutoModel"),)
    return checkpoint.architecture.endswith(heads)


def _renamed(examples: Any, names: list[str], known: dict[int, str]) -> dict[str, Any]:
    """Return the data's names for a trained head without names, if the data's are numbered."""
    made_up = set(known.values()) == {f"LABEL_{i}" for i in known}
    if made_up and has_class_numbers(examples):
        return _named(names)
    raise DataError(
        f"the data's classes are called {names}, and those of the checkpoint, whose head is "
        f"trained, {known}: by number they would be {dict(enumerate(names))}, by name they are "
        "others. Rename them with data.cast_column('label', datasets.ClassLabel(names=[...])), or "
        "pass the model itself, loaded with the id2label that is meant"
    )


def _named(names: Iterable[str]) -> dict[str, Any]:
    id2label = dict(enumerate(names))
    return {"id2label": id2label, "label2id": {name: i for i, name in id2label.items()}}
