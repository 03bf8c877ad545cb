"""A Trainer whose checkpoints hold the posterior, and that resumes from them to the same result."""

from __future__ import annotations

import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from pyrolora.data.prepared import Prepared
from pyrolora.errors import CheckpointError
from pyrolora.files import flush, writing
from pyrolora.guides import Guide
from pyrolora.inference.checkpoints import (
    FIT_FILE,
    STATE_FILE,
    read_json,
    read_state,
    read_tensors,
    remove_surplus,
    save_state,
)
from pyrolora.inference.identity import check_fit, describe_fit
from pyrolora.inference.sealing import seal, unseal
from pyrolora.model import JointModel

_OF_ENTRIES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum")
"""Names under which torch's optimisers keep one value per entry of a parameter."""


class ResumingTrainer(Trainer):
    """A Trainer around an `Objective` whose checkpoints hold the posterior.

    A checkpoint also keeps the sums that the next log averages, so that the log of a resumed fit is
    that of an uninterrupted one.
    """

    guide: Guide
    optimizer: Any
    _data: Prepared
    _sums: Tensor | None
    _terms: tuple[str, ...]
    _steps: int
    _resumed: Path | None
    _averages: dict[str, Any]

    @property
    def joint(self) -> JointModel:
        """The joint model that is trained."""
        joint: JointModel = self.model.joint
        return joint

    @cached_property
    def description(self) -> dict[str, Any]:
        """Everything that the fit's numbers depend on."""
        return describe_fit(self.joint, self.guide, self._data, self.args)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, and remove older ones once it is on the disk.

        Raises
        ------
        SaveError
            When it cannot be written; what there is of it is removed.
        """
        self._averages = self._since_last_log()  # here, since only here all devices take part
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        writes, limit = self.args.should_save, self.args.save_total_limit
        self.args.save_total_limit = None
        try:
            with writing(folder):
                if writes and folder.exists():  # of a fit that went on from an older one
                    unseal(folder)
                    shutil.rmtree(folder)
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()  # each process keeps its generators
                if writes:
                    seal(folder)
                    flush(folder.parent)
        except BaseException:
            if writes:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            self.args.save_total_limit = limit
        self.remove_surplus()

    def remove_surplus(self) -> None:
        """Remove the oldest checkpoints above ``save_total_limit``.

        That is due after each that is written, and once more at the end: a process that died before
        it has removed them may have written the last one.
        """
        args, state = self.args, self.state
        if args.should_save and args.save_strategy != "no":
            best = state.best_model_checkpoint
            remove_surplus(args.output_dir, args.save_total_limit, state.global_step, best)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        content = {
            "fit": self.description,
            "averages": self._averages,
            "best": best and f"checkpoint-{best}",
        }
        (folder / FIT_FILE).write_text(json.dumps(content), encoding="utf-8")
        save_state(self.joint, folder / STATE_FILE)

    def _since_last_log(self) -> dict[str, Any]:
        """Return the sums that the next log averages, means over the devices."""
        sums = None if self._sums is None else self.accelerator.reduce(self._sums, "mean").tolist()
        return {
            "terms": list(self._terms),
            "sums": sums,
            "from_step": self._steps,
            "loss": float(self.accelerator.reduce(self._tr_loss.clone(), "mean")),
            "logged_step": self._globalstep_last_logged,
            "total_loss": float(self._total_loss_scalar),
        }

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Make the steps of an epoch; none where the fit goes on from its own end.

        The Trainer would make one more after the last step, unless that ends an epoch, and would
        go on where `EarlyStoppingCallback` has stopped.
        """
        stopped = self._resumed is not None and any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)
        )
        if stopped or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def recall_averages(self) -> None:
        """Restore the sums of the checkpoint, so that the log is that of an uninterrupted fit."""
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
            raise self._unusable("scheduler.pt", "it belongs to another schedule")
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except Exception as error:  # a file that was changed can raise any
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
            self._recall_counts()
        except Exception as error:
            raise self._unusable("trainer_state.json", error) from error
        assert self._resumed is not None
        best = self._resumed.parent / f"checkpoint-{self.state.best_global_step}"
        if best.is_dir():  # the folder of the fit may have been moved
            self.state.best_model_checkpoint = str(best)

    def _recall_counts(self) -> None:
        """Restore what callbacks have counted, as early stopping does; options stay the call's.

        The Trainer restores both, or neither. Of several callbacks of one class the newest states
        are the last ones. A number has to stay one; what is None at first may become anything.
        """
        for callback, kept in _last_states(self.callback_handler.callbacks, self.state):
            for name, value in callback.state()["attributes"].items():
                recalled = kept["attributes"][name]
                if isinstance(value, int | float) and not isinstance(recalled, int | float):
                    raise TypeError(f"{name} of {type(callback).__name__} is of another type")
                setattr(callback, name, recalled)

    def _unusable(self, name: str, reason: object) -> CheckpointError:
        return CheckpointError(
            f"{name} of the checkpoint {self._resumed} cannot be used: {reason}; resume from "
            "an older checkpoint, or begin anew"
        )


def _last_states(
    callbacks: list[TrainerCallback], state: TrainerState
) -> list[tuple[ExportableState, Any]]:
    """Return the callbacks that the state knows, each with the last one that was kept of it."""
    kinds: dict[str, list[ExportableState]] = {}
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            kinds.setdefault(type(callback).__name__, []).append(callback)
    pairs = []
    for name, alike in kinds.items():
        kept = state.stateful_callbacks.get(name, [])
        listed = kept if isinstance(kept, list) else [kept]
        pairs += [*zip(alike, listed[-len(alike) :], strict=False)]
    return pairs


def _fits(name: str, value: Tensor, parameter: Tensor) -> bool:
    """Return whether the optimiser can keep ``value`` for a parameter.

    Averages have the size of the parameter, unless they are those of rows and columns (Adafactor)
    or of blocks (8-bit optimisers).
    """
    whole = name not in _OF_ENTRIES or value.shape == parameter.shape
    return whole and bool(torch.isfinite(value).all())
