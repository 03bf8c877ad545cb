"""The inputs that a network takes: their names, and how many tokens of them."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from pyrolora.columns import INPUTS
from pyrolora.data.encoding import Encoder
from pyrolora.data.padding import MASK

REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
MODEL_INPUTS = ("input_ids", "pixel_values", "inputs_embeds", "input_values", "input_features")
# A network with **kwargs is given these, if the data have them.
KNOWN_INPUTS = (
    *MODEL_INPUTS,
    *(MASK, "token_type_ids", "position_ids", "pixel_mask", "image_sizes", "image_grid_thw"),
    *("bbox", "global_attention_mask", "mm_token_type_ids", "pixel_attention_mask"),
    *("pixel_values_videos", "video_grid_thw", "aspect_ratio_ids", "aspect_ratio_mask"),
    *("image_attention_mask", "spatial_shapes", "second_per_grid_ts"),
)


def taken_by(network: nn.Module) -> set[str]:
    """Return the names of the inputs that the network takes.

    The ``**kwargs`` of transformers' own networks are switches; those of other networks, such as a
    wrapper around one, are inputs.
    """
    parameters = inspect.signature(network.forward).parameters.values()
    names = {INPUTS} | {p.name for p in parameters if p.kind not in REST}
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    if open_ended and not isinstance(network, PreTrainedModel):
        names |= {*KNOWN_INPUTS}
    return names


def table_of_positions(network: nn.Module) -> int | None:
    """Return the most tokens that the table of positions has room for; None without a table.

    RoBERTa and its kin count positions from the number of the padding on.
    """
    size: Any = getattr(getattr(network, "config", None), "max_position_embeddings", None)
    for path, module in network.named_modules() if isinstance(size, int) else ():
        name = path.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("position" in name or name == "wpe"):
            taken = 0 if module.padding_idx is None else module.padding_idx + 1
            return min(int(size), module.num_embeddings - taken)
    return None


def embedded(network: nn.Module) -> int | None:
    """Return the number of tokens that have an embedding in the network.

    None where other numbers may have a meaning as well, such as the place of an image.
    """
    config = getattr(network, "config", None)
    find = getattr(network, "get_input_embeddings", None)
    if not callable(find) or getattr(config, "vision_config", None) is not None:
        return None
    try:
        table = find()
    except (NotImplementedError, AttributeError):  # transformers' answer for networks without one
        return None
    rows = getattr(table, "num_embeddings", None)
    known = isinstance(rows, int) and isinstance(getattr(config, "vocab_size", None), int)
    return rows if known else None


def context_length(network: nn.Module) -> float:
    """Return the most tokens that the network reads: by its table, or by its configuration."""
    table = table_of_positions(network)
    if table is not None:
        return table
    config = getattr(network, "config", None)
    places = ("max_encoder_position_embeddings", "max_position_embeddings")
    for source in (config, *(getattr(config, part, None) for part in ("text_config", "encoder"))):
        for size in (getattr(source, name, None) for name in places):
            if isinstance(size, int) and size > 0:  # XLNet, which has no limit, says -1
                return size
    return math.inf


def shift_of(network: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return the network's function from labels to the decoder's inputs; None where it has none.

    It puts the start in front, moves the labels one place on, and padding in the place of -100.
    """
    method = getattr(network, "prepare_decoder_input_ids_from_labels", None)
    if callable(method):
        shift: Callable[[Tensor], Tensor] = method
        return shift
    config: Any = getattr(network, "config", None)
    for kind in type(network).__mro__:
        function = getattr(sys.modules[kind.__module__], "shift_tokens_right", None)
        if callable(function):
            return partial(
                function,
                pad_token_id=config.pad_token_id,
                decoder_start_token_id=config.decoder_start_token_id,
            )
    return None


def written_length(network: nn.Module) -> float:
    """Return the most tokens that the decoder of an encoder-decoder writes, as far as is known."""
    config = getattr(network, "config", None)
    places = ("max_decoder_position_embeddings", "max_target_positions", "max_position_embeddings")
    decoder = getattr(config, "decoder", None)
    sizes = (getattr(source, name, None) for source in (decoder, config) for name in places)
    return next((size for size in sizes if isinstance(size, int) and size > 0), math.inf)


def encoder_for(
    tokenizer: Any,
    context: float,
    *,
    ends: bool = False,
    words: bool = False,
    target: bool = False,
) -> Encoder:
    """Return the encoder of a tokenizer for a network that reads, or writes, ``context`` tokens."""
    limit = min(getattr(tokenizer, "model_max_length", math.inf), context)
    return Encoder(tokenizer, limit, ends, words=words, target=target)
