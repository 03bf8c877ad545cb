"""`fit`: from a model and data to a posterior."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments, set_seed

from pyrolora import defaults
from pyrolora.adapters import (
    Attachment,
    Start,
    as_adapter_config,
    attach,
    check_eager,
    check_in_memory,
    check_uncalled,
    explained_kernels,
    plain_copy,
    start_of,
)
from pyrolora.adapters.config import AdapterConfig
from pyrolora.data import Prepared, prepare, to_device
from pyrolora.data.labels import class_names_of
from pyrolora.errors import ConfigError, NonFiniteError, SaveError
from pyrolora.folder_lock import locked
from pyrolora.guides import MAP, Guide, Variational, as_guide, available, full_name
from pyrolora.inference import (
    Run,
    check_allocation,
    check_arguments,
    training_arguments,
    weight_gradients,
)
from pyrolora.inference.reading import check_reading, explained_pass
from pyrolora.loading import build
from pyrolora.model import JointModel, evaluating
from pyrolora.posterior import Posterior
from pyrolora.predictive import draw_factors, evaluate, predict
from pyrolora.seeding import fitting, seeded
from pyrolora.storage import check_base, describe_base
from pyrolora.tasks import Task, load_network, task_for


@fitting()
def fit(
    model: str | Path | nn.Module | Posterior,
    data: Any,
    guide: str | Guide | None = None,
    *,
    eval_data: Any = None,
    tokenizer: Any = None,
    task: str | None = None,
    adapter: AdapterConfig | Any = None,
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
        A transformers model, a hub id or local folder of one, or any ``nn.Module`` with linear
        layers (then name the ``likelihood``). Its own weights are not changed; one that is named
        gets a head for the classes of ``data``, or, with ``prior``, of the earlier data. Or a
        `Posterior`, such as `from_peft` reads: its means and task head stay as they are, and the
        guide adds their spread (``"montec"``, ``"meanfield"``, ``"lowrank"``, ``"laplace"``; for
        ``"nuts"`` they are what its model is given).
    data
        Training data: ``datasets.Dataset`` or ``DatasetDict`` (split ``train``; its ``validation``
        becomes ``eval_data``), raw text with a tokenizer or tokenised; a torch ``Dataset`` or
        ``DataLoader`` (its data set is taken); a list of dicts; a tuple (inputs, labels). For
        multiple choice a column ``choices`` (a list of texts) beside ``question``, and ``label``,
        the number of the right one (of a network that scores choices: a causal language model
        learns whole texts, and chooses in `Posterior.predict`); texts without labels for a masked
        language model get some tokens hidden, always the same. Labels that are names go by the
        network's, up to case, spaces, '-' and '_'; a network without names takes those of the data
        (`Posterior.classes`). A text that a causal language model learns is ended by EOS; scores
        are of the text itself. Columns that are not read are named in a warning, and what has two
        readings is a `DataError`.
    guide
        A name from ``pyrolora.guides.available()``, two joined as in ``"flat+montec"``, or a guide
        object with its options. None: ``"montec"``, or that of ``prior``.
    eval_data
        Scored every epoch by the predictive mean over draws; where draws come at the end
        (``"laplace"``, ``"nuts"``, ``"ensemble"``), then, too. ``"laplace"`` sets the scale of its
        prior by it, unless told otherwise, and ``rank_allocation="alora"`` judges ranks by it.
    tokenizer
        For raw text and padding; loaded with a model that is given by its name.
    likelihood
        A name from ``pyrolora.tasks.available()``; None: from the model's class.
    adapter
        An `AdapterConfig`, or a ``peft.LoraConfig``.
    prior
        A posterior of the same network from earlier data, which becomes the prior of the latent
        factors:

            q(θ) = argmin −Σ_new log p(y|θ) + β KL(q ‖ q_earlier)

        so that the new data are learnt and the earlier ones are not forgotten, without them. The
        fit starts at the earlier means and scales. What has no prior (the factor that is not
        latent, the task head, the noise of a regression) stays as it is; with ``latent="AB"`` both
        factors move. For ``"montec"``, ``"meanfield"``, ``"lowrank"``, and ``"flat"`` around them,
        with the options of the earlier fit but for the weight of the KL and what is of the training
        alone.
    epochs, learning_rate, batch_size, seed
        Shortcuts into ``training``; the defaults stand in ``pyrolora/defaults.py``. As in the
        Trainer, the seed sets the process's random generators.
    output_dir
        Checkpoints, ten a run, and the posterior at the end, go there. One fit at a time uses it.
    training
        ``transformers.TrainingArguments`` for what the Trainer can do (accumulation, precision,
        schedules, gradient checkpointing, ``resume_from_checkpoint``), in place of the shortcuts:
        its own defaults then hold (a learning rate of 5e-5), and saving is up to you. For
        ``metric_for_best_model`` any metric of `Posterior.evaluate`, or ``"loss"``, which is the
        ``nll``; which way it is better is known. What would do nothing here is refused.
    callbacks
        Trainer callbacks, or one.

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
    SaveError
        When the posterior cannot be written to ``output_dir``; it is the error's ``posterior``.
    """
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        raise ConfigError("fit needs gradients; call it outside of inference_mode and no_grad")
    if isinstance(callbacks, TrainerCallback):
        callbacks = [callbacks]
    given = model if isinstance(model, Posterior) else None
    options = as_guide(_chosen(guide, prior))
    if prior is not None:
        _check_prior(prior, options, given, adapter, task)
    source = prior if given is None else given
    if source is not None and source.temperature != 1:
        warnings.warn(
            "the posterior that this fit starts from has the temperature "
            f"{source.temperature:.4g}, and the new one has none: call calibrate(...) on it",
            stacklevel=3,
        )
    shortcuts = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seed": seed,
        "output_dir": output_dir,
    }
    with _arguments(training, shortcuts) as args:
        set_seed(args.seed)
        base = model if given is None else given.base
        if isinstance(base, nn.Module):
            check_eager(base)
            check_in_memory(base)
        if given is not None:
            _check_post_hoc(given, options, adapter, task, shortcuts, callbacks)
            network = given.base
        else:
            name = task if prior is None else prior.task.name
            like = None if prior is None else prior.base
            network, tokenizer = load_network(model, data, tokenizer, name, like)
        if source is not None:
            config, law = source.bank.config, copy.deepcopy(source.task)
            tokenizer = source.tokenizer if tokenizer is None else tokenizer
        else:
            if options.adapts:
                config = as_adapter_config(adapter)
            else:
                config, network = _without_adapters(options, adapter), _trained_copy(network)
            law = task_for(network, task)
        options.check(law)
        prepared = prepare(data, network, law, tokenizer)
        law.class_names = prepared.names or law.class_names
        if eval_data is None and isinstance(data, dict) and "validation" in data:
            eval_data = data["validation"]
        held_out = None
        if eval_data is not None:
            held_out = prepare(
                eval_data, network, law, tokenizer, splits=defaults.FIT_SPLITS, to_learn=False
            )
        _check_evaluation(args, training, held_out)
        _choose_best(args, law, callbacks)
        assert prepared.labels is not None
        if source is None:
            law.start(prepared.labels)
        modes = {module: module.training for module in network.modules()}
        if source is not None:
            attachment = _attached_as(source, network)
        elif options.adapts:
            attachment = _attached(network, config, law, prepared, args)
        else:
            attachment = Attachment(network, [], [])

        def joint_for(kind: Guide) -> JointModel:
            own = copy.deepcopy(law)
            joint = build(network, attachment, config, kind, own, len(prepared), start)
            if source is not None:
                joint.adopt(source.model)
                joint.freeze()
                joint.program.recentre()
            if given is not None:
                joint.task.load_state_dict(law.state_dict())
                joint.task.requires_grad_(options.post_hoc() == "trained")
            if prior is not None:
                joint.task.requires_grad_(False)
                joint.program.succeed(prior.model.program)
            return joint

        def posterior_of(joint: JointModel, kind: Guide) -> Posterior:
            return Posterior(
                joint, kind, tokenizer=tokenizer, settings=_settings(args), identity=identity
            )

        start: Start | None = None  # what an earlier posterior has, it brings
        try:
            if source is None:
                start = start_of(
                    attachment.layers,
                    attachment.specs,
                    config.init_lora_weights,
                    partial(_gradients, network, attachment, config, law, prepared, args),
                )
            joint = joint_for(options)
            if given is None:
                check_allocation(joint, held_out)
            _check_output(joint, prepared, untrained=source is None)
            if given is not None and list(law.parameters()):
                law.start(prepared.labels, _outputs(joint, prepared, args))
                joint.task.load_state_dict(law.state_dict())
            identity = describe_base(network, attachment.heads, weights=options.adapts)
            run = Run(
                joint,
                options,
                joint_for,
                prepared,
                args,
                callbacks,
                None if held_out is None else partial(_score, data=held_out, args=args),
                held_out,
                posterior_of,
            )
            posterior = posterior_of(joint, options)
            posterior.history = run.history
            options.infer(run)
            run.conclude()
        except NonFiniteError as error:  # its posterior is usable
            error.posterior.history = run.history
            try:
                _save(error.posterior, args, output_dir)
            except SaveError as unsaved:
                error.add_note(str(unsaved))
            raise
        except BaseException:
            attachment.detach()
            for module, mode in modes.items():
                module.training = mode
            raise
        _save(posterior, args, output_dir)
    return posterior


