"""The configuration of a saved network: kept, set again, compared; it never chooses code."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from pyrolora.errors import CheckpointError

# Versions, places, files and implementations: none of them changes the function.
DROPPED = {
    *("_name_or_path", "name_or_path", "transformers_version", "architectures", "auto_map"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset"),
    *("_attn_implementation_internal", "experts_implementation", "_experts_implementation"),
    *("_experts_implementation_internal", "quantization_config", "custom_pipelines"),
    *("trust_remote_code", "dtype", "torch_dtype", "torchscript", "transformers_weights"),
    *("fusion_config", "distributed_config", "kernel_config", "gradient_checkpointing"),
    *("output_attentions", "output_hidden_states", "use_cache", "return_dict", "use_return_dict"),
    *("task_specific_params", "tokenizer_class", "_commit_hash", "finetuning_task"),
}
# For training alone, or names of outputs: set again, but other values are the same function.
NEUTRAL = {
    *("id2label", "label2id", "problem_type", "chunk_size_feed_forward", "layerdrop"),
    *("initializer_range", "initializer_factor", "init_std", "router_jitter_noise"),
}
# Values that could name code, a model or a file are compared, and never set from a file.
PLACES = {
    *("", "backbone", "architecture", "architectures", "checkpoint", "path", "paths", "file"),
    *("files", "dir", "folder", "subfolder", "dataset", "repo", "url", "tokenizer", "pretrained"),
    *("kernels", "weights", "safetensors", "revision", "device", "code", "args", "kwargs"),
}
PLACE_NAMES = {"model_type", "model_id", "text_model_id", "audio_model_id", "vision_model_id"}
COUNTS = re.compile("layer|num|depth|expert|block|^n_")
WORD = re.compile(r"[A-Za-z0-9_+ -]{0,64}")
ABSENT = object()


def kept(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the configuration as plain JSON, without the names in `DROPPED`."""
    return _plain(config.to_dict())


def quantisation(config: PreTrainedConfig) -> dict[str, Any]:
    """Return how transformers quantised the network, as plain JSON; empty if it did not."""
    how = getattr(config, "quantization_config", None)
    if how is None:
        return {}
    return _plain(how if isinstance(how, Mapping) else how.to_dict())


def restore(config: PreTrainedConfig, saved: Mapping[str, Any], most: int) -> bool:
    """Set saved values that differ in ``config``; return whether any did.

    Names are those that the architecture's configuration has, without any that may name a place,
    and values have the JSON type that they have there. A number of layers, heads or experts, or the
    sum of several, is at most ``most``, or what it is in ``config``.

    Raises
    ------
    CheckpointError
        For a value that this name cannot have.
    """
    present, changed = kept(config), False
    for key, value in saved.items():
        if key not in present or present[key] == value or _is_place(key):
            continue
        live = getattr(config, key, None)
        if isinstance(live, PreTrainedConfig) and isinstance(value, Mapping):
            changed |= restore(live, value, most)
            continue
        _check(key, value, present[key], most)
        try:
            setattr(config, key, _labels(key, value))
        except (StrictDataclassError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"the saved configuration has {key}={value!r:.80}, which a "
                f"{type(config).__name__} cannot have ({_first_line(error)})"
            ) from error
        changed = True
    return changed


def differences(
    config: PreTrainedConfig, saved: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Iterate over names, saved and present values of entries that change the function.

    All entries do but those in `DROPPED` and `NEUTRAL`, and dropout. An entry that only one side
    has, as between versions of transformers, counts unless its value is the default or false.
    """
    yield from _differences(kept(config), saved, kept_defaults(config))


def kept_defaults(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the defaults of the configuration's class, as `kept` writes them."""
    return _plain(type(config).default_config_fields())


def _differences(
    present: Mapping[str, Any],
    saved: Mapping[str, Any],
    defaults: Mapping[str, Any],
    prefix: str = "",
) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted(present.keys() | saved.keys()):
        here, there = present.get(key, ABSENT), saved.get(key, ABSENT)
        if here == there or key in NEUTRAL | DROPPED or re.search("drop", key):
            continue
        if isinstance(here, dict) and isinstance(there, dict):
            yield from _differences(here, there, defaults.get(key) or {}, f"{prefix}{key}.")
            continue
        if there is ABSENT and (not here or here == defaults.get(key, ABSENT)):
            continue
        if here is ABSENT and not there:
            continue
        saved_value, value = (None if v is ABSENT else v for v in (there, here))
        yield f"{prefix}{key}", saved_value, value


def _plain(value: Any) -> Any:
    """Return a value as JSON has it; special floats and other objects become text."""
    if isinstance(value, PreTrainedConfig):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items() if str(key) not in DROPPED}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return f"float: {value}"
    return (
        value if isinstance(value, bool | int | float | str | None) else f"object: {value!r:.200}"
    )


def _check(key: str, value: Any, present: Any, most: int) -> None:
    """Refuse a value of another type than the present one, that chooses code, or is too large."""
    same_type = value is None or present is None or _type(value) == _type(present)
    free = key in ("id2label", "label2id")
    if not same_type or not (free or _harmless(value)):
        raise CheckpointError(
            f"the saved configuration has {key}={value!r:.80}, and the network's folder has "
            f"{present!r:.80}; load the network with it yourself and pass it: "
            "pyrolora.load(path, model)"
        )
    at_most = max(most, _extent(present))
    if COUNTS.search(key) and _extent(value) > at_most:
        raise CheckpointError(
            f"the saved configuration has {key}={value!r:.80}, more than the {at_most} that the "
            "saved network can have"
        )


def _is_place(key: str) -> bool:
    return key in PLACE_NAMES or not PLACES.isdisjoint(key.split("_"))


def _extent(value: Any) -> float:
    """Return a number's size; for a list, such as layers per stage, its sum or its length."""
    if isinstance(value, list):
        return max(len(value), sum(map(_extent, value)))
    return abs(value) if _type(value) is float else 0


def _harmless(value: Any) -> bool:
    """Return whether a value has only numbers and words that are no address, however nested."""
    if isinstance(value, dict):
        return all(not _is_place(key) and _harmless(part) for key, part in value.items())
    if isinstance(value, list):
        return all(_harmless(part) for part in value)
    return not isinstance(value, str) or WORD.fullmatch(value) is not None


def _type(value: Any) -> type:
    return float if type(value) is int else type(value)


def _labels(key: str, value: Any) -> Any:
    """Return labels with numbers as keys, which JSON does not have."""
    return {int(k): v for k, v in value.items()} if key == "id2label" and value else value


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
