"""`fit`: from a model and data to a posterior."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from pyrolora import defaults
from pyrolora.adapters import attach
from pyrolora.errors import (
    ConfigError,
    DataError,
    NonFiniteError,
    PyroLoraError,
    positive,
    whole_number,
)
from pyrolora.guides import Guide, as_guide
from pyrolora.inference import Prepared, SVITrainer, prepare
from pyrolora.inference.data import raw_labels
from pyrolora.likelihoods import CausalLM, Regression, likelihood_for
from pyrolora.model import JointModel, evaluating
from pyrolora.posterior import Posterior, build
from pyrolora.predictive import draw_factors, evaluate, predict, to_device
from pyrolora.types import AdapterConfig

EVALUATION_SPLITS = ("validation", "test")


def fit(
    model: str | Path | nn.Module,
    data: Any,
    guide: str | Guide = "montec",
    *,
    eval_data: Any = None,
    tokenizer: Any = None,
    likelihood: str | None = None,
    adapter: AdapterConfig | Any = None,
    epochs: float | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    output_dir: str | Path | None = None,
    training: TrainingArguments | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Posterior:
    """Infer the posterior of a network's low-rank adapters.

    Parameters
    ----------
    model
        A transformers model, a hub id or local folder of one, or any ``nn.Module`` with linear
        layers (then name the ``likelihood``). Its own weights are not changed.
    data
        Training data: ``datasets.Dataset`` or ``DatasetDict`` (split ``train``; its ``validation``
        becomes ``eval_data``), raw text with a tokenizer or tokenised; a torch ``Dataset`` or
        ``DataLoader`` (its data set is taken); a list of dicts; a tuple (inputs, labels).
    guide
        A name from ``pyrolora.guides.available()``, or a guide object with its options.
    eval_data
        Scored every epoch by the predictive mean over draws.
    tokenizer
        For raw text and padding; loaded with a model that is given by its name.
    likelihood
        ``"classification"``, ``"regression"``, ``"causal_lm"``; None: from the model's class.
    adapter
        An `AdapterConfig`, or a ``peft.LoraConfig``.
    epochs, learning_rate, batch_size, seed
        Shortcuts into ``training``; the defaults stand in ``pyrolora/defaults.py``.
    output_dir
        Checkpoints every epoch, and the posterior at the end, go there.
    training
        ``transformers.TrainingArguments`` for everything that the Trainer can do (accumulation,
        precision, schedules, gradient checkpointing, ``resume_from_checkpoint``), in place of the
        shortcuts.
    callbacks
        Trainer callbacks.

    Returns
    -------
    Posterior

    Raises
    ------
    ConfigError, DataError, TargetError, UnknownNameError
        Before any training step, for what cannot be fitted.
    NonFiniteError
        When the objective stops being finite; its ``posterior`` has the last good state.
    """
    options = as_guide(guide)
    config = as_adapter_config(adapter)
    shortcuts = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seed": seed,
        "output_dir": output_dir,
    }
    with _arguments(training, shortcuts) as args:
        set_seed(args.seed)
        network, tokenizer = _network(model, data, tokenizer, likelihood)
        law = likelihood_for(network, likelihood)
        prepared = prepare(data, network, law, tokenizer)
        if eval_data is None and isinstance(data, dict) and "validation" in data:
            eval_data = data["validation"]
        held_out = None
        if eval_data is not None:
            held_out = prepare(eval_data, network, law, tokenizer, splits=EVALUATION_SPLITS)
        _check_evaluation(args, training, held_out)
        assert prepared.labels is not None
        law.start(prepared.labels)
        modes = {module: module.training for module in network.modules()}
        attachment = attach(network, config)
        try:
            joint = build(network, attachment, config, options, law, len(prepared))
            _check_output(joint, prepared)
            posterior = Posterior(joint, options, tokenizer=tokenizer, settings=_settings(args))
            _train(posterior, prepared, held_out, args, callbacks)
        except NonFiniteError:
            raise  # its posterior is usable
        except BaseException:
            attachment.detach()
            for module, mode in modes.items():
                module.training = mode
            raise
    if output_dir is not None:
        posterior.save(output_dir)
    return posterior


def _train(
    posterior: Posterior,
    data: Prepared,
    held_out: Prepared | None,
    args: TrainingArguments,
    callbacks: Sequence[TrainerCallback],
) -> None:
    joint = posterior.model
    trainer = SVITrainer(
        joint,
        posterior.options,
        data,
        args,
        evaluate=None if held_out is None else lambda: _score(joint, held_out, args),
        callbacks=tuple(callbacks),
    )
    checkpointing = getattr(joint.base, "is_activation_checkpointing", False)
    if checkpointing and not args.gradient_checkpointing:
        joint.activation_checkpointing_enable()  # the user's own, with our binding carried over
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except NonFiniteError as error:
        error.posterior = posterior
        raise
    finally:
        if args.gradient_checkpointing and not checkpointing:
            joint.activation_checkpointing_disable()
        joint.zero_grad(set_to_none=True)
        joint.eval()
        posterior.history = [dict(entry) for entry in trainer.state.log_history]


@torch.no_grad()
def _check_output(joint: JointModel, data: Prepared) -> None:
    """One pass with two examples: the network runs, calls its adapted layers, fits the labels."""
    assert data.labels is not None
    examples = [data.examples[i] for i in range(min(2, len(data)))]
    batch = to_device(data.collate(examples), next(joint.parameters()).device)
    with evaluating(joint):
        joint.likelihood.check_output(joint.network(batch, joint.program.bank.means()), data.labels)


def _score(joint: JointModel, data: Prepared, args: TrainingArguments) -> dict[str, float]:
    """Metrics of a few draws, always from the same seed, so that epochs compare."""
    factors = draw_factors(joint, defaults.EVAL_SAMPLES, seed=args.seed)
    return evaluate(predict(joint, data, factors, batch_size=args.per_device_eval_batch_size))


def as_adapter_config(adapter: Any) -> AdapterConfig:
    """An `AdapterConfig` from None, one of ours, or a ``peft.LoraConfig``.

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
            f"{type(adapter).__name__}"
        )
    taken = {field.name for field in dataclasses.fields(AdapterConfig)}
    neutral = {"task_type", "peft_type", "peft_version", "inference_mode", "auto_mapping"}
    neutral |= {"base_model_name_or_path", "revision", "runtime_config", "fan_in_fan_out"}
    plain = type(adapter)()
    for field in dataclasses.fields(adapter):
        value = getattr(adapter, field.name)
        if field.name not in taken | neutral and value != getattr(plain, field.name):
            raise ConfigError(
                f"pyrolora does not support LoraConfig({field.name}={value!r}); leave it out"
            )
    options = {name: getattr(adapter, name) for name in taken}
    options["target_modules"] = _in_order(options["target_modules"]) or "auto"
    options["exclude_modules"] = _in_order(options["exclude_modules"]) or None
    if options["init_lora_weights"] is True:
        options["init_lora_weights"] = "kaiming"
    return AdapterConfig(**options)


