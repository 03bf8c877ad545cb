"""The settings of transformers' ``generate``, as draws of a posterior can follow them."""

from __future__ import annotations

import bisect
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from pyrolora import defaults
from pyrolora.columns import DECODER_IDS, DECODER_MASK
from pyrolora.data.inputs import context_length, written_length
from pyrolora.errors import ConfigError, DataError
from pyrolora.model import JointModel

MODES = ("greedy_search", "sample", "beam_search", "beam_sample")
"""Decodings in which the neighbours of a row stay its neighbours."""
MIXING_ROWS = ("rwkv",)
"""Architectures whose code for one token adds the state of every row to every row of a pass."""
OURS = {
    **dict.fromkeys(("return_dict_in_generate", "stopping_criteria", "tokenizer"), "leave it out"),
    **dict.fromkeys(
        ("input_ids", "attention_mask", "position_ids", "inputs_embeds"),
        "pass inputs as a mapping with input_ids and attention_mask",
    ),
    **dict.fromkeys(
        (DECODER_IDS, DECODER_MASK, "encoder_outputs"),
        "the decoder starts with decoder_start_token_id, and forced_bos_token_id may follow",
    ),
}


def decoding_settings(joint: JointModel, options: Mapping[str, Any]) -> GenerationConfig:
    """Return the settings that ``generate`` will have.

    Raises
    ------
    ConfigError
        For a network that cannot generate, and for options with which rows would meet the weights
        of other draws.
    """
    base: Any = joint.base
    able = getattr(base, "can_generate", None)
    if joint.task.as_text() is None or able is None or not able():
        raise ConfigError(
            "generate() needs a causal language model or a sequence-to-sequence network of "
            f"transformers, fitted as one; this is a {type(base).__name__} with the task "
            f"{joint.task.name!r}"
        )
    # As in transformers, options go before the settings of the network.
    settings = copy.deepcopy(base.generation_config)
    given = options.get("generation_config")
    if given is not None:
        settings.update(**{n: v for n, v in given.to_dict().items() if v is not None})
    try:
        unknown = settings.update(**{n: v for n, v in options.items() if n != "generation_config"})
    except ValueError as error:  # settings that contradict one another
        raise ConfigError(str(error)) from error
    for name, advice in OURS.items():
        if options.get(name) is not None:
            raise ConfigError(f"generate() sets {name} itself: {advice}")
    mode = str(getattr(settings.get_generation_mode(options.get("assistant_model")), "value", ""))
    if mode not in MODES or options.get("custom_generate") is not None:
        unfit = "custom_generate" if mode in MODES else mode
        raise ConfigError(
            f"{unfit} rearranges the rows of a batch, and rows would meet the weights of other "
            f"draws; generate() takes {', '.join(MODES)}"
        )
    if unknown:
        raise ConfigError(f"transformers' generate() has no options {sorted(unknown)}")
    return settings


def mixes_rows(joint: JointModel, settings: GenerationConfig) -> bool:
    """Return whether each text needs passes of its own, since the network's code mixes rows.

    Raises
    ------
    ConfigError
        For settings with which a text takes several rows.
    """
    config: Any = joint.base.config
    if config.model_type not in MIXING_ROWS:
        return False
    for name in ("num_beams", "num_return_sequences"):
        if (getattr(settings, name) or 1) > 1:
            raise ConfigError(
                f"transformers' code of {config.model_type!r} mixes the rows of a pass from the "
                f"second new token on, and {name}={getattr(settings, name)} needs rows beside one "
                "another; leave it out"
            )
    return True


