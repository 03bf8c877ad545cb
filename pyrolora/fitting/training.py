"""The Trainer's arguments of a request."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, TrainingArguments

from pyrolora.adapters import compiled_in_place, is_compiled
from pyrolora.errors import ConfigError, PyroLoraError, SaveError
from pyrolora.files import check_writable
from pyrolora.fitting.request import Request
from pyrolora.fitting.supervised import read_options
from pyrolora.folder_lock import locked
from pyrolora.inference import check_arguments, training_arguments
from pyrolora.tasks import Task


def arguments_of(request: Request, scratch: str = "") -> TrainingArguments:
    """Return the Trainer's arguments: those of the shortcuts, or a copy of the user's own.

    Parameters
    ----------
    request
        The request.
    scratch
        The folder of a fit without ``output_dir``, which writes no checkpoints.

    Raises
    ------
    ConfigError
        For values outside of their range, for arguments that would do nothing here, and for
        shortcuts beside ``training``.
    """
    shortcuts = request.shortcuts
    if request.training is None:
        return _from_shortcuts(request, scratch)
    if shortcuts:
        raise ConfigError(
            f"{', '.join(shortcuts)} and training= were both given; set "
            f"{'them' if len(shortcuts) > 1 else 'it'} in the TrainingArguments"
        )
    check_arguments(request.training, read_options(request.training))
    args = copy.copy(request.training)
    args.remove_unused_columns = False
    args.label_names = ["labels"]
    if not torch.accelerator.is_available():
        args.dataloader_pin_memory = False  # torch would warn that it cannot
    return args


@contextmanager
def opened_arguments(request: Request) -> Iterator[TrainingArguments]:
    """Yield `arguments_of` the request, and hold the lock of the folder that the fit writes to."""
    with tempfile.TemporaryDirectory() as scratch:
        args = arguments_of(request, scratch)
        if request.training is None:
            writes = request.output_dir is not None
        else:
            writes = args.save_strategy != "no" or bool(args.resume_from_checkpoint)
        # The folder is made and tried now, not when there is something to lose.
        with locked(args.output_dir) if writes and args.should_save else nullcontext():
            if writes and args.should_save:
                _try(args.output_dir)
            yield args


def compiled_for(network: nn.Module, args: TrainingArguments) -> AbstractContextManager[None]:
    """Have the network compiled for the fit, if the arguments say so."""
    if not args.torch_compile:
        return nullcontext()
    if is_compiled(network):
        warnings.warn(
            f"training=torch_compile=True (backend {args.torch_compile_backend!r}): the network is "
            "compiled already, and stays as it is; pass it without torch.compile for another "
            "backend or mode",
            UserWarning,
            stacklevel=2,
        )
        return nullcontext()
    return compiled_in_place(
        network, backend=args.torch_compile_backend, mode=args.torch_compile_mode
    )


def _try(folder: str) -> None:
    try:
        check_writable(Path(folder))
    except SaveError as error:
        raise ConfigError(f"output_dir={folder!r} cannot be used: {error}") from error


def check_evaluation(args: TrainingArguments, held_out: Any) -> None:
    """Raise `ConfigError` for a request to evaluate without data for it."""
    if args.eval_strategy != "no" and held_out is None:
        raise ConfigError(
            f"training asks for evaluation (eval_strategy={args.eval_strategy.value!r}) and there "
            "is no eval_data; pass eval_data="
        )


def choose_best(args: TrainingArguments, task: Task, request: Request) -> None:
    """Set ``greater_is_better`` for the metric of the best model.

    The Trainer cannot know it: it takes every metric but the loss for one that is better the
    higher it is.
    """
    metric = args.metric_for_best_model
    stopping = any(isinstance(callback, EarlyStoppingCallback) for callback in request.listeners)
    if stopping and args.eval_strategy == "no":
        raise ConfigError(
            "EarlyStoppingCallback goes by evaluations, and there are none; set eval_strategy, for "
            "example to 'epoch', in the TrainingArguments, and pass eval_data="
        )
    if metric is None:
        if stopping or args.save_strategy == "best":
            raise ConfigError(
                "save_strategy='best' and EarlyStoppingCallback go by a metric, and there is none; "
                "set metric_for_best_model, for example to 'nll', in the TrainingArguments"
            )
        return
    higher = _higher_is_better(metric, task)
    usual = not metric.endswith("loss")  # what TrainingArguments sets without a value
    if args.greater_is_better not in (usual, higher):
        raise ConfigError(
            f"greater_is_better={args.greater_is_better}, and the best model has the "
            f"{'highest' if higher else 'lowest'} {metric.removeprefix('eval_')!r}; leave it out"
        )
    args.greater_is_better = higher
    if args.lr_scheduler_type == "reduce_lr_on_plateau":
        mode = "max" if higher else "min"
        args.lr_scheduler_kwargs = {"mode": mode, **(args.lr_scheduler_kwargs or {})}


def settings_of(args: TrainingArguments) -> dict[str, Any]:
    """Return what a posterior keeps of the arguments: how it was fitted."""
    return {
        "epochs": args.num_train_epochs,
        "max_steps": args.max_steps,
        "learning_rate": args.learning_rate,
        "batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "weight_decay": args.weight_decay,
        "seed": args.seed,
        **({"load_best_model_at_end": True} if args.load_best_model_at_end else {}),
    }


def _from_shortcuts(request: Request, scratch: str) -> TrainingArguments:
    shortcuts = request.shortcuts
    folder = shortcuts.pop("output_dir", None)
    options = dict(request.training_options)
    if request.held_out is not None:
        options.setdefault("eval_strategy", "epoch")
    try:
        args = training_arguments(
            folder or scratch, save=folder is not None, **shortcuts, **options
        )
    except PyroLoraError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        if not request.training_options:
            raise
        raise ConfigError(f"the Trainer refuses its arguments: {error}") from error
    if request.training_options:
        check_arguments(args)
    return args


def _higher_is_better(metric: str, task: Task) -> bool:
    """Whether a higher value of the metric is better; raise `ConfigError` for an unknown one."""
    known = {"loss": False, **task.prediction.higher_is_better}
    higher = known.get(metric.removeprefix("eval_"))
    if higher is None:
        able = ", ".join(name for name, way in known.items() if way is not None)
        raise ConfigError(f"metric_for_best_model={metric!r} is none of {able}; choose one of them")
    return higher
