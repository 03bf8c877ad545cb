"""One fit: the engines that guides share, on one network and its data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments, set_seed

from pyrolora import defaults
from pyrolora.adapters import FlatFactors
from pyrolora.columns import LABELS, Batch
from pyrolora.data.collate import pass_rows, to_device
from pyrolora.data.prepared import Prepared
from pyrolora.errors import NonFiniteError, SaveError
from pyrolora.guides import Guide, Latent, Program
from pyrolora.inference.checkpoints import check_room, checkpoint_to_resume
from pyrolora.inference.curvature import Kronecker, kfac, portions
from pyrolora.inference.dual import Dual, check_size
from pyrolora.inference.evidence import best_precision
from pyrolora.inference.head_laplace import settle_head
from pyrolora.inference.identity import describe_fit
from pyrolora.inference.jacobian import examples
from pyrolora.inference.mcmc import nuts
from pyrolora.inference.members import (
    finished_state,
    forget_members,
    member_arguments,
    save_finished,
)
from pyrolora.inference.moved import starting_factors, warn_of_unmoved
from pyrolora.inference.ranks import AllocateRanks
from pyrolora.inference.recording import unrecordable
from pyrolora.inference.settling import SettleScales, settle_finally
from pyrolora.inference.stopping import stopping
from pyrolora.inference.trainer import SVITrainer
from pyrolora.inference.widths import ChooseWidth
from pyrolora.model import JointModel, evaluating
from pyrolora.processes import (
    all_processes,
    alone,
    check_agreement,
    processes,
    share_generators,
    shared_out,
)
from pyrolora.progress import progress, shows_bars, silenced
from pyrolora.seeding import give_way, seeded

Score = Callable[[JointModel, int | None], dict[str, float]]

SHARED_FOLDER = "set output_dir to one folder that all of them see, also on several machines"


@dataclass
class Run:
    """The engines of a fit, as `Guide.infer` uses them; see `pyrolora.guides.Fit`.

    Attributes
    ----------
    joint, guide
        The joint model that is inferred, and its options.
    build
        Makes another joint model on the same network, from a guide.
    data
        The training data.
    args, callbacks
        The Trainer's arguments and callbacks.
    score
        Returns the metrics of a joint model on the evaluation data, from a number of draws; None
        without such data.
    held_out
        The evaluation data, or None.
    held_back
        The training examples that the fit does not learn from, or None.
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
    held_back: Prepared | None
    posterior: Callable[[JointModel, Guide], Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    _scored: bool = False

    @property
    def program(self) -> Program:
        """The guide's program in `joint`."""
        return self.joint.program

    # Training -----------------------------------------------------------------------------------

    def svi(self, *, final: bool = True) -> None:
        """Train the pair of `joint`; with ``final`` the result is the posterior."""
        joint, settles = self.joint, self.program.settles
        trained = _is_trained(joint)
        if trained:
            self._train(joint, self.guide, self.args)
        if settles:
            joint.to(self.args.device)
            settle_finally(joint, self.guide, self.data, self.args, 1 if trained else 4)
        self._scored = final and trained and not settles

    def widen_head(self) -> None:
        """Infer the law of the task head's last layer, where the guide has it Gaussian."""
        if self.guide.head == "point":
            return
        self.joint.widen_head()
        with seeded(self.args.seed):
            beta = self.guide.beta(self.joint.num_examples)
            precision = settle_head(self.joint, self._batches("task head"), beta)
        self.log(head_precision=precision)
        self._scored = False

    def conclude(self) -> None:
        """Score `joint` on the evaluation data, unless the training has done so."""
        if self.score is not None and not self._scored:
            scores = self.score(self.joint, None)
            self.log(**{f"eval_{name}": value for name, value in scores.items()})

    def points(self, guide: Guide, count: int) -> list[JointModel]:
        """Train ``count`` point masses, each from its own start, and return their joint models.

        Processes share them out, unless they are more than there are points, or each has a part of
        the network's weights; then they train every point together.
        """
        forget_members(self.args)
        with all_processes():
            if not 1 < processes() <= count or self.joint.sharded:
                return [self.point(guide, number) for number in range(count)]
            trained = shared_out(range(count), partial(self._points_alone, guide))
        points = []
        for number, (state, entries) in enumerate(trained):
            set_seed(member_arguments(self.args, number).seed)
            points.append(self.build(guide))
            points[-1].load_own_state(state)
            points[-1].align()
            self.history += entries
        return points

    def _points_alone(
        self, guide: Guide, numbers: Sequence[int]
    ) -> list[tuple[dict[str, Tensor], list[dict[str, Any]]]]:
        """Train these points in this process, and return their states and logs."""
        trained, before = [], len(self.history)
        for number in numbers:
            with alone():
                state = self.point(guide, number).own_state()
            entries, self.history[before:] = self.history[before:], []
            trained.append(({name: t.cpu() for name, t in state.items()}, entries))
        return trained

    def point(self, guide: Guide, number: int | None = None) -> JointModel:
        """Train a point mass from its own start, and return its joint model.

        With a ``number`` it has the seed of that member and its folder for checkpoints. Frozen
        means stay as they are, and nothing is trained.
        """
        args = copy.copy(self.args) if number is None else member_arguments(self.args, number)
        set_seed(args.seed)
        joint = self.build(guide)
        done = None
        if number is not None and self.args.resume_from_checkpoint:
            done = finished_state(args, self._identity(joint, guide, args))
        if done is not None:
            joint.load_own_state(done[0])
            self.history += done[1]
        elif _is_trained(joint):
            before = len(self.history)
            self._train(joint, guide, args, {} if number is None else {"member": number})
            if number is not None and args.should_save and args.save_strategy != "no":
                identity = self._identity(joint, guide, args)
                save_finished(joint, args, identity, self.history[before:])
        self.joint.to(args.device)  # where the Trainer has put the network
        return joint

    # Measuring ----------------------------------------------------------------------------------

    @property
    def can_validate(self) -> bool:
        """Whether there is evaluation data."""
        return self.score is not None

    def held_out_nll(self) -> float:
        """Return the negative log-likelihood of the evaluation data under `joint`."""
        assert self.score is not None
        return self.score(self.joint, None)["nll"]

    @torch.no_grad()
    def loss(self, factors: FlatFactors, *, held_out: bool = False) -> float:
        """Return −log p per observation, in nats, on the training (or evaluation) data.

        It is a mean over observations and over the draws of ``factors``.
        """
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

    def kfac(self) -> Iterator[dict[str, Kronecker]]:
        """Yield block name -> Kronecker factors of the curvature at the means of `joint`."""
        for names in portions(self.program.bank.specs.values()):
            yield kfac(self.joint, self._batches("curvature"), names)

    def check_dual(self) -> None:
        """Raise `DataError` for more examples than `dual` takes."""
        check_size(len(self.data))
        self.joint.to(self.args.device)
        parts = examples(self.joint, lambda: self._batches("outputs"))
        check_size(len(self.data), parts[0].basis.shape[-1])

    def dual(self, centre: Tensor, latent: Latent, draws: int) -> Dual:
        """Return the posterior of all latent factors in the model linearised at the means."""
        set_seed(self.args.seed)
        return Dual(self.joint, lambda: self._batches("curvature"), centre, latent, draws)

    def best_precision(self, eigenvalues: list[Tensor], means: list[Tensor]) -> float:
        """Return the prior's precision with the highest marginal likelihood."""
        return best_precision(eigenvalues, means)

    def mcmc(self, beta: float, **options: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Run NUTS on `joint`; return its draws, and which of its steps diverged."""
        whole = self.data.collate([self.data.examples[i] for i in range(len(self.data))])
        set_seed(self.args.seed)
        # Pyro passes ``disable=False`` to its bar, which would overrule a user's TQDM_DISABLE.
        shown = shows_bars() and not (self.args.disable_tqdm or silenced())
        options |= {"progress": shown, "seed": self.args.seed}
        with all_processes():
            return nuts(self.joint, self._placed(whole), beta, **options)

    def log(self, **numbers: float) -> None:
        """Add an entry to the history."""
        self.history.append(dict(numbers))

    # Inside -------------------------------------------------------------------------------------

    def _so_far(self, joint: JointModel, guide: Guide) -> Any:
        """Return the posterior of a training that broke off, before its head had a law."""
        return self.posterior(joint, replace(guide, head="point"))

    def _identity(self, joint: JointModel, guide: Guide, args: TrainingArguments) -> dict[str, Any]:
        return describe_fit(joint, guide, self.data, args)

    def _batches(self, title: str, data: Prepared | None = None) -> Iterator[Batch]:
        data = self.data if data is None else data
        order = data.by_length()  # sums over batches do not depend on the order
        loader = data.loader(self.args.per_device_train_batch_size, order)
        for batch in progress(loader, title=title, hidden=self.args.disable_tqdm):
            give_way()
            yield self._placed(batch)

    def _placed(self, batch: Mapping[str, Any]) -> Batch:
        device = next(self.joint.program.parameters()).device
        return to_device(batch, device)

    def _trainer(self, joint: JointModel, guide: Guide, args: TrainingArguments) -> SVITrainer:
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
        return trainer

    def _train(
        self,
        joint: JointModel,
        guide: Guide,
        args: TrainingArguments,
        mark: Mapping[str, Any] | None = None,
    ) -> None:
        """Train, and add the Trainer's log to the history, each entry with ``mark``."""
        trainer = self._trainer(joint, guide, args)
        checkpointing = getattr(joint.base, "is_activation_checkpointing", False)
        if checkpointing and not args.gradient_checkpointing:
            joint.activation_checkpointing_enable()  # the user's, with our binding carried over
        if _settled_in_training(joint):
            trainer.add_callback(SettleScales(joint, guide, self.data, trainer.failure))
        if self.held_back is not None and joint.program.previous is None:
            trainer.add_callback(ChooseWidth(joint, self.data, self.held_back))
        asked: Any = args.resume_from_checkpoint or None
        starts = starting_factors(joint)
        if args.save_strategy != "no" and args.should_save:
            check_room(joint, args.output_dir)
        try:
            if asked:
                asked = checkpoint_to_resume(asked, args.output_dir)
                with all_processes():
                    name = None if asked is None else asked.name
                    check_agreement("the checkpoint to resume from", name, SHARED_FOLDER)
            with stopping(args) as trainer.stop:
                trainer.train(resume_from_checkpoint=None if asked is None else str(asked))
            trainer.check_end()
            with all_processes():  # whose noise differed in training, and must not from here on
                share_generators(args.device)
            warmed = trainer.state.global_step > 1 or not args.get_warmup_steps(1)
            warn_of_unmoved(joint, starts, args.learning_rate if warmed else 0.0)
        except NonFiniteError as error:
            if trainer.state.global_step:
                error.posterior = self._so_far(joint, guide)
            raise
        except SaveError as error:
            unsaved = SaveError(
                f"{error}. The fit stopped after step {trainer.state.global_step}, of which "
                "error.posterior is the posterior; checkpoints that were there are whole"
            )
            unsaved.posterior = self._so_far(joint, guide)
            raise unsaved from error
        finally:
            trainer.close_progress()
            if args.gradient_checkpointing and not checkpointing:
                joint.activation_checkpointing_disable()
            joint.zero_grad(set_to_none=True)
            joint.eval()
            joint.program.progress = 1.0
            self.history += [{**entry, **(mark or {})} for entry in trainer.state.log_history]


def _settled_in_training(joint: JointModel) -> bool:
    program = joint.program
    at_first = program.settles_at_first and not unrecordable(joint.attachment)
    return program.settles or at_first


def _is_trained(joint: JointModel) -> bool:
    return any(parameter.requires_grad for parameter in joint.parameters())
