"""One fit: the engines that guides share, on one network and its data."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments, set_seed

from pyrolora import defaults
from pyrolora.adapters import FlatFactors
from pyrolora.columns import LABELS, Batch
from pyrolora.data.collate import pass_rows, to_device
from pyrolora.data.prepared import Prepared
from pyrolora.errors import CheckpointError, ConfigError, NonFiniteError
from pyrolora.guides import Guide, Program
from pyrolora.inference.allocation import AllocateRanks
from pyrolora.inference.checkpoints import (
    MEMBER,
    STATE_FILE,
    check_same_fit,
    checkpoint_to_resume,
    checkpoints,
    describe_fit,
    last_checkpoint,
    member_folders,
    read_state,
    save_state,
)
from pyrolora.inference.curvature import Kronecker, best_precision, kfac
from pyrolora.inference.dual import Dual, check_size
from pyrolora.inference.jacobian import examples
from pyrolora.inference.mcmc import nuts
from pyrolora.inference.moved import starting_factors, warn_of_unmoved
from pyrolora.inference.settling import SettleScales, settle_finally
from pyrolora.inference.trainer import SVITrainer
from pyrolora.model import JointModel, evaluating
from pyrolora.seeding import give_way

Score = Callable[[JointModel, int | None], dict[str, float]]


@dataclass
class Run:
    """What `Guide.infer` works with; see `pyrolora.guides.Fit`.

    Attributes
    ----------
    joint, guide
        The joint model that is inferred, and its options.
    build
        Makes another joint model on the same network, from a guide.
    data
        The training data.
    args, callbacks
        For the Trainer.
    score
        The metrics of a joint model on the evaluation data by that many draws, or None without
        such data.
    held_out
        The evaluation data, or None.
    posterior
        Makes a posterior of a joint model, for an error to carry.
    history
        The log.
    """

    joint: JointModel
    guide: Guide
    build: Callable[[Guide], JointModel]
    data: Prepared
    args: TrainingArguments
    callbacks: Sequence[TrainerCallback]
    score: Score | None
    held_out: Prepared | None
    posterior: Callable[[JointModel, Guide], Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    _scored: bool = False

    @property
    def program(self) -> Program:
        return self.joint.program

    def svi(self, *, final: bool = True) -> None:
        """Train the pair of `joint`; with ``final`` what it leaves is the result."""
        joint, settles = self.joint, self.program.settles
        trained = any(parameter.requires_grad for parameter in joint.parameters())
        if trained:
            self._train(joint, self.guide, self.args)
        if settles:
            joint.to(self.args.device)
            settle_finally(joint, self.guide, self.data, self.args, 1 if trained else 4)
        self._scored = final and trained and not settles

    def conclude(self) -> None:
        """Score `joint` on the evaluation data, where no training has done it."""
        if self.score is not None and not self._scored:
            scores = self.score(self.joint, None)
            self.log(**{f"eval_{name}": value for name, value in scores.items()})

    def point(self, guide: Guide, number: int | None = None) -> JointModel:
        """A joint model of its own with ``guide``, trained from its own start.

        With a ``number`` it has the seed of that number, and a folder of its own for checkpoints.
        Given means stay as they are, and there is nothing to train.
        """
        args = copy.copy(self.args)
        if number is not None:
            args.seed = (args.seed + number) % (defaults.MAX_SEED + 1)
            if args.data_seed is not None:
                args.data_seed = (args.data_seed + number) % (defaults.MAX_SEED + 1)
            if number == 0 and args.should_save and not args.resume_from_checkpoint:
                _forget_members(args.output_dir)
            args.output_dir = str(Path(args.output_dir) / f"{MEMBER}{number}")
            if args.resume_from_checkpoint:
                args.resume_from_checkpoint = _checkpoint(args)
        set_seed(args.seed)
        joint = self.build(guide)
        finished = Path(args.output_dir) / STATE_FILE
        if number is not None and self.args.resume_from_checkpoint and finished.is_file():
            joint.load_own_state(_finished_state(finished, self._described(joint, guide, args)))
        elif any(parameter.requires_grad for parameter in joint.parameters()):
            self._train(joint, guide, args, {} if number is None else {"member": number})
            if number is not None and args.should_save and args.save_strategy != "no":
                scratch = finished.with_suffix(".part")
                notes = {"fit": json.dumps(self._described(joint, guide, args))}
                save_state(joint, scratch, notes)
                scratch.replace(finished)
        self.joint.to(args.device)  # where the Trainer has put the network
        return joint

    @property
    def can_validate(self) -> bool:
        """Whether there is evaluation data."""
        return self.score is not None

    def held_out_nll(self) -> float:
        """The negative log-likelihood of the evaluation data under `joint`."""
        assert self.score is not None
        return self.score(self.joint, None)["nll"]

    @torch.no_grad()
    def loss(self, factors: FlatFactors, *, held_out: bool = False) -> float:
        """−log p of an observation, in nats, of the training (or evaluation) data: a mean over them
        and over the draws of ``factors``."""
        joint, count, total = self.joint, 0, 0.0
        draws = factors.draws or 1
        with evaluating(joint):
            for batch in self._batches("loss", self.held_out if held_out else None):
                size = len(next(iter(batch.values())))
                step = max(1, pass_rows(batch, defaults.PREDICT_ROWS) // size)
                for start in range(0, draws, step):
                    part = factors if factors.draws is None else factors[start : start + step]
                    output = joint.network(batch, part)
                    total -= float(joint.task.log_prob(output, batch).double().sum())
                count += joint.task.count(batch[LABELS])
        return total / (count * draws)

    def kfac(self) -> dict[str, Kronecker]:
        """The Kronecker factors of the curvature at the means of `joint`, by block."""
        return kfac(self.joint, self._batches("curvature"))

    def check_dual(self) -> None:
        """Raise `DataError` for more examples than `dual` takes."""
        check_size(len(self.data))
        self.joint.to(self.args.device)
        parts = examples(self.joint, lambda: self._batches("outputs"))
        check_size(len(self.data), parts[0].basis.shape[-1])

    def dual(self, centre: Tensor, latent: str, draws: int) -> Dual:
        """The posterior of all latent factors in the linearised model at the means of `joint`."""
        set_seed(self.args.seed)
        return Dual(self.joint, lambda: self._batches("curvature"), centre, latent, draws)

    def best_precision(self, eigenvalues: list[Tensor], means: list[Tensor]) -> float:
        """The prior's precision of the highest marginal likelihood."""
        return best_precision(eigenvalues, means)

    def mcmc(self, beta: float, **options: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Draws of NUTS on `joint`, and which of its steps diverged."""
        whole = self.data.collate([self.data.examples[i] for i in range(len(self.data))])
        set_seed(self.args.seed)
        # Pyro says ``disable=False`` to its bar, which overrules a user's TQDM_DISABLE.
        shown = not (self.args.disable_tqdm or os.environ.get("TQDM_DISABLE"))
        return nuts(self.joint, self._placed(whole), beta, progress=shown, **options)

    def log(self, **numbers: float) -> None:
        """Add an entry to the history."""
        self.history.append(dict(numbers))

    def _described(
        self, joint: JointModel, guide: Guide, args: TrainingArguments
    ) -> dict[str, Any]:
        return describe_fit(joint, guide, self.data, args)

    def _batches(self, title: str, data: Prepared | None = None) -> Iterator[Batch]:
        data = self.data if data is None else data
        order = data.by_length()  # what is summed over batches has none
        loader = data.loader(self.args.per_device_train_batch_size, order)
        # Not ``disable=False``, which would overrule a user's TQDM_DISABLE.
        hidden = {"disable": True} if self.args.disable_tqdm else {}
        for batch in tqdm(loader, desc=title, delay=2, leave=False, **hidden):
            give_way()
            yield self._placed(batch)

    def _placed(self, batch: Mapping[str, Any]) -> Batch:
        device = next(self.joint.program.parameters()).device
        return to_device(batch, device)

    def _train(
        self,
        joint: JointModel,
        guide: Guide,
        args: TrainingArguments,
        mark: Mapping[str, Any] | None = None,
    ) -> None:
        score = self.score
        trainer = SVITrainer(
            joint,
            guide,
            self.data,
            args,
            evaluate=None if score is None else lambda: score(joint, defaults.EVAL_SAMPLES),
            callbacks=tuple(self.callbacks),
        )
        if joint.program.bank.moves() and joint.program.previous is None:
            trainer.add_callback(AllocateRanks(joint, self.held_out))
        checkpointing = getattr(joint.base, "is_activation_checkpointing", False)
        if checkpointing and not args.gradient_checkpointing:
            joint.activation_checkpointing_enable()  # the user's own, with our binding carried over
        if joint.program.settles:
            trainer.add_callback(SettleScales(joint, guide, self.data))
        asked: Any = args.resume_from_checkpoint
        starts = starting_factors(joint)
        try:
            if asked:
                asked = str(checkpoint_to_resume(asked, args.output_dir))
            trainer.train(resume_from_checkpoint=asked or None)
            warmed = trainer.state.global_step > 1 or not args.get_warmup_steps(1)
            warn_of_unmoved(joint, starts, args.learning_rate if warmed else 0.0)
        except NonFiniteError as error:
            trainer.restore_statistics()
            error.posterior = self.posterior(joint, guide)
            raise
        finally:
            trainer.close_progress()
            if args.gradient_checkpointing and not checkpointing:
                joint.activation_checkpointing_disable()
            joint.zero_grad(set_to_none=True)
            joint.eval()
            joint.program.progress = 1.0
            self.history += [{**entry, **(mark or {})} for entry in trainer.state.log_history]


def _checkpoint(args: TrainingArguments) -> str | None:
    """The newest whole checkpoint of a member, if it has come to one."""
    asked = args.resume_from_checkpoint
    if asked is not True:
        raise ConfigError(
            f"resume_from_checkpoint={str(asked)!r} is one folder, and every member of an ensemble "
            "has its own; set it to True, and output_dir to that of the fit"
        )
    found = last_checkpoint(args.output_dir)
    return None if found is None else str(found)


def _forget_members(folder: str) -> None:
    """Remove the states of an older ensemble, which a resume would take for its own."""
    for member in member_folders(folder):
        (member / STATE_FILE).unlink(missing_ok=True)
        for checkpoint in checkpoints(member):
            shutil.rmtree(checkpoint)


def _finished_state(file: Path, described: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The state of a member that is through, if it is of this fit."""
    state = read_state(file)
    with safe_open(file, "pt") as stream:
        notes = (stream.metadata() or {}).get("fit", "null")
    try:
        saved = json.loads(notes)
    except (ValueError, RecursionError):
        saved = None
    if not isinstance(saved, dict):
        raise CheckpointError(f"{file} does not say of which fit it is; begin anew")
    check_same_fit(saved, described, file.parent)
    return state
