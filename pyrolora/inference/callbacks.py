"""Callbacks of a fit's Trainer: the progress bar, and the checks of every step."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, set_seed

from pyrolora.seeding import seed_of_process

if TYPE_CHECKING:
    from pyrolora.inference.trainer import SVITrainer


class Progress(ProgressCallback):
    """The Trainer's bar, with the newest numbers at its end in place of one line per entry."""

    SHOWN = ("loss", "eval_nll", "eval_accuracy")

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title
        self.numbers: dict[str, str] = {}

    training_bar: Any

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, desc=self.title, dynamic_ncols=True)
        self.current_step = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = {name: f"{logs[name]:.3f}" for name in self.SHOWN if name in (logs or {})}
        self.numbers |= shown
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.numbers)


class LogLines(TrainerCallback):
    """The log of a fit as lines on standard error, rounded and aligned, where no bar is drawn."""

    WIDTH = 10

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            print(log_line(logs, state.global_step, state.max_steps), file=sys.stderr, flush=True)


def log_line(logs: Mapping[str, Any], step: int, steps: int) -> str:
    """Return an entry of the log on one line: numbers of four digits, in columns."""
    digits = len(str(steps))
    parts = [f"step {step:>{digits}}/{steps}", f"epoch {float(logs.get('epoch', 0)):>6.2f}"]
    named = {name: value for name, value in logs.items() if name not in ("epoch", "step")}
    return "  ".join([*parts, *(f"{name} {_rounded(value)}" for name, value in named.items())])


def _rounded(value: Any) -> str:
    try:
        return f"{float(value):>{LogLines.WIDTH}.4g}"
    except (TypeError, ValueError):
        return str(value)


class CheckStep(TrainerCallback):
    """Checks of every step before it is made; `Program.after_step` after it."""

    def __init__(self, trainer: SVITrainer) -> None:
        self.trainer = trainer
        self.save_with_epoch = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.last_good.keep(state.global_step)
        self.trainer.recall_averages()
        if args.process_index > 0:  # otherwise all devices would draw the same noise
            set_seed(seed_of_process(args.seed, args.process_index))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.check_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.joint.program.after_step(state.global_step, state.max_steps)
        control.should_save = control.should_save or self.trainer.stop.is_asked
        # An epoch is logged and scored after its last step: a fit resumed from a checkpoint before
        # that would lack these entries.
        last = control.should_training_stop or float(state.epoch).is_integer()
        self.save_with_epoch = control.should_save and last
        control.should_save = control.should_save and not last

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_save or self.save_with_epoch
        self.save_with_epoch = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.remove_surplus()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.stop.obey(f"step {state.global_step} is saved in {args.output_dir}")
