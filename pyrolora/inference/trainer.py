"""Stochastic variational inference with transformers' Trainer around Pyro's ELBO module."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from pyrolora.columns import Batch
from pyrolora.data.prepared import Prepared
from pyrolora.errors import CheckpointError, ConfigError, NonFiniteError
from pyrolora.guides import Guide
from pyrolora.inference.checkpoints import (
    FIT_FILE,
    STATE_FILE,
    check_fit,
    describe_fit,
    read_json,
    read_state,
    read_tensors,
    save_state,
)
from pyrolora.inference.elbo import NamedELBO
from pyrolora.model import JointGuide, JointModel
from pyrolora.seeding import give_way, seed_of_process

_OF_ENTRIES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum")
"""What torch's optimisers keep for each entry of a parameter."""


class Objective(nn.Module):
    """What the Trainer minimises: −ELBO of one batch over ``observations``, in nats each.

    A constant divisor changes no optimum; without it the Trainer's gradient clipping would bite at
    every step.

    Parameters
    ----------
    joint
        The joint model.
    observations
        The number of observations of the whole data: examples, or labelled tokens.
    """

    # The Trainer must not divide the loss by the accumulation steps: `compute_loss` weighs each
    # micro-batch by its share of the examples, which is exact when they differ in size.
    accepts_loss_kwargs = True

    def __init__(self, joint: JointModel, observations: int) -> None:
        super().__init__()
        self.observations = observations
        self.estimator = NamedELBO()
        self.elbo = self.estimator(joint, JointGuide(joint.program))

    @property
    def joint(self) -> JointModel:
        return self.elbo.model

    def forward(self, batch: Batch, kl_weight: float) -> Tensor:
        return self.elbo(batch, kl_weight=kl_weight) / self.observations

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.joint.activation_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        self.joint.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)