def _in_order(names: Any) -> Any:
    """PEFT keeps lists as sets."""
    return sorted(names) if isinstance(names, set) else names


def _network(
    model: Any, data: Any, tokenizer: Any, likelihood: str | None
) -> tuple[nn.Module, Any]:
    """The network, loaded if it is given by a name, and its tokenizer."""
    if isinstance(model, nn.Module):
        return _checked_padding(model), tokenizer
    if not isinstance(model, str | Path):
        raise ConfigError(
            "model must be a transformers model, a hub id, a folder, or an nn.Module, got "
            f"{type(model).__name__}"
        )
    name = str(model)
    try:
        network, tokenizer = _loaded(name, data, tokenizer, likelihood)
    except PyroLoraError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"cannot load the model {name!r}: it must be a folder with a transformers model or a "
            f"hub id within reach ({str(error).splitlines()[0]})"
        ) from error
    return _checked_padding(network), tokenizer


def _loaded(
    name: str, data: Any, tokenizer: Any, likelihood: str | None
) -> tuple[PreTrainedModel, Any]:
    """A language model where the checkpoint is one, else a classifier with as many classes as the
    labels have, or with one output for real-valued labels."""
    config = AutoConfig.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name) if tokenizer is None else tokenizer
    architecture = (config.architectures or [""])[0]
    if likelihood == CausalLM.name or (likelihood is None and architecture.endswith("CausalLM")):
        return AutoModelForCausalLM.from_pretrained(name, dtype="auto"), tokenizer
    labels = raw_labels(data)
    if labels is None:
        raise DataError("the data has no labels: expected a column 'labels' or 'label'")
    real = likelihood == Regression.name or (likelihood is None and labels.is_floating_point())
    classes = 1 if real else max(int(labels.max()) + 1, 2)
    network = AutoModelForSequenceClassification.from_pretrained(
        name, dtype="auto", num_labels=classes
    )
    if network.config.pad_token_id is None and tokenizer is not None:
        network.config.pad_token_id = tokenizer.pad_token_id
    return network, tokenizer


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


