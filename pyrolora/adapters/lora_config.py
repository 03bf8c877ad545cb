"""The adapter configuration that a user passes: ours, or PEFT's."""

from __future__ import annotations

import dataclasses
from typing import Any

from pyrolora.adapters.config import AdapterConfig
from pyrolora.errors import ConfigError

_NAMES = {True: "kaiming", "lora_ga": "lora-ga"}
"""PEFT's names of initialisers to ours, where they differ."""
_WHY = {
    "bias": "biases stay as they are; train a module in full with modules_to_save",
    "trainable_token_indices": "rows of an embedding that are trained in full would be points; "
    "name the embedding in target_modules, where all of its rows have a posterior",
    "use_dora": "the posterior is one of W + s B A, and DoRA scales that by a norm of its own",
    "lora_bias": "the update is s B A x alone",
}
"""Why some options are refused, and what to do instead."""


def as_adapter_config(adapter: Any) -> AdapterConfig:
    """Return an `AdapterConfig` for None, one of ours, or a ``peft.LoraConfig``.

    Raises
    ------
    ConfigError
        For a LoraConfig that asks for a variant of LoRA.
    """
    if adapter is None:
        return AdapterConfig()
    if isinstance(adapter, AdapterConfig):
        return adapter
    if type(adapter).__name__ != "LoraConfig":
        raise ConfigError(
            "adapter must be a pyrolora.AdapterConfig or a peft.LoraConfig, got "
            f"{type(adapter).__name__}; make one of these of it"
        )
    taken = {field.name for field in dataclasses.fields(AdapterConfig)}
    neutral = {"task_type", "peft_type", "peft_version", "inference_mode", "auto_mapping"}
    neutral |= {"base_model_name_or_path", "revision", "runtime_config", "fan_in_fan_out"}
    plain = type(adapter)()
    for field in dataclasses.fields(adapter):
        value = getattr(adapter, field.name)
        if field.name == "lora_ga_config" and value == type(value)():
            continue  # PEFT's default start, which is ours
        if field.name not in taken | neutral and value != getattr(plain, field.name):
            why = _WHY.get(field.name)
            raise ConfigError(
                f"pyrolora does not support LoraConfig({field.name}={value!r})"
                + (f": {why}; leave it out" if why else "; leave it out")
            )
    options = {name: getattr(adapter, name) for name in taken if hasattr(adapter, name)}
    options["target_modules"] = _in_order(
        options["target_modules"]
    )  # None means what it means here
    options["exclude_modules"] = _in_order(options["exclude_modules"]) or None
    start = options["init_lora_weights"]
    options["init_lora_weights"] = _NAMES.get(start, start)
    return AdapterConfig(**options)


def _in_order(names: Any) -> Any:
    """Return names as a list: PEFT keeps lists as sets."""
    return sorted(names) if isinstance(names, set) else names
