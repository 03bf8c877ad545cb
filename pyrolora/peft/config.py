"""The configuration of an adapter in PEFT's format: which options are taken, and of what type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pyrolora.adapters import AdapterConfig
from pyrolora.errors import CheckpointError, ConfigError
from pyrolora.files import read_strict_json, shown
from pyrolora.options import check_options, short

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PREFIX = "base_model.model."
"""The prefix of every tensor's name."""

REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")
NEUTRAL = {
    *("auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode"),
    *("task_type", "fan_in_fan_out", "megatron_core", "qalora_group_size", "eva_config"),
    *("layers_to_transform", "layers_pattern", "runtime_config"),
}
"""Options without bearing on the function that the stored tensors give."""
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
"""Values of ``init_lora_weights`` that leave the base weights as they were."""


@dataclass(frozen=True)
class LoraOptions:
    """Types of the options of `TAKEN`, as PEFT writes them."""

    peft_type: str
    r: int
    lora_alpha: float
    target_modules: str | Sequence[str] | None
    exclude_modules: str | Sequence[str] | None = None
    target_parameters: Sequence[str] | None = None
    lora_dropout: float | None = None
    modules_to_save: Sequence[str] | None = None
    init_lora_weights: bool | str | None = None
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    use_rslora: bool | None = None


TAKEN = {field.name for field in fields(LoraOptions)}


def read_options(folder: Path) -> dict[str, Any]:
    """Read the configuration of the adapter in ``folder``, and check names and types.

    Raises
    ------
    CheckpointError
        When it is missing, damaged, or has a value that no adapter can have.
    ConfigError
        For a variant of LoRA that pyrolora does not have.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{folder} is no PEFT adapter: it has no {CONFIG_FILE}; pass the folder that "
            "peft_model.save_pretrained(...) wrote, or into which "
            "huggingface_hub.snapshot_download(...) put it"
        )
    options = read_strict_json(file)
    missing = [key for key in REQUIRED if not isinstance(options, dict) or key not in options]
    if missing:
        raise CheckpointError(
            f"{file} has no {missing[0]!r}: it describes no LoRA adapter, or was edited; restore "
            "it from a copy"
        )
    _check_variant(options)
    try:
        check_options(LoraOptions, {n: v for n, v in options.items() if n in TAKEN})
    except ConfigError as error:
        raise CheckpointError(
            f"{file} has a value that no adapter can have: {error}; restore it from a copy"
        ) from error
    return options


def adapter_config(
    options: Mapping[str, Any], layers: list[str], parameters: list[str], heads: list[str]
) -> AdapterConfig:
    """Return the options as ours, with the full names of layers, parameters and heads."""
    gaussian = options.get("init_lora_weights") == "gaussian"
    try:
        return AdapterConfig(
            r=options["r"],
            lora_alpha=options["lora_alpha"],
            target_modules=layers,
            target_parameters=parameters or None,
            lora_dropout=options.get("lora_dropout") or 0.0,
            modules_to_save=heads,
            init_lora_weights="gaussian" if gaussian else "kaiming",
            rank_pattern=options.get("rank_pattern") or {},
            alpha_pattern=options.get("alpha_pattern") or {},
            use_rslora=bool(options.get("use_rslora")),
        )
    except (ConfigError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{CONFIG_FILE} has a value that no adapter can have: {error}; restore it from a copy"
        ) from error


def _check_variant(options: Mapping[str, Any]) -> None:
    """Refuse options under which the layers compute something other than W x + s B A x.

    An option that is not known here is refused unless it is off.
    """
    if options["peft_type"] != "LORA":
        raise ConfigError(
            f"the adapter has peft_type={shown(options['peft_type'])}; pyrolora takes 'LORA' alone"
        )
    start = options.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise ConfigError(
            f"the adapter has init_lora_weights={shown(start)}, which changed the base weights: it "
            "fits no other; save it as a plain LoRA with PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)"
        )
    for name, value in options.items():
        if name not in TAKEN | NEUTRAL and value and value != "none":
            raise ConfigError(
                f"the adapter has {short(name)}={shown(value)}, and pyrolora takes plain LoRA "
                "alone; merge it into its base with PEFT's merge_and_unload() and adapt the "
                "result, or train it again without this option"
            )
