"""Stochastic variational inference with transformers' Trainer around Pyro's ELBO module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from pyrolora.data.prepared import Prepared
from pyrolora.errors import ConfigError, NonFiniteError
from pyrolora.guides import Guide
from pyrolora.inference.callbacks import CheckStep, LogLines, Progress
from pyrolora.inference.last_good import LastGood
from pyrolora.inference.objective import NotEvaluated, Objective
from pyrolora.inference.resuming import ResumingTrainer
from pyrolora.inference.sharding import frozen_names
from pyrolora.inference.stopping import Stop
from pyrolora.model import JointModel
from pyrolora.options import changed_numbers
from pyrolora.progress import shows_bars, silenced
from pyrolora.seeding import give_way


class SVITrainer(ResumingTrainer):
    """A ``transformers.Trainer`` whose loss is the negative ELBO of a joint model.

    Parameters
    ----------
    joint
        The joint model; its adapters, heads and task are trained.
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
                "network without its bound factors; start one process per GPU with "
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
        args.logging_nan_inf_filter = False  # `check_step` does it, without waiting for the device
        # The network is compiled; the Trainer would compile the objective around it, too.
        args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
        if not guide.adapts:  # a network may have weights that its output does not depend on
            args.ddp_find_unused_parameters = True
        self.guide = guide
        self._evaluate_posterior = evaluate
        self._terms: tuple[str, ...] = ()
        self._sums: Tensor | None = None  # sums of these terms since the last log
        self._steps = 0
        self._unchecked: list[tuple[Tensor, Mapping[str, Tensor]]] = []
        self._data = data
        self._resumed = None
        self._averages: dict[str, Any] = {}
        super().__init__(
            model=Objective(joint, joint.task.count(data.labels) * data.rows / len(data)),
            args=args,
            train_dataset=data.examples,
            eval_dataset=None if evaluate is None else data.examples[:1],
            data_collator=data.collate,
            callbacks=[*callbacks],
        )
        self.last_good = LastGood(self.model)
        self._batch: tuple[dict[str, Tensor], float] | None = None
        self._trained = [(n, p) for n, p in joint.named_parameters() if p.requires_grad]
        self.add_callback(CheckStep(self))
        self._add_progress(f"fitting {guide.name}")

    control: Any
    stop = Stop(saves=False)

    def _add_progress(self, title: str) -> None:
        """Show a bar on a terminal, or lines of the log in its place; nothing if that was asked."""
        wanted, lines = (self.pop_callback(kind) for kind in (ProgressCallback, PrinterCallback))
        if wanted is not None and (shows_bars() or silenced()):
            self.add_callback(Progress(title))
        elif wanted is not None or lines is not None:
            self.add_callback(LogLines())

    def close_progress(self) -> None:
        """End the line of the progress bar, also after a fit that failed."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, Progress) and callback.training_bar is not None:
                callback.training_bar.close()

    # The objective ------------------------------------------------------------------------------

    def _wrap_model(self, model: nn.Module, training: bool = True, **more: Any) -> nn.Module:
        """Return the model as it is trained; with a sharded network, what is whole by DDP.

        accelerate refuses DDP for models with shards, which DDP does not have to see.
        """
        if not (training and self.joint.sharded):
            return super()._wrap_model(model, training, **more)
        self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        whole: Any = DistributedDataParallel
        whole._set_params_and_buffers_to_ignore_for_model(model, frozen_names(model))
        device = self.args.device
        wrapped: nn.Module = whole(model, [device.index] if device.type != "cpu" else None)
        return wrapped

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run a micro-batch forwards and backwards, after other threads had their turn."""
        give_way(self.joint)
        return super().training_step(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """Return the micro-batches of one step, and their number of examples on all devices."""
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
        """Return −ELBO of a micro-batch, times its share of the step's examples.

        Devices average their gradients, so that the share is that among the examples of one device.
        """
        progress = (self.state.global_step + 1) / max(self.state.max_steps, 1)
        self.joint.program.progress = progress
        beta = self.guide.beta(self.joint.num_examples, progress)
        self._batch = inputs, beta
        try:
            loss = model(inputs, beta)
        except NotEvaluated as error:
            raise self.failure(f"cannot be evaluated ({error})") from error
        if not loss.requires_grad:  # layerdrop has left out every adapted layer, or none is used
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
        """Raise `NonFiniteError` before the optimiser sees a loss or gradient that is not finite.

        All checks come together, once per step: each look at a number waits for the device. Under
        float16 gradients are not checked; its scaler meets infinities on purpose, and skips such
        steps.
        """
        losses, all_terms = zip(*self._unchecked, strict=True)
        self._unchecked.clear()
        named = [(n, p.grad) for n, p in self._trained if p.grad is not None]
        grads = [] if self.args.fp16 else [torch.isfinite(grad).all() for _, grad in named]
        finite = torch.stack([*map(torch.isfinite, losses), *grads]).tolist()
        for good, terms in zip(finite, all_terms, strict=False):
            if not good:
                raise self.failure(f"is not finite at site {_sites(terms)}")
        for good, (name, _) in zip(finite[len(losses) :], named, strict=False):
            if not good:
                raise self.failure(f"has no finite gradient in {name!r}")
        self.last_good.keep(self.state.global_step, self._batch)

    def check_end(self) -> None:
        """Raise `NonFiniteError` if the last step has left parameters that give no finite number.

        Each step but the last is checked by the next one.
        """
        good = torch.tensor(self.last_good.is_good(), device=self.args.device)
        if not self.accelerator.gather(good).all():
            raise self.failure("is not finite after the last step")

    def failure(self, what: str) -> NonFiniteError:
        """Go back to the last good state, and return the error of a fit that met no number."""
        step, rate = self.state.global_step, self.args.learning_rate
        if step == 0:
            options = self.guide, self.joint.program.bank.config
            numbers = [number for some in options for number in changed_numbers(some)]
            return NonFiniteError(
                f"training stopped before step 1, and there is no posterior: the objective {what}, "
                f"with {', '.join(numbers) or 'the default options'}. Choose numbers nearer to the "
                "defaults, look for extreme inputs and labels, or load the network in float32"
            )
        good = self.last_good.restore(step)
        went = "" if good == step else f"; those of step {step} give no finite objective"
        return NonFiniteError(
            f"training stopped before step {step + 1}: the objective {what}. The parameters are "
            f"those of the last good step, {good} (error.posterior){went}. Lower the learning rate "
            f"(now {rate:g}) or the guide's scale, or look for extreme inputs"
        )

    # The optimiser ------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimiser: scales have their own learning rate, and no weight decay."""
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
        """Return the schedule of the arguments, held from the guide's share of the steps on."""
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
        """Return the metrics of the predictive mean over draws."""
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
        """Log the Trainer's numbers, and each term of the ELBO, averaged since the last log."""
        if "loss" in logs and self._sums is not None:
            steps = max(self.state.global_step - self._steps, 1)
            sums = self.accelerator.reduce(self._sums, "mean")  # over devices
            means = dict(zip(self._terms, (sums / steps).tolist(), strict=True))
            elbo = sum(-v if name.startswith("kl/") else v for name, v in means.items())
            logs |= {**means, "elbo": elbo}
            self._sums = None
        if "train_loss" in logs:  # a mean over all steps, also those before a resume
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)


def _sites(terms: Mapping[str, Tensor]) -> str:
    bad = [name for name, term in terms.items() if not torch.isfinite(term)]
    return ", ".join("y" if name == "log_likelihood" else name for name in bad) or "the loss"


def _until(last: int, rate: Callable[[int], float], step: int) -> float:
    return rate(min(step, last))


def _scales(joint: JointModel) -> list[nn.Parameter]:
    scales = [joint.program.get_parameter(name) for name in joint.program.scale_parameters()]
    return [*scales, *joint.task.parameters()]


def _size(batch: Mapping[str, Any]) -> int:
    return len(next(iter(batch.values())))