class SVITrainer(Trainer):
    """A ``transformers.Trainer`` whose loss is the negative ELBO of a joint model.

    Parameters
    ----------
    joint
        The joint model; its adapters, heads and likelihood are trained.
    guide
        The options: KL weight and its warm-up, learning rate of the scales.
    data
        The prepared training data.
    args
        The Trainer's arguments.
    evaluate
        Returns the metrics of the evaluation data, or None without such data.
    callbacks
        Trainer callbacks.
    """

    def __init__(
        self,
        joint: JointModel,
        guide: Guide,
        data: Prepared,
        args: TrainingArguments,
        evaluate: Callable[[], dict[str, float]] | None = None,
        callbacks: tuple[TrainerCallback, ...] = (),
    ) -> None:
        if args.n_gpu > 1:
            raise ConfigError(
                f"{args.n_gpu} GPUs in one process would mean DataParallel, which copies the "
                "network without its bound factors; start one process a GPU with "
                f"'torchrun --nproc_per_node {args.n_gpu} script.py', or show one GPU with "
                "CUDA_VISIBLE_DEVICES=0"
            )
        if args.load_best_model_at_end and guide.rate_held_from() < 1:
            raise ConfigError(
                f"{guide.name!r} is made of the iterates up to the end of the training, and "
                "load_best_model_at_end=True goes back from there; leave it out"
            )
        assert data.labels is not None
        args = copy.copy(args)
        args.logging_nan_inf_filter = False  # `check_step` stops; the filter waits for the device
        if not guide.adapts:  # a network may have weights that its output does not use
            args.ddp_find_unused_parameters = True
        self.guide = guide
        self._evaluate_posterior = evaluate
        self._terms: tuple[str, ...] = ()
        self._sums: Tensor | None = None  # of these terms, since the last log
        self._steps = 0
        self._unchecked: list[tuple[Tensor, Mapping[str, Tensor]]] = []
        self._data = data
        self._resumed: Path | None = None
        self._averages: dict[str, Any] = {}
        super().__init__(
            model=Objective(joint, joint.task.count(data.labels)),
            args=args,
            train_dataset=data.examples,
            eval_dataset=None if evaluate is None else data.examples[:1],
            data_collator=data.collate,
            callbacks=[*callbacks],
        )
        self._statistics: list[tuple[nn.Module, dict[str, Tensor]]] = []
        self._trained = [(n, p) for n, p in joint.named_parameters() if p.requires_grad]
        self.add_callback(_CheckStep(self))
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(_Progress(f"fitting {guide.name}"))

    optimizer: Any
    control: Any

    @property
    def joint(self) -> JointModel:
        return self.model.joint

    def close_progress(self) -> None:
        """Leave the line of the bar, also after a fit that failed."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, _Progress) and callback.training_bar is not None:
                callback.training_bar.close()

    # The objective ------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """A micro-batch, forwards and backwards, once other threads had their turn."""
        give_way(self.joint)
        return super().training_step(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The micro-batches of one step, and the number of their examples over all devices."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.tensor(sum(_size(batch) for batch in batches), device=device)
        return batches, self.accelerator.gather(count).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """−ELBO of a micro-batch, times its share of the step's examples.

        Devices average their gradients, so that the share is taken of one device's part.
        """
        progress = (self.state.global_step + 1) / max(self.state.max_steps, 1)
        self.joint.program.progress = progress
        beta = self.guide.beta(self.joint.num_examples, progress)
        try:
            loss = model(inputs, beta)
        except ValueError as error:  # of Pyro's validation, if a scale has overflowed
            if all(_is_finite(self.joint, name) for name in self.joint.program.scale_parameters()):
                raise
            raise NonFiniteError(self.remedy("cannot be evaluated")) from error
        if not loss.requires_grad:  # chance has left out every adapted layer, or nothing reaches it
            loss = loss + 0.0 * self._trained[0][1].sum()
        terms = self.model.estimator.terms
        self._unchecked.append((loss.detach(), terms))
        share = _size(inputs) * self.accelerator.num_processes / num_items_in_batch
        parts = share * torch.stack([*terms.values()])
        if self._sums is None:  # the first since the last log, or since a resume
            self._steps, self._terms, self._sums = self.state.global_step, tuple(terms), parts
        else:
            self._sums = self._sums + parts
        return loss * share

    def check_step(self) -> None:
        """Raise `NonFiniteError` before the optimiser sees a loss or a gradient that is not finite.

        All that there is to look at is looked at once a step: each look at a number waits for the
        device. Gradients not under float16, whose scaler meets infinities on purpose and skips such
        steps.
        """
        losses, all_terms = zip(*self._unchecked, strict=True)
        self._unchecked.clear()
        named = [(n, p.grad) for n, p in self._trained if p.grad is not None]
        grads = [] if self.args.fp16 else [torch.isfinite(grad).all() for _, grad in named]
        finite = torch.stack([*map(torch.isfinite, losses), *grads]).tolist()
        for good, terms in zip(finite, all_terms, strict=False):
            if not good:
                raise NonFiniteError(self._describe_failure(terms))
        for good, (name, _) in zip(finite[len(losses) :], named, strict=False):
            if not good:
                raise NonFiniteError(self.remedy(f"has no finite gradient in {name!r}"))
        self.remember_statistics()

    def remember_statistics(self) -> None:
        """Copy the running statistics that training changes."""
        self._statistics = [
            (module, {name: buffer.clone() for name, buffer in module.named_buffers()})
            for module in self.joint.trained_statistics
        ]

    def restore_statistics(self) -> None:
        """Put the running statistics of the last good step back: unlike parameters, they take a
        batch in when it is read."""
        for module, buffers in self._statistics:
            for name, value in buffers.items():
                module.get_buffer(name).copy_(value)

    def _describe_failure(self, terms: Mapping[str, Tensor]) -> str:
        bad = [name for name, term in terms.items() if not torch.isfinite(term)]
        sites = ", ".join("y" if name == "log_likelihood" else name for name in bad) or "the loss"
        return self.remedy(f"is not finite at site {sites}")

    def remedy(self, what: str) -> str:
        """The message of a fit that ran into a number that is not finite."""
        rate = self.args.learning_rate
        return (
            f"training stopped before step {self.state.global_step + 1}: the objective {what}. "
            "The parameters are those of the last good step (error.posterior). Lower the learning "
            f"rate (now {rate:g}) or the guide's scale, or look for extreme inputs"
        )

    # The optimiser ------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Weights with the fit's learning rate and weight decay; scales with their own rate."""
        if self.optimizer is not None:
            return self.optimizer
        objective = self.model
        scales = {id(p) for p in _scales(objective.joint)}
        rate = self.guide.scale_rate(
            self.args.learning_rate, self.state.max_steps, objective.joint.num_examples
        )
        decayed = set(self.get_decay_parameter_names(objective))
        groups: dict[str, list[nn.Parameter]] = {"decayed": [], "plain": [], "scales": []}
        for name, parameter in objective.named_parameters():
            if parameter.requires_grad:
                kind = "decayed" if name in decayed else "plain"
                groups["scales" if id(parameter) in scales else kind].append(parameter)
        try:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, objective)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"training=optim={self.args.optim.value!r} cannot be used: {error}"
            ) from error
        self.optimizer = kind(
            [
                {"params": groups["decayed"], "weight_decay": self.args.weight_decay},
                {"params": groups["plain"], "weight_decay": 0.0},
                {"params": groups["scales"], "weight_decay": 0.0, "lr": rate},
            ],
            **options,
        )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """The schedule of the arguments, up to the share of the steps where the guide holds it."""
        try:
            scheduler = super().create_scheduler(num_training_steps, optimizer)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"training=lr_scheduler_type={self.args.lr_scheduler_type.value!r} cannot be used "
                f"with lr_scheduler_kwargs={self.args.lr_scheduler_kwargs!r}: {error}"
            ) from error
        held = round(self.guide.rate_held_from() * num_training_steps)
        held = max(held, self.args.get_warmup_steps(num_training_steps))
        if held < num_training_steps:
            if not isinstance(scheduler, LambdaLR):
                raise ConfigError(
                    f"{self.guide.name!r} holds the learning rate while it collects, and the "
                    f"schedule {self.args.lr_scheduler_type.value!r} follows a metric; choose "
                    "'linear', 'cosine' or 'constant'"
                )
            scheduler.lr_lambdas = [partial(_until, held, rate) for rate in scheduler.lr_lambdas]
        return scheduler

    # Evaluation and logging ---------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics of the predictive mean over draws."""
        assert self._evaluate_posterior is not None
        metrics = {
            f"{metric_key_prefix}_{name}": value
            for name, value in self._evaluate_posterior().items()
        }
        metrics[f"{metric_key_prefix}_loss"] = metrics[f"{metric_key_prefix}_nll"]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's log, with each term of the ELBO averaged over the steps since the last."""
        if "loss" in logs and self._sums is not None:
            steps = max(self.state.global_step - self._steps, 1)
            sums = self.accelerator.reduce(self._sums, "mean")  # over devices
            means = dict(zip(self._terms, (sums / steps).tolist(), strict=True))
            elbo = sum(-v if name.startswith("kl/") else v for name, v in means.items())
            logs |= {**means, "elbo": elbo}
            self._sums = None
        if "train_loss" in logs:  # of all steps, those before a resume, too
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)

    # Checkpoints --------------------------------------------------------------------------------

    @cached_property
    def description(self) -> dict[str, Any]:
        """What the fit's numbers depend on."""
        return describe_fit(self.joint, self.guide, self._data, self.args)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._averages = self._since_last_log()  # here, where all devices are
        super()._save_checkpoint(model, trial)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        content = {"fit": self.description, "averages": self._averages}
        (folder / FIT_FILE).write_text(json.dumps(content), encoding="utf-8")
        save_state(self.joint, folder / STATE_FILE)

    def _since_last_log(self) -> dict[str, Any]:
        """The sums whose averages the next log has, means over the devices."""
        sums = None if self._sums is None else self.accelerator.reduce(self._sums, "mean").tolist()
        return {
            "terms": list(self._terms),
            "sums": sums,
            "from_step": self._steps,
            "loss": float(self.accelerator.reduce(self._tr_loss.clone(), "mean")),
            "logged_step": self._globalstep_last_logged,
            "total_loss": float(self._total_loss_scalar),
        }

    def recall_averages(self) -> None:
        """Go on with the sums of the checkpoint, so that the log is that of a training in one."""
        if self._resumed is None:
            return
        kept = read_json(self._resumed / FIT_FILE)["averages"]
        device = self.args.device
        try:
            self._terms, self._steps = tuple(kept["terms"]), int(kept["from_step"])
            if kept["sums"] is not None:
                self._sums = torch.tensor(kept["sums"], device=device, dtype=torch.float32)
            self._tr_loss = torch.tensor(kept["loss"], device=device, dtype=torch.float32)
            self._globalstep_last_logged = int(kept["logged_step"])
            self._total_loss_scalar = float(kept["total_loss"])
        except (LookupError, TypeError, ValueError) as error:
            raise self._unusable(FIT_FILE, error) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._resumed = Path(resume_from_checkpoint)
        check_fit(self.description, self._resumed)
        self._load_state(self._resumed)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        self._load_state(Path(best))

    def _load_state(self, checkpoint: Path) -> None:
        state = read_state(checkpoint / STATE_FILE)
        for name, tensor in state.items():
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"{name!r} of {checkpoint / STATE_FILE} is not finite")
        self.joint.load_own_state(state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        expected = set(self.lr_scheduler.state_dict())
        if set(read_tensors(Path(checkpoint) / "scheduler.pt")) != expected:
            raise self._unusable("scheduler.pt", "it is not of this schedule")
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except Exception as error:  # of a file that was changed, any
            raise self._unusable("optimizer.pt or scheduler.pt", error) from error
        for parameter, state in self.optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and not _fits(name, value, parameter):
                    raise self._unusable("optimizer.pt", "a tensor is of another size, or infinite")

    def _load_scaler(self, checkpoint: str | None) -> None:
        try:
            super()._load_scaler(checkpoint)
        except Exception as error:
            raise self._unusable("scaler.pt", error) from error

    def _load_rng_state(self, checkpoint: str | None) -> None:
        try:
            super()._load_rng_state(checkpoint)
        except Exception as error:
            raise self._unusable("rng_state", error) from error

    def _load_callback_state(self) -> None:
        try:
            super()._load_callback_state()
        except Exception as error:
            raise self._unusable("trainer_state.json", error) from error

    def _unusable(self, name: str, reason: object) -> CheckpointError:
        return CheckpointError(
            f"{name} of the checkpoint {self._resumed} cannot be used: {reason}; go on from an "
            "older checkpoint, or begin anew"
        )


class _Progress(ProgressCallback):
    """The Trainer's bar, with the newest numbers at its end in place of a line for each entry."""

    SHOWN = ("loss", "eval_nll", "eval_accuracy")

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title
        self.numbers: dict[str, str] = {}

    training_bar: Any

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = {name: f"{logs[name]:.3f}" for name in self.SHOWN if name in (logs or {})}
        self.numbers |= shown
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.numbers)


