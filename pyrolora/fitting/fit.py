"""`fit`: a request is read, its origin loaded, and the guide inferred."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments, set_seed

from pyrolora import defaults
from pyrolora.adapters import Attachment, bare, eagerly
from pyrolora.adapters.config import AdapterConfig
from pyrolora.attaching import attached
from pyrolora.data import Prepared, TextOptions, prepare
from pyrolora.errors import ConfigError, NonFiniteError, SaveError, listed
from pyrolora.fitting.earlier import Continued, Given
from pyrolora.fitting.fresh import Fresh
from pyrolora.fitting.held_back import calibrate, check_width, parted
from pyrolora.fitting.origin import Builder, Origin
from pyrolora.fitting.request import Request
from pyrolora.fitting.streams import fill_rows, read_stream
from pyrolora.fitting.training import (
    check_evaluation,
    choose_best,
    compiled_for,
    opened_arguments,
    settings_of,
)
from pyrolora.fitting.usable import MANY, check_usable
from pyrolora.guides import NUTS, Guide, full_name
from pyrolora.inference import Run
from pyrolora.inference.head_laplace import check_last_layer
from pyrolora.inference.identity import known_digest
from pyrolora.inference.recording import as_recordable, check_recordable, unrecordable
from pyrolora.inference.sharding import shard, sharding_asked
from pyrolora.model import JointModel
from pyrolora.posterior import Posterior
from pyrolora.predictive import draw_factors, evaluate, predict
from pyrolora.processes import all_processes
from pyrolora.seeding import fitting
from pyrolora.storage import describe_base
from pyrolora.tasks import Task, choice_task

logger = logging.getLogger(__name__)


def fit(
    model: str | Path | nn.Module | Posterior,
    data: Any,
    guide: str | Guide | None = None,
    *,
    eval_data: Any = None,
    num_examples: int | None = None,
    tokenizer: Any = None,
    task: str | Task | None = None,
    choices: str | None = None,
    adapter: AdapterConfig | Any = None,
    texts: TextOptions | None = None,
    prior: Posterior | None = None,
    epochs: float | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    output_dir: str | Path | None = None,
    training: TrainingArguments | None = None,
    callbacks: Sequence[TrainerCallback] | TrainerCallback = (),
) -> Posterior:
    """Infer the posterior of a network's low-rank adapters.

    Parameters
    ----------
    model
        A transformers model, its hub id or folder, or any ``nn.Module`` with linear layers (then
        name the ``task``). Its weights are not changed. A model that is loaded gets a head for the
        classes of ``data``, or, with ``prior``, of the earlier data. Or a `Posterior`, such as
        `from_peft` reads: its means and task head stay as they are, and the guide adds their
        spread (``"montec"``, ``"meanfield"``, ``"lowrank"``, ``"laplace"``, ``"tfb"``, of the head
        alone ``MAP(head="gaussian")``; the model of ``"nuts"`` is conditioned on them).
    data
        Training data: a ``datasets.Dataset`` or ``DatasetDict`` (split ``train``; its
        ``validation`` becomes ``eval_data``), raw with a tokenizer or processor, or tokenised; a
        torch ``Dataset`` or ``DataLoader`` (whose data set is taken); a list of dicts; a tuple
        (inputs, labels). Each task has its columns, which ``docs/tasks.md`` lists: texts with
        ``label``, words with tags, ``choices`` beside a ``question``, ``messages``, ``prompt`` and
        ``completion``, ``document`` and ``summary``, ``chosen`` and ``rejected``, those of SQuAD,
        ``image``, ``audio``. Labels that are names are matched with the network's, up to case,
        spaces, '-' and '_'. A network without names takes those of a ``ClassLabel``, and one that
        is loaded by name those of texts, too (`Posterior.classes`). EOS ends every text that a
        causal language model learns; scores are those of the text alone. In texts
        without labels for a masked language model some tokens are hidden, always the same. A
        warning names columns that are not read, and data that can be read in two ways raise a
        `DataError`.
    guide
        A name from ``pyrolora.guides.available()``, two joined as in ``"flat+montec"``, or a guide
        object with its options. None: ``"montec"``, or the guide of ``prior``. With their defaults
        ``"montec"``, ``"meanfield"`` and ``"lowrank"`` hold a tenth of the training examples back,
        if that is ten or more, but at most 250; these choose the width of the noise and a
        temperature, and are not learnt (``hold_back`` of the guide, `Posterior.held_back`).
    eval_data
        Evaluation data, scored every epoch by the predictive mean over draws, and once more where
        the posterior is finished after the training (scales set by curvature, ``"laplace"``,
        ``"nuts"``, ``"ensemble"``, ...). These scores are at temperature 1: `Posterior.evaluate`
        has those at the temperature that the fit chooses last.
        ``"laplace"`` sets the scale of its prior by it, unless told otherwise, and
        ``rank_allocation="alora"`` judges ranks by it.
    num_examples
        n, the number of all examples of a stream (``datasets.IterableDataset``), of which the fit
        reads as many as the ``max_steps`` of ``training`` take.
    tokenizer
        The tokenizer, for raw text and padding; or transformers' image processor, feature
        extractor, or processor of texts and pictures, for raw pictures and sounds, of which it
        makes each batch (the Trainer's ``processing_class``). With the hub id or folder of a model
        it is loaded.
    task
        A name from ``pyrolora.tasks.available()``, or a `Task`; None: from the model's class.
    choices
        How a causal language model learns to choose, from data with a column ``choices``:
        ``"letters"``, by the letter that it writes after a prompt with lettered options, among the
        letters (one pass per example); ``"texts"``, by the likelihoods of the choices' texts after
        the context (a pass per choice), or ``"texts-per-token"``, by their means over tokens. It
        stands for ``task="letter-choice"``, ``"text-choice"``,
        ``"text-choice-per-token"``.
    adapter
        An `AdapterConfig`, or a ``peft.LoraConfig``.
    texts
        A `TextOptions`: how a causal language model reads texts and chats. The posterior keeps it.
        None: as its defaults say, or as in the earlier fit.
    prior
        A posterior of the same network from earlier data, which becomes the prior of the latent
        factors:

            q(θ) = argmin −Σ_new log p(y|θ) + β KL(q ‖ q_earlier)

        so that the new data are learnt and the earlier data, which are not needed, are not
        forgotten. The fit starts at the earlier means and scales. Everything without a prior (the
        factor that is not latent, the task head, the noise of a regression) stays as it is; with
        ``latent="AB"`` both factors move. It works for ``"montec"``, ``"meanfield"``,
        ``"lowrank"``, and ``"flat"`` around them, with the options of the earlier fit except for
        the weight of the KL and options of the training alone.
    epochs, learning_rate, batch_size, seed
        Shortcuts into ``training``; ``pyrolora/defaults.py`` has the defaults. The seed sets the
        process's random generators for the time of the fit; afterwards they are as before it.
    output_dir
        The folder for checkpoints, ten per run, and for the posterior at the end. One fit at a time
        uses it.
    training
        ``transformers.TrainingArguments`` for everything that the Trainer can do (accumulation,
        precision, schedules, gradient checkpointing), instead of the shortcuts: its own defaults
        then hold (a learning rate of 5e-5), and saving is up to you. ``resume_from_checkpoint`` is
        a checkpoint, True for the newest whole one of its ``output_dir``, or ``"auto"`` for that
        one if there is one: the same call then begins or goes on. A fit that saves checkpoints,
        and gets SIGTERM or control and C, ends after the step, which is saved.
        ``metric_for_best_model`` can be any metric of `Posterior.evaluate`, or ``"loss"``, which is
        the ``nll``; whether it is better high or low is known. Arguments that would do nothing here
        are refused. A ``trl.SFTConfig`` has `TextOptions`, too.
    callbacks
        Trainer callbacks, or one.

    Returns
    -------
    Posterior
        Its network is in evaluation mode.

    Raises
    ------
    ConfigError, DataError, TargetError, UnknownNameError
        Before any training step, for a request that cannot be fitted.
    NonFiniteError
        When the objective stops being finite; its ``posterior`` has the last good state. It is
        None where no step was made, where that state does not predict finite numbers either, or
        where training went well and the posterior that follows from it does not.
    SaveError
        When the posterior, or a checkpoint, cannot be written to ``output_dir``; the error's
        ``posterior`` has it, or that of the step.
    """
    given = model if isinstance(model, Posterior) else None
    request = Request(
        model=model.base if isinstance(model, Posterior) else bare(model),
        data=data,
        guide=guide,
        eval_data=eval_data,
        num_examples=num_examples,
        tokenizer=tokenizer,
        task=choice_task(choices, task),
        adapter=adapter,
        texts=texts,
        given=given,
        prior=prior,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=seed,
        output_dir=output_dir,
        training=training,
        callbacks=callbacks,
    )
    return fit_request(request)


@fitting()
def fit_request(request: Request) -> Posterior:
    """Infer the posterior that ``request`` asks for, as `fit` says."""
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        raise ConfigError("fit needs gradients; call it outside of inference_mode and no_grad")
    request.check()
    request = read_stream(request).loaded()
    with opened_arguments(request) as args, sharding_asked(args) as sharding:
        set_seed(args.seed)
        origin = _origin_of(request)
        data, held_out = _prepared(request, origin)
        of_data = _digest(data)
        data, held_back = parted(data, request, args)
        if held_back is None:
            _warn_of_source(request)
        else:
            of_data["held_back"] = len(held_back)
        check_evaluation(args, held_out)
        choose_best(args, origin.task, request)
        with attached(origin.network, partial(origin.attach, data, args)) as attachment:
            build = partial(_in_rows, origin.builder(attachment, data, args), data.rows)
            request = _recordable(request, attachment)
            joint = build(request.options)
            if held_back is not None:
                check_width(joint)
            if request.options.reads_inputs:
                check_recordable(joint)
            with eagerly(joint.base):
                origin.ready(joint, data, held_out, args)
                if request.options.head == "gaussian":
                    check_last_layer(joint, data)
            identity = describe_base(
                origin.network, attachment.heads, weights=request.options.adapts
            )
            if sharding is not None:
                shard(joint, sharding, args.device)
            settings = {**settings_of(args), **of_data}
            posterior_of = partial(
                Posterior, tokenizer=origin.tokenizer, settings=settings, identity=identity
            )
            score = None if held_out is None else partial(_score, data=held_out, args=args)
            listeners = request.listeners
            run = Run(
                joint,
                request.options,
                build,
                data,
                args,
                listeners,
                score,
                held_out,
                held_back,
                posterior_of,
            )
            with compiled_for(joint.base, args):
                posterior = _inferred(run, request)
            if held_back is not None:
                calibrate(posterior, held_back, args)
        _save(posterior, request, args)
    return posterior


def _origin_of(request: Request) -> Origin:
    if request.given is not None:
        return Given.of(request)
    return Fresh.of(request) if request.prior is None else Continued.of(request)


def _prepared(request: Request, origin: Origin) -> tuple[Prepared, Prepared | None]:
    """Prepare the training data, whose classes the task gets, and the evaluation data."""
    network, task, tokenizer = origin.network, origin.task, origin.tokenizer
    request.options.check(task)
    _set_texts(task, request)
    learnt = partial(prepare, network=network, task=task, tokenizer=tokenizer, to_pack=True)
    data, held_out = fill_rows(request, learnt(request.data), learnt), None
    data = dataclasses.replace(data, whole=request.num_examples)
    task.class_names = data.names or task.class_names
    if request.held_out is not None:
        splits = defaults.FIT_SPLITS
        held_out = prepare(
            request.held_out, network, task, tokenizer, splits=splits, to_learn=False
        )
    return data, held_out


def _in_rows(build: Builder, rows: float, guide: Guide) -> JointModel:
    """Build the joint model of a guide, for data in so many rows."""
    joint = build(guide)
    joint.rows = rows
    return joint


def _recordable(request: Request, attachment: Attachment) -> Request:
    """Return the request as it can be fitted on these layers; log what else is inferred."""
    guide = as_recordable(request.asked, attachment)
    if guide != request.asked:
        logger.warning(
            "the scales of %r are trained (scale_updates='gradient'), not set by curvature: it is "
            "made of the inputs of each layer, and adapted parameters and embeddings have none "
            "that it could use: %s",
            full_name(guide),
            listed(unrecordable(attachment), most=2),
        )
    return dataclasses.replace(request, guide=guide)


def _set_texts(task: Task, request: Request) -> None:
    """Have the task read texts as the request says."""
    texts = request.reading
    if texts is None:
        return
    if not task.collator.reads_texts:
        given = "texts=" if request.texts is not None else type(request.training).__name__
        raise ConfigError(
            f"{given} says how a causal language model reads texts, and the task is {task.name!r}; "
            "leave it out"
        )
    task.texts = texts


def _inferred(run: Run, request: Request) -> Posterior:
    """Run the guide's inference; a posterior that met NaN is saved, and is the error's."""
    try:
        run.guide.infer(run)
        run.widen_head()
        with eagerly(run.joint.base):
            check_usable(run.joint, run.guide, run.data, run.args.seed)
        run.conclude()
    except (NonFiniteError, SaveError) as error:
        if error.posterior is not None:
            error.posterior.history = run.history
        if error.posterior is not None and isinstance(error, NonFiniteError):
            _check_kept(error, run)
            try:
                _save(error.posterior, request, run.args)
            except SaveError as unsaved:
                error.add_note(str(unsaved))
        raise
    finally:
        run.joint.rows = run.joint.num_examples  # from now on an example is a row
    posterior: Posterior = run.posterior(run.joint, run.guide)
    posterior.history = run.history
    return posterior


def _check_kept(error: NonFiniteError, run: Run) -> None:
    """Raise an error without a posterior where that of the last good step does not predict."""
    try:
        check_usable(error.posterior.model, run.guide, run.data, run.args.seed, size=MANY)
    except NonFiniteError as unusable:
        raise NonFiniteError(f"{error}. There is no error.posterior: {unusable}") from error


def _digest(data: Prepared) -> dict[str, Any]:
    """Return the entry of a digest of the training data, where they have one."""
    digest = known_digest(data)
    return {} if digest is None else {"data_digest": digest}


def _score(
    joint: JointModel, num_samples: int | None, *, data: Prepared, args: TrainingArguments
) -> dict[str, float]:
    """Return the metrics of draws, always of the same seed, so that epochs compare."""
    factors = draw_factors(joint, num_samples, seed=args.seed)
    with all_processes():
        prediction = predict(joint, data, factors, batch_size=args.per_device_eval_batch_size)
    return evaluate(prediction)


def _save(posterior: Posterior, request: Request, args: TrainingArguments) -> None:
    """Save to the request's folder, if there is one; of several processes the first does."""
    folder = request.output_dir
    if folder is None or not request.saves or not args.should_save:
        return
    try:
        posterior.save(folder)
    except Exception as error:  # tokenizers raise no specific exception for a full disk
        unsaved = SaveError(
            f"the fit is done, and its posterior could not be written to {folder}: {error}; "
            "error.posterior is it (sys.last_value.posterior in a notebook): save it elsewhere"
        )
        unsaved.posterior = posterior
        raise unsaved from error


def _warn_of_source(request: Request) -> None:
    """Warn of what the posterior that the fit starts from does not pass on."""
    source = request.prior if request.given is None else request.given
    if isinstance(source, Posterior) and source.temperature != 1:
        warnings.warn(
            "the posterior that this fit starts from has the temperature "
            f"{source.temperature:.4g}, and the new one has none: call calibrate(...) on it",
            stacklevel=5,
        )
    given = request.given
    succeeds = isinstance(given, Posterior) and given.model.program.previous is not None
    if succeeds and isinstance(request.options, NUTS):
        warnings.warn(
            "the posterior was fitted after an earlier one (prior=), and 'nuts' samples under the "
            "prior of its inner guide, not under that earlier posterior",
            stacklevel=5,
        )