def _chosen(guide: str | Guide | None, prior: Posterior | None) -> str | Guide:
    """The guide; where it is not named, or by its name alone, that of the earlier posterior."""
    if not (prior is None or isinstance(prior, Posterior)):
        raise ConfigError(
            f"prior must be a Posterior of an earlier fit, got {prior!r}; the prior scale of a "
            "guide is an option of the guide, as in MeanField(prior_scale=0.2)"
        )
    if prior is not None and guide in (None, full_name(prior.options)):
        return prior.options
    return "montec" if guide is None else guide


def _check_prior(
    prior: Posterior, options: Guide, given: Posterior | None, adapter: Any, task: str | None
) -> None:
    """An earlier posterior brings adapters, heads and likelihood, and its guide has to be of the
    kind that follows."""
    if given is not None:
        raise ConfigError(
            "with prior= the network is what is fitted, and model= is a Posterior; pass "
            "posterior.base, or leave prior= out for a fit that keeps the means"
        )
    for name, value in {"adapter": adapter, "task": task}.items():
        if value is not None:
            raise ConfigError(f"{name}= comes with the prior; leave it out")
    names = full_name(prior.options), full_name(options)
    if names[0] != names[1] or not options.takes_prior():
        able = ", ".join(n for n in available() if as_guide(n).takes_prior())
        raise ConfigError(
            f"a posterior of {names[0]!r} cannot be the prior of {names[1]!r}: both have to be the "
            f"same one of {able}, or 'flat' around it"
        )
    earlier, later = (getattr(guide, "inner", guide) for guide in (prior.options, options))
    free = {field.name for field in dataclasses.fields(Variational)}
    for field in dataclasses.fields(later):
        values = getattr(earlier, field.name), getattr(later, field.name)
        if field.name not in free and values[0] != values[1]:
            raise ConfigError(
                f"{field.name}={values[1]!r}, and in the prior it is {values[0]!r}; it has to be "
                "the same"
            )


