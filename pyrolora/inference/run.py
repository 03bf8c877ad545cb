"""One fit: the engines that guides share, on one network and its data."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments, set_seed

from pyrolora import defaults
from pyrolora.errors import ConfigError, NonFiniteError
from pyrolora.guides import Guide, Program
from pyrolora.inference.allocation import AllocateRanks
from pyrolora.inference.arguments import MEMBER, checkpoints, last_checkpoint, member_folders
from pyrolora.inference.batches import to_device
from pyrolora.inference.curvature import Kronecker, best_precision, kfac
from pyrolora.inference.data import Prepared
from pyrolora.inference.mcmc import nuts
from pyrolora.inference.moved import starting_factors, warn_of_unmoved
from pyrolora.inference.trainer import STATE_FILE, SVITrainer, read_state, save_state
from pyrolora.model import JointModel
from pyrolora.types import Batch

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
        self._train(self.joint, self.guide, self.args)
        self._scored = final

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
                args.resume_from_checkpoint = _checkpoint(Path(args.output_dir))
        set_seed(args.seed)
        joint = self.build(guide)
        finished = Path(args.output_dir) / STATE_FILE
        if number is not None and self.args.resume_from_checkpoint and finished.is_file():
            joint.load_own_state(_finished_state(finished, args))
        elif any(parameter.requires_grad for parameter in joint.parameters()):
            self._train(joint, guide, args, {} if number is None else {"member": number})
            if number is not None and args.should_save and args.save_strategy != "no":
                scratch = finished.with_suffix(".part")
                save_state(joint, scratch, _settings(args))
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

    def kfac(self) -> dict[str, Kronecker]:
        """The Kronecker factors of the curvature at the means of `joint`, by block."""
        return kfac(self.joint, self._batches("curvature"))

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

    def _batches(self, title: str) -> Iterator[Batch]:
        order = self.data.by_length()  # what is summed over batches has none
        loader = self.data.loader(self.args.per_device_train_batch_size, order)
        # Not ``disable=False``, which would overrule a user's TQDM_DISABLE.
        hidden = {"disable": True} if self.args.disable_tqdm else {}
        for batch in tqdm(loader, desc=title, delay=2, leave=False, **hidden):
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
        starts = starting_factors(joint)
        try:
            trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
            warn_of_unmoved(joint, starts, args.learning_rate)
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


def _checkpoint(folder: Path) -> str | None:
    found = last_checkpoint(folder)
    return None if found is None else str(found)


def _forget_members(folder: str) -> None:
    """Remove the states of an older ensemble, which a resume would take for its own."""
    for member in member_folders(folder):
        (member / STATE_FILE).unlink(missing_ok=True)
        for checkpoint in checkpoints(member):
            shutil.rmtree(checkpoint)


def _settings(args: TrainingArguments) -> dict[str, str]:
    """What a member was trained with, for a resume to compare."""
    names = (
        *("num_train_epochs", "max_steps", "learning_rate", "per_device_train_batch_size"),
        *("gradient_accumulation_steps", "weight_decay", "seed", "data_seed"),
    )
    return {name: str(getattr(args, name)) for name in names}


def _finished_state(file: Path, args: TrainingArguments) -> Mapping[str, Tensor]:
    """The state of a member that is through, if it was trained with these settings."""
    state = read_state(file)
    with safe_open(file, "pt") as stream:
        saved = stream.metadata() or {}
    changed = [
        f"{n} was {saved.get(n)}, now {v}" for n, v in _settings(args).items() if saved.get(n) != v
    ]
    if changed:
        raise ConfigError(
            f"{file.parent} holds a member of an ensemble with other settings: "
            f"{'; '.join(changed)}; resume with the same, or choose another output_dir"
        )
    return state
