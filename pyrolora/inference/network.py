"""The network that a user passes: a module, or the name of one that is then loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

from pyrolora.errors import ConfigError, PyroLoraError
from pyrolora.inference.batches import has_choices
from pyrolora.inference.examples import as_examples
from pyrolora.inference.labels import class_names, has_class_labels, raw_labels
from pyrolora.likelihoods import CausalLM, MaskedLM, MultipleChoice, Regression
from pyrolora.model import INPUTS

_CAUSAL = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
_MASKED = set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
_LOADERS: dict[str | None, Any] = {
    CausalLM.name: AutoModelForCausalLM,
    MaskedLM.name: AutoModelForMaskedLM,
    MultipleChoice.name: AutoModelForMultipleChoice,
}


def load_network(
    model: Any,
    data: Any,
    tokenizer: Any = None,
    likelihood: str | None = None,
    like: nn.Module | None = None,
) -> tuple[nn.Module, Any]:
    """The network and its tokenizer; loaded, if it is given by a hub id or folder, as the class
    that ``data`` and ``likelihood`` call for, with the names of its labels, or with the outputs of
    the network ``like``.

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
        return _checked_padding(model), tokenizer
    if not isinstance(model, str | Path):
        raise ConfigError(
            "model must be a transformers model, a hub id, a folder, or an nn.Module, got "
            f"{type(model).__name__}"
        )
    name = str(model)
    with _explained(name):
        network, tokenizer = _loaded(name, data, tokenizer, likelihood, like)
    return _checked_padding(network), tokenizer


def load_language_model(
    name: str, tokenizer: Any = None, *, trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer; other networks have a head whose size their
    folder does not say. Code that lies in the folder is run only with ``trust_remote_code``.

    Raises
    ------
    ConfigError
        When it cannot be loaded, or is no language model.
    """
    with _explained(name):
        trust = {"trust_remote_code": trust_remote_code}  # None would ask at the terminal
        architecture = (AutoConfig.from_pretrained(name, **trust).architectures or [""])[0]
        if architecture not in _CAUSAL and not trust_remote_code:
            raise ConfigError(
                f"{name!r} is a {architecture or 'network without a class'}, not a causal "
                "language model; load it with the task head that is needed, and pass that network"
            )
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(name, **trust)
        return AutoModelForCausalLM.from_pretrained(name, dtype="auto", **trust), tokenizer


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except PyroLoraError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"cannot load the model {name!r}: it must be a folder with a transformers model or a "
            f"hub id within reach ({str(error).splitlines()[0]})"
        ) from error


def _loaded(
    name: str, data: Any, tokenizer: Any, likelihood: str | None, like: nn.Module | None
) -> tuple[PreTrainedModel, Any]:
    """The network of a likelihood that `_implied` knows, else a classifier with as many classes as
    the labels, or ``like``, have, or with one output for real-valued labels."""
    config = AutoConfig.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name) if tokenizer is None else tokenizer
    examples = as_examples(data, INPUTS, ("train",))
    architecture = (config.architectures or [""])[0]
    loader = _LOADERS.get(likelihood or _implied(name, architecture, examples))
    if loader is not None:
        return loader.from_pretrained(name, dtype="auto"), tokenizer
    known = getattr(getattr(like, "config", None), "id2label", None)
    if known:
        outputs = _named(known[number] for number in sorted(known))
    else:
        outputs = _outputs(examples, likelihood, config)
    classes = outputs.get("num_labels", len(outputs.get("id2label", config.id2label)))
    if architecture.endswith("ForSequenceClassification") and classes != config.num_labels:
        raise ConfigError(
            f"{name!r} is a classifier with {config.num_labels} outputs, and the data needs "
            f"{classes}; for a new head pass the model itself, loaded with "
            f"num_labels={classes}, ignore_mismatched_sizes=True"
        )
    network = AutoModelForSequenceClassification.from_pretrained(name, dtype="auto", **outputs)
    if network.config.pad_token_id is None and tokenizer is not None:
        network.config.pad_token_id = tokenizer.pad_token_id
    return network, tokenizer


def _implied(name: str, architecture: str, examples: Any) -> str | None:
    """The likelihood that data and checkpoint call for, unless it is about classes or numbers:
    multiple choice where there are choices; a language model where the checkpoint is one and there
    is no label an example, for which a masked one becomes a classifier."""
    if has_choices(examples):
        return MultipleChoice.name
    labelled = has_class_labels(examples)
    if architecture in _CAUSAL and labelled:
        raise ConfigError(
            f"{name!r} is a language model and the data has labels; say which is meant: "
            "likelihood='classification' (or 'regression'), or 'causal_lm' for the text alone"
        )
    if architecture in _CAUSAL:
        return CausalLM.name
    return MaskedLM.name if architecture in _MASKED and not labelled else None


def _outputs(examples: Any, likelihood: str | None, config: Any) -> dict[str, Any]:
    """The classes that the labels have, with their names where they have names (the model's own
    stay, if it knows these names); one output for real-valued labels."""
    names = None if likelihood == Regression.name else class_names(examples)
    if names is not None and set(names) <= set(config.id2label.values()):
        return {}
    if names is not None:
        return _named(names)
    labels = raw_labels(examples)
    real = likelihood == Regression.name or (likelihood is None and labels.is_floating_point())
    return {"num_labels": 1 if real else max(int(labels.max()) + 1, 2)}


def _named(names: Iterable[str]) -> dict[str, Any]:
    id2label = dict(enumerate(names))
    return {"id2label": id2label, "label2id": {name: i for i, name in id2label.items()}}


def _checked_padding(network: nn.Module) -> nn.Module:
    """A decoder that classifies by its last token has to know the padding token."""
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