def _attached_as(source: Posterior, network: nn.Module) -> Attachment:
    """The layers and heads of that posterior in its own network, or in one with the same weights
    and the same names of classes."""
    attachment = source.model.attachment
    if network is source.base:
        return attachment.again()
    heads = list(attachment.heads)
    check_base(network, heads, source.identity)
    law = source.task
    names, known = class_names_of(network, law), class_names_of(source.base, law)
    if names and known and names != known:
        raise ConfigError(
            f"the network's classes are {list(names.values())}, and those of the earlier fit "
            f"{list(known.values())}; load it with id2label={known}"
        )
    return Attachment(network, attachment.specs, heads)


def _attached(
    network: nn.Module,
    config: AdapterConfig,
    law: Task,
    data: Prepared,
    args: TrainingArguments,
) -> Attachment:
    """The adapters that ``config`` asks for, without layers that the network does not call: of two
    examples, or, as long as one is left that could have its turn, of the first so many."""
    attachment = attach(network, config)
    try:
        with seeded(args.seed):  # the numbers that a start draws are those of a later one
            joint = build(network, attachment, config, MAP(), copy.deepcopy(law), len(data))
        device = next(joint.parameters()).device
        pieces = ((0, 2), (2, defaults.CALL_EXAMPLES))
        examples = ([data.examples[i] for i in range(a, min(b, len(data)))] for a, b in pieces)
        batches = (to_device(data.collate(some), device) for some in examples if some)
        first = next(batches)
        with explained_kernels(attachment), explained_pass(network, first):
            left = joint.uncalled(chain([first], batches))
        found = attachment
        if left:
            check_uncalled(config, left, [spec.name for spec in attachment.specs])
            found = attachment.without(left)
            attachment.detach()
        found.checked = True
        return found
    except BaseException:
        attachment.detach()
        raise


