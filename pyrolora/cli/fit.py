"""``pyrolora fit``."""

from __future__ import annotations

import dataclasses
import shlex
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyrolora import defaults
from pyrolora.cli import settings
from pyrolora.cli.files import KINDS, fingerprint, label_names, labelled
from pyrolora.cli.hidden import hidden_arguments
from pyrolora.cli.output import metrics_table, print_json, program, say, tell
from pyrolora.cli.runs import LAST_GOOD, Run
from pyrolora.errors import ConfigError, NonFiniteError, PyroLoraError

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from pyrolora.posterior import Posterior


def fit(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Argument(
            help=f"Training data: a file ({KINDS}), a folder written by save_to_disk, or the "
            "name, or name:config, of a data set on the hub."
        ),
    ],
    model: Annotated[
        str, typer.Option(help="The network to adapt: a hub id, or a folder with its weights.")
    ],
    output_dir: Annotated[Path, typer.Option(help="The run's folder.")],
    guide: Annotated[
        str | None,
        typer.Option(
            help="How to infer the posterior: map (plain LoRA), montec (MonteCLoRA), meanfield, "
            "lowrank, laplace, tfb, swag, ensemble, dropout, nuts, flat (Flat-LoRA), or full "
            "(every weight, no adapter); flat around another one: flat+montec.",
            show_default="montec, or that of --prior",
        ),
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(
            help="Data to score after every epoch and at the end; laplace sets its prior by it."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="classification, regression, text-generation, multiple-choice, fill-mask or "
            "token-classification; otherwise "
            "from the model."
        ),
    ] = None,
    given: Annotated[
        Path | None,
        typer.Option(
            help="An adapter that is trained already: a folder that PEFT saved, or that of a fit. "
            "Its weights stay, and the guide (montec, meanfield, lowrank, laplace, nuts) adds "
            "their spread."
        ),
    ] = None,
    prior: Annotated[
        Path | None,
        typer.Option(
            help="The folder of an earlier fit of the same model (montec, meanfield, lowrank): its "
            "posterior is the prior here, so that the new data are learnt and the earlier ones not "
            "forgotten. The guide is that of the earlier fit."
        ),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = defaults.EPOCHS,
    learning_rate: Annotated[
        float, typer.Option(help="Of the adapters' means and the head.")
    ] = defaults.LEARNING_RATE,
    batch_size: Annotated[
        int, typer.Option(help="Examples a step and device.")
    ] = defaults.BATCH_SIZE,
    seed: Annotated[
        int, typer.Option(min=0, max=defaults.MAX_SEED, help="Of every random number of the fit.")
    ] = defaults.SEED,
    text: Annotated[
        list[str] | None,
        typer.Option(help="The column with the text; twice for a pair of texts."),
    ] = None,
    label: Annotated[str | None, typer.Option(help="The column with the target.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Which split of data that has several; otherwise train.")
    ] = None,
    eval_split: Annotated[
        str | None,
        typer.Option(help="Which split of the evaluation data; otherwise validation, or test."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PART.OPTION=VALUE",
            help="Any other option, as in Python: guide.kl_weight=0.1, adapter.r=4, "
            "adapter.rank_allocation=snr, training.gradient_accumulation_steps=2 "
            "(transformers.TrainingArguments). Repeatable.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Infer the posterior of a model's low-rank adapters.

    \b
    pyrolora fit train.jsonl --model FOLDER --output-dir run
    pyrolora fit pairs.csv --text premise --text claim --label verdict \\
        --model roberta-base --output-dir run --set guide.kl_weight=0.1
    pyrolora fit train.jsonl --model FOLDER --given ADAPTER --guide laplace --output-dir run
    pyrolora fit later.jsonl --model FOLDER --prior run --output-dir run-2

    Labels may be numbers (classes from 0 on, or real values for a regression) or
    names of classes. The run's folder then holds run.json (the command, every
    option, digests of the data, versions) and the posterior, for pyrolora.load,
    predict, evaluate and export. A run that was killed goes on from its last
    checkpoint when the same command is given again.
    """
    chosen = settings.parse(set_ or [])
    columns: dict[str, Any] = {"text": text or [], "label": label}
    names = set().union(*(Run(folder).classes() for folder in (given, prior) if folder))
    examples = labelled(data, split, ("train",), **columns, names=names)
    held_out = None
    if eval_data is not None:
        names |= label_names(examples)
        held_out = labelled(eval_data, eval_split, defaults.FIT_SPLITS, **columns, names=names)
        chosen["training"].setdefault("eval_strategy", "epoch")
    for name, folder in {"--given": given, "--prior": prior}.items():
        if folder is not None:
            _check_source(name, folder, chosen)
    options, config, training = _built(
        chosen, guide, prior, output_dir, epochs, learning_rate, batch_size, seed
    )
    if given is not None:
        _check_given(context, options)
    if chosen["adapter"] and not options.adapts:
        raise ConfigError(f"--set adapter: guide {options.name!r} has no adapters; leave it out")
    from pyrolora.guides import full_name

    new_adapters = options.adapts and given is None and prior is None
    record = {
        "data": _place(data),
        "data_digest": fingerprint(data, examples),
        "split": split,
        "eval_data": None if eval_data is None else _place(eval_data),
        "eval_data_digest": None if eval_data is None else fingerprint(eval_data, held_out),
        "eval_split": eval_split,
        "columns": columns,
        "model": _place(model),
        "model_files": _files(model),
        "given": None if given is None else _place(str(given)),
        "prior": None if prior is None else _place(str(prior)),
        "guide": {"name": full_name(options), **dataclasses.asdict(options)},
        "adapter": dataclasses.asdict(config) if new_adapters else None,
        "task": task,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seed": seed,
        "training": chosen["training"],
    }
    run = Run(output_dir)
    command = shlex.join(["pyrolora", *hidden_arguments(context.obj)])
    with run.locked() if training.should_save else nullcontext():
        known = run.start(record, command, write=training.should_save)
        result = run.result
        if result is None:
            posterior, result = _fitted(
                run,
                known,
                training,
                _place(model),
                examples,
                options,
                held_out,
                task,
                config if new_adapters else None,
                given,
                prior,
            )
            if not training.should_save:  # of several processes the first goes on
                return
            if held_out is not None:
                result["metrics"] = posterior.evaluate(held_out, seed=seed)
            posterior.save(output_dir)
            run.finish(result)
        else:
            say(f"{output_dir} holds this fit already, finished; another --output-dir fits it anew")
    if json:
        print_json({"output_dir": str(output_dir), **result})
    else:
        _tell(output_dir, full_name(options), result)


def _built(
    chosen: dict[str, dict[str, Any]],
    guide: str | None,
    prior: Path | None,
    output_dir: Path,
    epochs: float,
    learning_rate: float,
    batch_size: int,
    seed: int,
) -> tuple[Any, Any, TrainingArguments]:
    """The guide, the adapters and the Trainer's arguments, from options."""
    say("loading libraries")
    from pyrolora.adapters.config import AdapterConfig
    from pyrolora.inference import training_arguments

    options = settings.refined(_guide(guide, prior), chosen["guide"])
    config = settings.build(AdapterConfig, "adapter", chosen["adapter"])
    settings.check_training(chosen["training"])
    try:
        training = training_arguments(
            output_dir,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
            **chosen["training"],
        )
    except PyroLoraError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"--set training: {error}") from error
    return options, config, training


def _guide(name: str | None, prior: Path | None) -> Any:
    """The guide of that name; of an earlier fit with its options."""
    from pyrolora.guides import as_guide, full_name
    from pyrolora.storage import read_description

    if prior is not None:
        earlier = read_description(prior).guide
        if name in (None, full_name(earlier)):
            return earlier
    return as_guide("montec" if name is None else name)


def _place(name: str) -> str:
    """A path as it holds from every folder; a name as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def _files(model: str) -> dict[str, int]:
    """The sizes of a model's files: another model in the same folder is noticed."""
    if not Path(model).is_dir():
        return {}
    return {item.name: item.stat().st_size for item in sorted(Path(model).iterdir())}


def _fitted(
    run: Run,
    known: bool,
    training: TrainingArguments,
    model: str,
    examples: Any,
    options: Any,
    held_out: Any,
    task: str | None,
    config: Any,
    given: Path | None,
    prior: Path | None,
) -> tuple[Posterior, dict[str, Any]]:
    """The posterior, fitted from the beginning or from the last checkpoint, and what to note."""
    from pyrolora.fitting import fit as infer
    from pyrolora.guides import full_name
    from pyrolora.inference import checkpoint_step, member_folders, newest_whole

    checkpoint, note = newest_whole(run.folder) if known else (None, None)
    step = 0
    if note is not None:
        say(f"note: {note}")
    if checkpoint is not None:
        step = checkpoint_step(checkpoint)
        say(f"going on from step {step}, {checkpoint}")
        training.resume_from_checkpoint = str(checkpoint)
    elif known and member_folders(run.folder):
        say(f"going on with the members in {run.folder}")
        training.resume_from_checkpoint = True
    source: Any = model
    earlier = None
    if given is not None:
        source, task = _given(given, model, examples, task), None
    if prior is not None:
        earlier = _given(prior, model, examples, task)
        source, task = earlier.base, None
    started = time.perf_counter()
    try:
        posterior = infer(
            source,
            examples,
            options,
            eval_data=held_out,
            task=task,
            adapter=config,
            prior=earlier,
            training=training,
        )
    except NonFiniteError as error:
        error.posterior.save(run.folder / LAST_GOOD)
        message = str(error).replace("error.posterior", str(run.folder / LAST_GOOD))
        raise NonFiniteError(message) from error
    except KeyboardInterrupt:
        if newest_whole(run.folder)[0] or member_folders(run.folder):
            say(f"the same command goes on from the last checkpoint in {run.folder}")
        else:
            say(f"there is no checkpoint in {run.folder} yet; the same command starts anew")
        raise
    except Exception:
        if training.should_save:
            run.abandon()
        raise
    return posterior, {
        "guide": full_name(options),
        "num_examples": posterior.model.num_examples,
        "layers": len(posterior.bank.specs),
        "seconds": round(time.perf_counter() - started, 1),
        "resumed_from_step": step,
    }


def _given(folder: Path, model: str, examples: Any, task: str | None) -> Posterior:
    """The posterior whose adapter is given. A saved one knows its classes; those of PEFT's adapter
    are taken to be the data's."""
    from pyrolora.loading import from_peft, load
    from pyrolora.storage import PEFT_FILE
    from pyrolora.tasks import load_network

    if not (folder / PEFT_FILE).is_file():
        return load(folder, model)
    network, tokenizer = load_network(model, examples, task=task)
    return from_peft(folder, network, task=task, tokenizer=tokenizer)


def _check_source(name: str, folder: Path, chosen: dict[str, dict[str, Any]]) -> None:
    if not folder.is_dir():
        raise ConfigError(f"{name}: there is no folder {str(folder)!r}")
    if chosen["adapter"]:
        raise ConfigError(f"--set adapter: the adapter is that of {name}; leave one of them out")


def _check_given(context: typer.Context, options: Any) -> None:
    if options.post_hoc() == "computed":
        for name in ("epochs", "learning_rate"):
            source: Any = context.get_parameter_source(name)
            if source.name == "COMMANDLINE":
                raise ConfigError(
                    f"--{name.replace('_', '-')}: guide {options.name!r} trains nothing when the "
                    "adapter is --given; leave it out"
                )


def _tell(folder: Path, guide: str, result: dict[str, Any]) -> None:
    if result.get("metrics"):
        metrics_table({guide: result["metrics"]})
    name = shlex.quote(str(folder))
    tell(f"The posterior is in {folder}. Next:")
    tell(f"  {program()} evaluate {name} TEST_DATA")
    tell(f"  {program()} predict {name} DATA --output predictions.csv")
