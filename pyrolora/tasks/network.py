"""The network that a user passes: a module, or the name of one that is then loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
)

from pyrolora.columns import INPUTS
from pyrolora.data.examples import as_examples
from pyrolora.errors import ConfigError, DataError, PyroLoraError
from pyrolora.tasks.base import Task
from pyrolora.tasks.checkpoint import Checkpoint
from pyrolora.tasks.heads import main_input
from pyrolora.tasks.implied import implied
from pyrolora.tasks.registry import task_class
from pyrolora.tasks.unsupported import classes_of

_NO_CLASS = re.compile(r"Unrecognized configuration class .* for this kind of AutoModel: (\w+)")


def load_network(
    model: Any,
    data: Any,
    tokenizer: Any = None,
    task: str | Task | None = None,
    like: nn.Module | None = None,
) -> tuple[nn.Module, Any]:
    """Return the network and its tokenizer, loaded if the network is a hub id or a folder.

    It is loaded as the class that ``task`` calls for, or else the ``data``, with the names of its
    labels, or with the outputs of the network ``like``.

    Raises
    ------
    ConfigError
        When it cannot be loaded, or misses its padding token.
    """
    network, tokenizer, _ = load_for_task(model, data, tokenizer, task, like)
    return network, tokenizer


def load_for_task(
    model: Any,
    data: Any,
    tokenizer: Any = None,
    task: str | Task | None = None,
    like: nn.Module | None = None,
) -> tuple[nn.Module, Any, str | Task | None]:
    """Return what `load_network` does, and the task, where the network's class does not imply it.

    Raises
    ------
    ConfigError
        When it cannot be loaded, or misses its padding token.
    """
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        raise ConfigError(
            f"a {type(model).__name__} has adapters of its own; pass the network before PEFT "
            "wrapped it, and PEFT's configuration as adapter=LoraConfig(...)"
        )
    if isinstance(model, nn.Module):
        return _checked_padding(model), tokenizer, task
    if not isinstance(model, str | Path):
        raise ConfigError(
            "model must be a transformers model, a hub id, a folder, or an nn.Module, got "
            f"{type(model).__name__}"
        )
    name = str(model)
    with _explained(name):
        network, tokenizer, kind = _loaded(name, data, tokenizer, task, like)
    if task is None and not kind.matches(network):
        task = kind.name
    return _checked_padding(network), tokenizer, task


def load_language_model(
    name: str, tokenizer: Any = None, *, trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """Return a network that writes texts, on from its input or apart, and its tokenizer.

    Other networks have a head whose size their folder does not say. Code that lies in the folder is
    run only with ``trust_remote_code``.

    Raises
    ------
    ConfigError
        When it cannot be loaded, or is no language model.
    """
    with _explained(name):
        trust = {"trust_remote_code": trust_remote_code}  # None would ask at the terminal
        config = AutoConfig.from_pretrained(name, **trust)
        architecture = (config.architectures or [""])[0]
        apart = getattr(config, "is_encoder_decoder", False)
        kind = "SEQ_TO_SEQ_CAUSAL_LM" if apart else "CAUSAL_LM"
        if architecture not in classes_of(kind) and not trust_remote_code:
            raise ConfigError(
                f"{name!r} is a {architecture or 'network without a class'}, not a causal "
                "language model, nor one for sequence to sequence; load it with the task head that "
                "is needed, and pass that network"
            )
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(name, **trust)
        loader = AutoModelForSeq2SeqLM if apart else AutoModelForCausalLM
        return loader.from_pretrained(name, dtype="auto", **trust), tokenizer


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except PyroLoraError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        auto = re.search(r"^Unrecognized configuration .* AutoModel: (\w+)", str(error))
        if auto is not None:
            raise ConfigError(
                f"transformers has no class for the network {name!r} in {auto[1]}, which the data "
                "or task= call for; name another task, or take a checkpoint of that kind (a causal "
                "language model learns to choose with choices=)"
            ) from error
        raise ConfigError(
            f"cannot load the model {name!r}: it must be a folder with a transformers model or a "
            f"hub id within reach ({str(error).splitlines()[0]})"
        ) from error


def _loaded(
    name: str, data: Any, tokenizer: Any, task: str | Task | None, like: nn.Module | None
) -> tuple[PreTrainedModel, Any, type[Task]]:
    """Return the network for the task that is named, or that data and checkpoint imply."""
    config = AutoConfig.from_pretrained(name)
    examples = as_examples(data, main_input(config), ("train",))
    checkpoint = Checkpoint(name, config, examples, tokenizer)
    if tokenizer is None:
        tokenizer = _processor(checkpoint)
        checkpoint = Checkpoint(name, config, examples, tokenizer)
    kind = implied(checkpoint) if task is None else task_class(task)
    return kind.load(checkpoint, like), tokenizer, kind


def _processor(checkpoint: Checkpoint) -> Any:
    """Load the processor for the raw data of a checkpoint; None for tensors of pictures or sounds.

    It is the image processor, the feature extractor, the processor of texts with pictures, or the
    tokenizer.
    """
    if checkpoint.writes_of_pictures:
        return transformers.AutoProcessor.from_pretrained(checkpoint.name)
    media = checkpoint.media
    if media is not None and not checkpoint.processes:
        return None
    reads = main_input(checkpoint.config)
    if media is None and reads != INPUTS:
        raise DataError(
            f"{checkpoint.name!r} reads {reads}, and the data have the columns "
            f"{sorted(checkpoint.row)}; pictures stand in a column 'image', sounds in 'audio' "
            "(their files, too), texts need a network of texts"
        )
    auto = "AutoTokenizer" if media is None else media.auto
    return getattr(transformers, auto).from_pretrained(checkpoint.name)


def _checked_padding(network: nn.Module) -> nn.Module:
    """Return a network; a decoder that classifies by its last token must know the padding token."""
    config = getattr(network, "config", None)
    if (
        isinstance(network, PreTrainedModel)
        and hasattr(network, "score")
        and getattr(config, "pad_token_id", None) is None
    ):
        raise ConfigError(
            f"{type(network).__name__} classifies by the last token that is not padding, and its "
            "config has no pad_token_id; set model.config.pad_token_id = tokenizer.pad_token_id"
        )
    return network