def _without_adapters(options: Guide, adapter: Any) -> AdapterConfig:
    if adapter is not None:
        raise ConfigError(
            f"guide {options.name!r} trains the network itself and has no adapters; leave "
            "adapter= out"
        )
    return AdapterConfig()


def _trained_copy(network: nn.Module) -> nn.Module:
    if getattr(network, "is_quantized", False):
        raise ConfigError(
            f"this {type(network).__name__} is quantised, and its weights take no gradient; load "
            "it without a quantisation_config, or choose a guide with adapters"
        )
    copied = plain_copy(network)
    if not any(parameter.requires_grad for parameter in copied.parameters()):
        raise ConfigError(
            f"no weight of this {type(network).__name__} takes a gradient, and full fine-tuning "
            "trains those that do; call model.requires_grad_(True)"
        )
    return copied


def _check_post_hoc(
    given: Posterior,
    options: Guide,
    adapter: Any,
    task: str | None,
    shortcuts: Mapping[str, Any],
    callbacks: Sequence[TrainerCallback],
) -> None:
    """A posterior brings its means, its adapters and its likelihood; the guide adds a spread."""
    how = options.post_hoc()
    if how is None:
        able = ", ".join(n for n in available() if as_guide(n).post_hoc() is not None)
        raise ConfigError(
            f"guide {full_name(options)!r} has nothing to infer when the adapter is given; choose "
            f"one of {able}, or fit the network anew"
        )
    if not given.bank.specs:
        raise ConfigError(
            "full fine-tuning leaves no adapter to infer the spread of; fit the network "
            "posterior.base with a guide of your choice"
        )
    if given.model.program.members > 1:
        raise ConfigError(
            "an ensemble has no adapter of its own to give; export a member with to_peft(path, "
            "draw=k) and read it with from_peft"
        )
    for name, value in {"adapter": adapter, "task": task}.items():
        if value is not None:
            raise ConfigError(f"{name}= comes with the posterior; leave it out")
    trained = {name: shortcuts[name] for name in ("epochs", "learning_rate")}
    useless = [name for name, value in {**trained, "callbacks": callbacks}.items() if value]
    if how == "computed" and useless:
        raise ConfigError(
            f"guide {options.name!r} trains nothing when the adapter is given; leave "
            f"{', '.join(useless)} out"
        )


def _save(posterior: Posterior, args: TrainingArguments, output_dir: str | Path | None) -> None:
    if output_dir is None or not args.should_save:  # of several processes the first
        return
    try:
        posterior.save(output_dir)
    except Exception as error:  # tokenizers have no kind of their own for a full disk
        unsaved = SaveError(
            f"the fit is done, and its posterior could not be written to {output_dir}: {error}; "
            "error.posterior is it (sys.last_value.posterior in a notebook): save it elsewhere"
        )
        unsaved.posterior = posterior
        raise unsaved from error


