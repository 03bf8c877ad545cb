"""`fit`: from a model and data to a posterior."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments, set_seed

from pyrolora import defaults
from pyrolora.adapters import as_adapter_config, attach
from pyrolora.errors import ConfigError, NonFiniteError
from pyrolora.guides import Guide, as_guide
from pyrolora.inference import (
    Prepared,
    SVITrainer,
    load_network,
    prepare,
    training_arguments,
)
from pyrolora.likelihoods import likelihood_for
from pyrolora.model import JointModel, evaluating
from pyrolora.posterior import Posterior, build
from pyrolora.predictive import draw_factors, evaluate, predict, to_device
from pyrolora.types import AdapterConfig


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
        Shortcuts into ``training``; the defaults stand in ``pyrolora/defaults.py``. As in the
        Trainer, the seed sets the process's random generators.
    output_dir
        Checkpoints, ten a run, and the posterior at the end, go there.
    training
        ``transformers.TrainingArguments`` for what the Trainer can do (accumulation, precision,
        schedules, gradient checkpointing, ``resume_from_checkpoint``), in place of the shortcuts:
        its own defaults then hold (a learning rate of 5e-5), and saving is up to you.
    callbacks
        Trainer callbacks.

    Returns
    -------
    Posterior
        Its network is in evaluation mode.

    Raises
    ------
    ConfigError, DataError, TargetError, UnknownNameError
        Before any training step, for what cannot be fitted.
    NonFiniteError
        When the objective stops being finite; its ``posterior`` has the last good state.
    """
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        raise ConfigError("fit needs gradients; call it outside of inference_mode and no_grad")
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
        network, tokenizer = load_network(model, data, tokenizer, likelihood)
        law = likelihood_for(network, likelihood)
        prepared = prepare(data, network, law, tokenizer)
        if eval_data is None and isinstance(data, dict) and "validation" in data:
            eval_data = data["validation"]
        held_out = None
        if eval_data is not None:
            held_out = prepare(eval_data, network, law, tokenizer, splits=defaults.FIT_SPLITS)
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
        except NonFiniteError:  # its posterior is usable
            _save(posterior, args, output_dir)
            raise
        except BaseException:
            attachment.detach()
            for module, mode in modes.items():
                module.training = mode
            raise
        _save(posterior, args, output_dir)
    return posterior


def _save(posterior: Posterior, args: TrainingArguments, output_dir: str | Path | None) -> None:
    if output_dir is not None and args.should_save:  # of several processes the first
        posterior.save(output_dir)


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
        trainer.close_progress()
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
        for name in ("label_smoothing_factor", "neftune_noise_alpha", "torch_compile"):
            if getattr(training, name):
                raise ConfigError(
                    f"training={name}={getattr(training, name)!r} is not supported; leave it out"
                )
        args = copy.copy(training)
        args.remove_unused_columns = False
        args.label_names = ["labels"]
        if not torch.accelerator.is_available():
            args.dataloader_pin_memory = False  # torch would warn that it cannot
        yield args
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.pop("output_dir", None)
        yield training_arguments(folder or scratch, save=folder is not None, **given)


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
