"""The network that a user passes: a module, or the name of one that is then loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

from pyrolora.columns import INPUTS, LABELS
from pyrolora.data.collate import has_choices
from pyrolora.data.columns import check_task
from pyrolora.data.examples import as_dict, as_examples
from pyrolora.data.labels import (
    class_names,
    has_class_labels,
    has_class_numbers,
    plain_name,
    raw_labels,
)
from pyrolora.errors import ConfigError, DataError, PyroLoraError
from pyrolora.tasks import (
    CausalLM,
    MaskedLM,
    MultipleChoice,
    Regression,
    unsupported_task,
)

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
    task: str | None = None,
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
        network, tokenizer = _loaded(name, data, tokenizer, task, like)
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
    name: str, data: Any, tokenizer: Any, task: str | None, like: nn.Module | None
) -> tuple[PreTrainedModel, Any]:
    """The network of a likelihood that `_implied` knows, else a classifier with as many classes as
    the labels, or ``like``, have, or with one output for real-valued labels."""
    config = AutoConfig.from_pretrained(name)
    examples = as_examples(data, INPUTS, ("train",))
    head = _head(name, examples)
    if tokenizer is None and head is AutoModelForSequenceClassification:
        tokenizer = AutoTokenizer.from_pretrained(name)
    architecture = (config.architectures or [""])[0]
    if task is None:
        _check_tokens(name, architecture, config, examples)
    loader = _LOADERS.get(task or _implied(name, architecture, examples))
    if loader is not None:
        return loader.from_pretrained(name, dtype="auto"), tokenizer
    known = getattr(getattr(like, "config", None), "id2label", None)
    if known:
        outputs = _named(known[number] for number in sorted(known))
    else:
        outputs = _outputs(examples, task, config)
    classes = outputs.get("num_labels", len(outputs.get("id2label", config.id2label)))
    if _classifies(config) and classes != config.num_labels:
        raise ConfigError(
            f"{name!r} is a classifier with {config.num_labels} outputs, and the data needs "
            f"{classes}; for a new head pass the model itself, loaded with "
            f"num_labels={classes}, ignore_mismatched_sizes=True"
        )
    network = head.from_pretrained(name, dtype="auto", **outputs)
    if tokenizer is not None and getattr(network.config, "pad_token_id", None) is None:
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
            "task='classification' (or 'regression'), or 'causal_lm' for the text alone"
        )
    if architecture in _CAUSAL:
        return CausalLM.name
    return MaskedLM.name if architecture in _MASKED and not labelled else None


def _head(name: str, examples: Any) -> Any:
    """transformers' loader of a classifier of texts or of images."""
    row = as_dict(examples[0], INPUTS) if len(examples) else {}
    if "pixel_values" in row and "input_ids" not in row:
        return AutoModelForImageClassification
    if any(part in row for part in ("input_values", "input_features")):
        raise ConfigError(
            f"{name!r} is given by its name, and the data are sound, which is not loaded by name; "
            "pass the network itself (AutoModelForAudioClassification.from_pretrained(...)), with "
            "task="
        )
    return AutoModelForSequenceClassification


def _check_tokens(name: str, architecture: str, config: Any, examples: Any) -> None:
    """Raise for labels that are neither an example's class nor plainly tokens."""
    if len(examples) == 0:
        return
    row = as_dict(examples[0], INPUTS)
    check_task([*row])
    labels = row.get(LABELS)
    if has_choices(examples) or has_class_labels(examples):
        return
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{name!r} ({architecture}) reads one text and writes another; such tasks are not "
            "supported yet, and the data has no label per example to classify by"
        )
    if labels is None or architecture in _CAUSAL:
        return
    if torch.as_tensor(labels).is_floating_point():
        raise DataError(
            f"the data has {len(labels)} numbers as the labels of an example: several labels per "
            "example (multi-label classification) are not supported yet"
        )
    ids: Any = row.get("input_ids")
    if ids is not None and len(ids) == len(labels):
        task = unsupported_task(architecture)
        if task is not None or architecture not in _MASKED:
            raise ConfigError(
                f"the data has a label per token, and {name!r} is a {architecture}: token "
                "classification (a tag per token) is not supported yet"
            )
        raise DataError(
            f"the data has a label per token, and {name!r} is a {architecture}: the labels are "
            "tags, of token classification (not supported yet), or tokens of the vocabulary; for "
            "these say task='masked_lm'"
        )


def _classifies(config: Any) -> bool:
    """Whether a checkpoint has a head for classes already."""
    architecture = (config.architectures or [""])[0]
    return architecture.endswith(("ForSequenceClassification", "ForImageClassification"))


def _outputs(examples: Any, task: str | None, config: Any) -> dict[str, Any]:
    """The classes that the labels have, with their names where they have names (the model's own
    stay, if it knows these names); one output for real-valued labels."""
    names = None if task == Regression.name else class_names(examples)
    own = {int(number): str(name) for number, name in config.id2label.items()}
    if names is not None and {*map(plain_name, names)} <= {*map(plain_name, own.values())}:
        return {}
    if names is not None and _classifies(config) and len(names) == len(own):
        return _renamed(examples, names, own)
    if names is not None:
        return _named(names)
    labels = raw_labels(examples)
    real = task == Regression.name or (task is None and labels.is_floating_point())
    return {"num_labels": 1 if real else max(int(labels.max()) + 1, 2)}


def _renamed(examples: Any, names: list[str], own: dict[int, str]) -> dict[str, Any]:
    """The data's names for the classes of a trained head, if the head has none and the data's are
    numbered."""
    made_up = set(own.values()) == {f"LABEL_{i}" for i in own}
    if made_up and has_class_numbers(examples):
        return _named(names)
    raise DataError(
        f"the data's classes are called {names}, and those of the checkpoint, whose head is "
        f"trained, {own}: by number they would be {dict(enumerate(names))}, by name they are "
        "others. Rename them with data.cast_column('label', datasets.ClassLabel(names=[...])), or "
        "pass the model itself, loaded with the id2label that is meant"
    )


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