def _gradients(
    network: nn.Module,
    attachment: Attachment,
    config: AdapterConfig,
    law: Task,
    data: Prepared,
    args: TrainingArguments,
) -> dict[str, Tensor]:
    """The gradient of each adapted layer's weight on one batch, of examples that the seed chose."""
    joint = build(network, attachment, config, MAP(), copy.deepcopy(law), len(data))
    _check_output(joint, data)
    joint.to(args.device)
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(data), generator=generator)[: args.per_device_train_batch_size]
    (batch,) = data.loader(len(order), order.tolist())
    return weight_gradients(joint, to_device(batch, args.device))


@torch.no_grad()
def _check_output(joint: JointModel, data: Prepared, *, untrained: bool = False) -> None:
    """One pass with two examples: the network runs, calls its adapted layers, fits the labels, and
    can be trained from where it starts."""
    assert data.labels is not None
    examples = [data.examples[i] for i in range(min(2, len(data)))]
    batch = to_device(data.collate(examples), next(joint.parameters()).device)
    with evaluating(joint):
        with explained_pass(joint.base, batch):
            output = joint.network(batch, joint.program.mean())
        joint.task.check_output(output, data.labels)
        check_reading(joint, batch, output)
        if untrained:
            joint.task.check_start(output, data.labels)


@torch.no_grad()
def _outputs(joint: JointModel, data: Prepared, args: TrainingArguments) -> Tensor:
    """What the mean adapter gives for all training examples."""
    joint.to(args.device)
    with evaluating(joint):
        outputs = [
            joint.network(to_device(batch, args.device), joint.program.bank.means())
            for batch in data.loader(args.per_device_train_batch_size)
        ]
    return torch.cat(outputs).cpu()


def _score(
    joint: JointModel, num_samples: int | None, *, data: Prepared, args: TrainingArguments
) -> dict[str, float]:
    """Metrics, always from draws of the same seed, so that epochs compare."""
    factors = draw_factors(joint, num_samples, seed=args.seed)
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
        check_arguments(training)
        args = copy.copy(training)
        args.remove_unused_columns = False
        args.label_names = ["labels"]
        if not torch.accelerator.is_available():
            args.dataloader_pin_memory = False  # torch would warn that it cannot
        writes = args.save_strategy != "no" or bool(args.resume_from_checkpoint)
        with locked(args.output_dir) if writes and args.should_save else nullcontext():
            yield args
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.pop("output_dir", None)
        args = training_arguments(folder or scratch, save=folder is not None, **given)
        # The folder is made now, not when there is something to lose.
        with nullcontext() if folder is None or not args.should_save else locked(folder):
            yield args


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


def _choose_best(args: TrainingArguments, law: Task, callbacks: Sequence[TrainerCallback]) -> None:
    """Set which way the metric of the best model is better, which the Trainer cannot know: it takes
    all but the loss to be better the higher."""
    metric = args.metric_for_best_model
    stopping = any(isinstance(callback, EarlyStoppingCallback) for callback in callbacks)
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
    known = {"loss": False, **law.prediction.higher_is_better}
    name = metric.removeprefix("eval_")
    higher = known.get(name)
    if higher is None:
        able = ", ".join(n for n, way in known.items() if way is not None)
        raise ConfigError(f"metric_for_best_model={metric!r} is none of {able}; choose one of them")
    usual = not metric.endswith("loss")  # what TrainingArguments makes of no value at all
    if args.greater_is_better not in (usual, higher):
        raise ConfigError(
            f"greater_is_better={args.greater_is_better}, and the best model has the "
            f"{'highest' if higher else 'lowest'} {name!r}; leave it out"
        )
    args.greater_is_better = higher
    if args.lr_scheduler_type == "reduce_lr_on_plateau":
        mode = "max" if higher else "min"
        args.lr_scheduler_kwargs = {"mode": mode, **(args.lr_scheduler_kwargs or {})}


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
