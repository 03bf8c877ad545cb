"""The Trainer's arguments: those of fit's shortcuts, and those that are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from pyrolora import defaults
from pyrolora.checks import positive, whole_number
from pyrolora.errors import ConfigError
from pyrolora.processes import launched

OURS = "pyrolora evaluates the predictive mean itself, and makes no use of it"
SPREAD = (
    "several processes train with torchrun, and fsdp=True shares the frozen network's weights out "
    "over them; what is trained is small, and whole in each"
)
UNUSED: dict[str, tuple[Any, str]] = {
    "label_smoothing_factor": (0.0, "the likelihood is that of the labels as they are"),
    "neftune_noise_alpha": (None, "noise on the weights is the guide 'flat'"),
    "use_liger_kernel": (False, "its kernels would replace layers that are adapted"),
    "auto_find_batch_size": (False, "a second attempt would start from where the first one ended"),
    "prediction_loss_only": (False, OURS),
    "eval_accumulation_steps": (None, OURS),
    "eval_do_concat_batches": (True, OURS),
    "eval_use_gather_object": (False, OURS),
    "include_for_metrics": ([], OURS),
    "batch_eval_metrics": (False, OURS),
    "bf16_full_eval": (False, OURS),
    "fp16_full_eval": (False, OURS),
    "average_tokens_across_devices": (True, "examples are always counted over all devices"),
    "label_names": (None, "the labels are the column 'labels'"),
    "optim_target_modules": (None, "it is for optimisers of whole weight matrices, such as GaLore"),
    "deepspeed": (None, SPREAD),
    "parallelism_config": (None, SPREAD),
    "push_to_hub": (False, "upload the fit with posterior.push_to_hub(...)"),
}
"""Arguments of the Trainer that would have no effect here, or another than they promise: their
neutral value, and the reason."""


def training_arguments(
    output_dir: str | Path,
    *,
    epochs: float = defaults.EPOCHS,
    learning_rate: float = defaults.LEARNING_RATE,
    batch_size: int = defaults.BATCH_SIZE,
    seed: int = defaults.SEED,
    save: bool = True,
    **more: Any,
) -> TrainingArguments:
    """Return ``TrainingArguments`` with pyrolora's defaults.

    Parameters
    ----------
    output_dir
        Where checkpoints go.
    epochs, learning_rate, batch_size, seed
        As in `pyrolora.fit`.
    save
        Write ten checkpoints per run, and keep the last two.
    more
        Further arguments of ``TrainingArguments``; they take precedence.

    Raises
    ------
    ConfigError
        For values outside their range.
    """
    positive("epochs", epochs)
    positive("learning_rate", learning_rate)
    whole_number("batch_size", batch_size, at_least=1)
    whole_number("seed", seed, at_least=0, at_most=defaults.MAX_SEED)
    whole_number(
        "gradient_accumulation_steps", more.get("gradient_accumulation_steps", 1), at_least=1
    )
    options: dict[str, Any] = {
        "num_train_epochs": float(epochs),
        "learning_rate": float(learning_rate),
        "per_device_train_batch_size": int(batch_size),
        "per_device_eval_batch_size": int(batch_size),
        "seed": int(seed),
        "save_strategy": "steps" if save else "no",
        "save_steps": 0.1,
        "save_total_limit": 2,
        "logging_steps": 0.05,
        "report_to": "none",
        "disable_tqdm": False,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        # Processes without an accelerator train together only if they are told that there is none.
        "use_cpu": launched() > 1 and not torch.accelerator.is_available(),
        "ddp_find_unused_parameters": False,  # every trained tensor is used in every step
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }
    return TrainingArguments(output_dir=str(output_dir), **{**options, **more})


def check_arguments(training: Any, read: Collection[str] = ()) -> None:
    """Raise `ConfigError` unless these are ``TrainingArguments`` that all have an effect.

    ``read`` are the options of a class with more of them that have one.
    """
    if not isinstance(training, TrainingArguments):
        raise ConfigError(
            f"training must be a transformers.TrainingArguments, got {training!r}; epochs=, "
            "learning_rate=, batch_size= and seed= need none"
        )
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    fields = dataclasses.fields(training)
    added = [field for field in fields if field.name not in known.union(read)]
    changed = [
        f"{field.name}={getattr(training, field.name)!r}"
        for field in added
        if getattr(training, field.name) != _default(field)
    ]
    by_default = bool(read) or isinstance(training, Seq2SeqTrainingArguments)  # ask for nothing
    if changed or (added and not by_default):
        raise ConfigError(
            f"training is a {type(training).__name__}, whose own options would have no effect here "
            f"({', '.join(changed or [field.name for field in added])}); pass a plain "
            "transformers.TrainingArguments, and prepare the data as those options say"
        )
    for name, (neutral, reason) in UNUSED.items():
        value = getattr(training, name, neutral)
        if value not in (neutral, None, [], ["labels"] if name == "label_names" else neutral):
            raise ConfigError(f"training={name}={value!r} is not supported: {reason}; leave it out")
    if training.torch_compile:
        _check_compiler(training)
    if training.fp16 and training.device.type == "cpu":
        raise ConfigError(
            "training=fp16=True has no effect on a CPU; choose bf16=True and use_cpu=True"
        )
    for name in training.report_to:
        try:
            get_reporting_integration_callbacks([name])[0]()
        except (ImportError, RuntimeError) as error:
            raise ConfigError(f"training=report_to={name!r} cannot be used: {error}") from error
    strategy = training.train_sampling_strategy
    if training.world_size > 1 and strategy not in ("random", "sequential"):
        raise ConfigError(
            f"training=train_sampling_strategy={strategy!r} is not supported in several processes, "
            "which have to agree on the order of the data; leave it out"
        )
    if training.resume_from_checkpoint and strategy not in ("random", "sequential"):
        raise ConfigError(
            f"a fit with train_sampling_strategy={strategy!r} cannot be resumed: its order of the "
            "data would differ from the first one; begin anew, without resume_from_checkpoint"
        )


def _check_compiler(training: TrainingArguments) -> None:
    """Raise `ConfigError` for a backend or a mode that torch does not have, or does not use."""
    for name, known in (
        ("backend", torch.compiler.list_backends(exclude_tags=())),
        ("mode", [None, "default", *torch._inductor.list_mode_options()]),
    ):
        value = getattr(training, f"torch_compile_{name}")
        if value not in known:
            raise ConfigError(
                f"training=torch_compile_{name}={value!r} is not known to torch; choose "
                f"{', '.join(repr(one) for one in known if one is not None)}"
            )
    backend, mode = training.torch_compile_backend, training.torch_compile_mode
    if mode is not None and backend != "inductor":
        raise ConfigError(
            f"training=torch_compile_mode={mode!r} has no effect with "
            f"torch_compile_backend={backend!r}: modes are those of 'inductor'; leave one out"
        )


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


OF_STEPS = (
    *("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs"),
    *("warmup_steps", "weight_decay", "optim", "optim_args", "max_grad_norm"),
    *("gradient_accumulation_steps", "gradient_checkpointing"),
    *("adam_beta1", "adam_beta2", "adam_epsilon"),
)
"""Arguments of the optimiser's steps."""


def set_for_steps(training: TrainingArguments) -> list[str]:
    """Return the arguments of the optimiser's steps that are not at a default."""
    usual = TrainingArguments, training_arguments
    defaults_of = [make(output_dir=training.output_dir, report_to="none") for make in usual]
    return [
        f"training={name}={getattr(training, name)!r}"
        for name in OF_STEPS
        if getattr(training, name) not in [getattr(one, name) for one in defaults_of]
    ]