@contextmanager
def _arguments(
    training: TrainingArguments | None, shortcuts: dict[str, Any]
) -> Iterator[TrainingArguments]:
    """The Trainer's arguments from the shortcuts, or a copy of the user's own."""
    given = {name: value for name, value in shortcuts.items() if value is not None}
    if training is not None:
        if given:
            raise ConfigError(
                f"{', '.join(given)} and training= were both given; set "
                f"{'them' if len(given) > 1 else 'it'} in the TrainingArguments"
            )
        args = copy.copy(training)
        args.remove_unused_columns = False
        args.label_names = ["labels"]
        if not torch.accelerator.is_available():
            args.dataloader_pin_memory = False  # torch would warn that it cannot
        yield args
        return
    _check_shortcuts(given)
    with tempfile.TemporaryDirectory() as scratch:
        yield TrainingArguments(
            output_dir=str(given.get("output_dir", scratch)),
            num_train_epochs=given.get("epochs", defaults.EPOCHS),
            learning_rate=given.get("learning_rate", defaults.LEARNING_RATE),
            per_device_train_batch_size=given.get("batch_size", defaults.BATCH_SIZE),
            per_device_eval_batch_size=given.get("batch_size", defaults.BATCH_SIZE),
            seed=given.get("seed", defaults.SEED),
            save_strategy="epoch" if "output_dir" in given else "no",
            save_total_limit=2,
            logging_steps=0.05,
            report_to="none",
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=torch.accelerator.is_available(),
        )


def _check_shortcuts(given: dict[str, Any]) -> None:
    for name in ("epochs", "learning_rate"):
        if name in given:
            positive(name, given[name])
    for name, least in (("batch_size", 1), ("seed", 0)):
        if name in given:
            whole_number(name, given[name], at_least=least)


def _check_evaluation(
    args: TrainingArguments, training: TrainingArguments | None, held_out: Prepared | None
) -> None:
    if training is None and held_out is not None:
        args.eval_strategy = "epoch"
    if args.eval_strategy != "no" and held_out is None:
        raise ConfigError(
            f"training asks for evaluation (eval_strategy={args.eval_strategy.value!r}) and there "
            "is no eval_data; pass eval_data="
        )


def _settings(args: TrainingArguments) -> dict[str, Any]:
    return {
        "epochs": args.num_train_epochs,
        "max_steps": args.max_steps,
        "learning_rate": args.learning_rate,
        "batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "weight_decay": args.weight_decay,
        "seed": args.seed,
    }