class _CheckStep(TrainerCallback):
    """Has the trainer look at every step before it is made, and the program after it."""

    def __init__(self, trainer: SVITrainer) -> None:
        self.trainer = trainer
        self.save_with_epoch = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.remember_statistics()
        self.trainer.recall_averages()
        if args.process_index > 0:  # else all devices would draw the same noise, that of one
            set_seed(seed_of_process(args.seed, args.process_index))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.check_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.joint.program.after_step(state.global_step, state.max_steps)
        # An epoch is logged and scored after its last step: a checkpoint written before that would
        # go on without these entries.
        last = control.should_training_stop or float(state.epoch).is_integer()
        self.save_with_epoch = control.should_save and last
        control.should_save = control.should_save and not last

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_save or self.save_with_epoch
        self.save_with_epoch = False


def _is_finite(joint: JointModel, name: str) -> bool:
    return bool(torch.isfinite(joint.program.param(name)).all())


def _fits(name: str, value: Tensor, parameter: Tensor) -> bool:
    """Whether the optimiser can keep ``value`` for a parameter: averages have its size, unless they
    are those of rows and columns (Adafactor) or of blocks (8-bit optimisers)."""
    whole = name not in _OF_ENTRIES or value.shape == parameter.shape
    return whole and bool(torch.isfinite(value).all())


def _until(last: int, rate: Callable[[int], float], step: int) -> float:
    return rate(min(step, last))


def _scales(joint: JointModel) -> list[nn.Parameter]:
    own = [joint.program.get_parameter(name) for name in joint.program.scale_parameters()]
    return [*own, *joint.task.parameters()]


def _size(batch: Mapping[str, Any]) -> int:
    return len(next(iter(batch.values())))
