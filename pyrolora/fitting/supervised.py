"""TRL's ``SFTConfig`` as the Trainer's arguments: which of its options have an effect here."""

from __future__ import annotations

import dataclasses
from typing import Any

from pyrolora.data import TextOptions
from pyrolora.errors import ConfigError

READ = tuple(field.name for field in dataclasses.fields(TextOptions))
"""Its options that are `TextOptions`."""
OURS = "set it on the tokenizer, and pass that as tokenizer="
LOADED = "load the network yourself, and pass it as model"
NEUTRAL: dict[str, tuple[Any, str]] = {
    "loss_type": ("nll", "the likelihood is that of the tokens"),
    "truncation_mode": ("keep_start", "the first tokens of a text are kept"),
    "packing_strategy": ("bfd", "texts are packed whole, best fit first"),
    "eval_packing": (None, "texts are scored one per row"),
    "shuffle_dataset": (False, "the Trainer shuffles; or pass data.shuffle()"),
    "padding_free": (False, "texts of like length are padded, or packed with packing=True"),
    "pad_to_multiple_of": (None, "texts are padded to the longest of their batch"),
    "eos_token": (None, OURS),
    "pad_token": (None, OURS),
    "chat_template_path": (None, "set tokenizer.chat_template, and pass tokenizer="),
    "dataset_kwargs": (None, "tokenise the data yourself to have it read as it is"),
    "dataset_num_proc": (None, "tokenise the data yourself to have several processes do it"),
    "model_init_kwargs": (None, LOADED),
    "trust_remote_code": (False, LOADED),
    "router_aux_loss_coef": (None, "the likelihood is that of the tokens alone"),
    "activation_offloading": (False, "gradient_checkpointing=True saves memory"),
}
"""Its options that would have no effect here: their neutral value, and what to do instead."""


def is_supervised(training: Any) -> bool:
    """Return whether the Trainer's arguments are those of TRL for supervised fine-tuning."""
    names = [(kind.__module__.partition(".")[0], kind.__name__) for kind in type(training).__mro__]
    return ("trl", "SFTConfig") in names


def read_options(training: Any) -> tuple[str, ...]:
    """Return the names of the options that TRL's arguments have beside those of the Trainer."""
    return (*READ, *NEUTRAL) if is_supervised(training) else ()


def text_options_of(training: Any) -> TextOptions | None:
    """Return how TRL's arguments have texts read; None for other arguments.

    Raises
    ------
    ConfigError
        For an option that would have no effect here.
    """
    if not is_supervised(training):
        return None
    for name, (neutral, reason) in NEUTRAL.items():
        value = getattr(training, name, neutral)
        if value not in (neutral, None) and not (name == "eval_packing" and value is False):
            raise ConfigError(f"training={name}={value!r} is not supported: {reason}; leave it out")
    return TextOptions(**{name: getattr(training, name) for name in READ})