def set_length(joint: JointModel, prompts: list[Tensor], settings: GenerationConfig) -> None:
    """Give continuations a length, unless they have one.

    Raises
    ------
    DataError
        For a prompt whose continuation would leave the network's context.
    """
    apart = joint.task.writes == "apart"
    context = written_length(joint.base) if apart else context_length(joint.base)
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    size = 1 if apart else len(prompts[longest])
    before = "the decoder's start" if apart else f"prompt {longest}"
    if settings.max_new_tokens is None and settings.max_length is None:
        settings.max_new_tokens = int(max(1, min(defaults.MAX_NEW_TOKENS, context - size)))
    if settings.max_new_tokens is None and settings.max_length <= size:
        raise DataError(
            f"{before} has {size} tokens, which max_length={settings.max_length} counts, "
            "too: nothing would be written; pass max_new_tokens"
        )
    needed = size + settings.max_new_tokens if settings.max_new_tokens else settings.max_length
    if needed > context:
        raise DataError(
            f"{before} has {size} tokens, and with its continuation {needed}; the network has "
            f"{context} positions: lower max_new_tokens" + ("" if apart else ", or shorten it")
        )


def start_id(joint: JointModel, settings: GenerationConfig) -> int | None:
    """Return the id with which a decoder of its own starts; None where a prompt is continued.

    Raises
    ------
    ConfigError
        Where there is none, or one for each row.
    """
    if joint.task.writes != "apart":
        return None
    start = settings.decoder_start_token_id
    start = settings.bos_token_id if start is None else start
    if not isinstance(start, int):
        raise ConfigError(
            f"the decoder starts with one token, got decoder_start_token_id={start}; pass "
            "generate(..., decoder_start_token_id=...), the id of a language where the network "
            "writes several"
        )
    return start


def padding_id(settings: GenerationConfig, tokenizer: Any) -> int:
    """Return the id that fills rows up; attention never sees it."""
    for value in (settings.pad_token_id, getattr(tokenizer, "pad_token_id", None)):
        if value is not None:
            return int(value)
    return next(iter(end_ids(settings)), 0)


def end_ids(settings: GenerationConfig) -> set[int]:
    """Return the ids that end a text."""
    ends = settings.eos_token_id
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, list | tuple) else {int(ends)}


def until_end(ids: Tensor, ends: set[int]) -> Tensor:
    """Return the ids up to the first that ends a text, including it."""
    places = torch.isin(ids, torch.tensor(sorted(ends), dtype=ids.dtype)).nonzero()
    return ids[: int(places[0]) + 1] if len(places) else ids


def stop_strings(settings: GenerationConfig, tokenizer: Any) -> StopStrings | None:
    """Return the texts that end a continuation, if there are any, and take them off the settings.

    Raises
    ------
    ConfigError
        For what is no text, and without a tokenizer to read texts.
    """
    given: Any = settings.stop_strings
    settings.stop_strings = None  # transformers' own criterion cannot read every tokenizer
    if given is None or given in ([], ()):
        return None
    texts = (given,) if isinstance(given, str) else tuple(given)
    if not all(isinstance(text, str) and text for text in texts):
        raise ConfigError(f"stop_strings must be texts, got {given!r}")
    if tokenizer is None:
        raise ConfigError(
            "stop_strings are looked for in text, and there is no tokenizer; pass tokenizer= to "
            "fit() or load(), or eos_token_id="
        )
    return StopStrings(texts, tokenizer)


@dataclass(frozen=True)
class StopStrings:
    """The texts of which the first to be complete ends a continuation."""

    texts: tuple[str, ...]
    tokenizer: Any

    def until(self, ids: Tensor) -> Tensor:
        """Return the ids up to the first with which a text is complete, including it."""
        rows = ids.tolist()
        count = bisect.bisect_left(range(len(rows)), True, key=lambda k: self.end(rows[: k + 1]))
        return ids[: count + 1]

    def end(self, ids: Sequence[int]) -> bool:
        """Return whether a text is complete in what the ids say."""
        written = self.tokenizer.decode(ids)
        return any(text in written for text in self.texts)


def check_streamer(streamer: Any, prompts: int, draws: int, settings: GenerationConfig) -> None:
    """Raise `ConfigError` for a streamer of more than one text at a time."""
    texts = prompts * draws * max(settings.num_beams or 1, settings.num_return_sequences or 1)
    if streamer is not None and texts > 1:
        raise ConfigError(
            f"a streamer prints one text as it is written, and here {texts} are written side by "
            "side; pass one prompt, and draws=[k] or num_samples=0, without beams"
        )
