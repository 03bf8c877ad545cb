"""``pyrolora fit``."""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyrolora import defaults
from pyrolora.cli import settings
from pyrolora.cli.columns import label_names, labelled
from pyrolora.cli.fingerprint import fingerprint, place, sizes_of_files
from pyrolora.cli.fitted import fitted
from pyrolora.cli.hidden import hidden_arguments
from pyrolora.cli.imported import again
from pyrolora.cli.output import metrics_table, print_json, say, tell
from pyrolora.cli.readers import KINDS
from pyrolora.cli.runs import Run
from pyrolora.errors import ConfigError

if TYPE_CHECKING:
    from pyrolora.fitting import Request


def fit(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Argument(
            help=f"Training data: a file ({KINDS}), a folder of save_to_disk, or a "
            "name, or name:config, on the hub."
        ),
    ],
    model: Annotated[
        str, typer.Option(help="The network to adapt: a hub id, or a folder with its weights.")
    ],
    output_dir: Annotated[Path, typer.Option(help="The run's folder.")],
    guide: Annotated[
        str | None,
        typer.Option(
            help="How to infer the posterior: {guides} (map is plain LoRA; full trains every "
            "weight); flat around another one: flat+montec. Some hold a tenth of the "
            "examples back, to choose by; --set guide.hold_back=0: none.",
            show_default="montec, or that of --prior",
        ),
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(
            help="Data to score after every epoch and at the end; laplace tunes its prior on it."
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="What is predicted: one of the tasks above.",
            show_default="what model and data call for",
        ),
    ] = None,
    choices: Annotated[
        str | None,
        typer.Option(
            help="How a causal language model chooses from a column 'choices': letters, texts or "
            "texts-per-token."
        ),
    ] = None,
    given: Annotated[
        Path | None,
        typer.Option(
            help="A trained adapter: a folder of PEFT, or of a fit. Its weights stay, and the "
            "guide ({post_hoc}) adds their spread."
        ),
    ] = None,
    prior: Annotated[
        Path | None,
        typer.Option(
            help="The folder of an earlier fit ({priors}) of the model: its posterior is the prior "
            "of this fit, whose guide is the same."
        ),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="Passes over the data.", show_default=f"{defaults.EPOCHS:g}"),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Learning rate of the adapters' means and of the head.",
            show_default=f"{defaults.LEARNING_RATE:g}",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Examples per step and device.")
    ] = defaults.BATCH_SIZE,
    seed: Annotated[
        int,
        typer.Option(min=0, max=defaults.MAX_SEED, help="Seed of every random number of the fit."),
    ] = defaults.SEED,
    text: Annotated[
        list[str] | None,
        typer.Option(help="The column with the text; twice for a pair of texts."),
    ] = None,
    label: Annotated[str | None, typer.Option(help="The column with the target.")] = None,
    split: Annotated[
        str | None, typer.Option(help="The split of the data; otherwise train.")
    ] = None,
    eval_split: Annotated[
        str | None,
        typer.Option(help="The split of the evaluation data; otherwise validation, or test."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PART.OPTION=VALUE",
            help="Any other option, by its name in Python: guide.kl_weight=0.1, adapter.r=4, "
            "texts.max_length=512, training.warmup_steps=10 (of transformers' "
            "TrainingArguments). May be repeated.",
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

    \b
    The columns say what is learnt, if --task does not:
    text, label                    a class (a number or a name), or a real number
    text, labels                   several classes: a list
    tokens, ner_tags               a tag per word
    question, choices, label       the right one (a language model: --choices)
    question, context, answers     the place of the answer in the context
    chosen, rejected               which text is preferred
    source, target                 a text that is written for another
    messages; prompt, completion   chats and completions of a language model
    image or audio, label          a class of a picture or a sound, by its file

    \b
    Tasks:
    {tasks}

    In a CSV or TSV file lists and objects are cells of JSON. The run's folder then holds
    run.json (the command, every option, digests of the data, versions) and the posterior. A
    run that was killed goes on from its last checkpoint when the same command is given again.
    """
    if eval_split is not None and eval_data is None:
        raise ConfigError(
            f"--eval-split {eval_split} is a split of --eval-data, and there are none; name them "
            f"(the same as the training data, if that is meant: --eval-data {data})"
        )
    set_options = settings.parse(set_ or [])
    columns: dict[str, Any] = {"text": text or [], "label": label}
    names = set().union(*(Run(folder).classes() for folder in (given, prior) if folder))
    examples = labelled(data, split, ("train",), **columns, names=names)
    held_out = None
    if eval_data is not None:
        names |= label_names(examples)
        held_out = labelled(eval_data, eval_split, defaults.FIT_SPLITS, **columns, names=names)
    say("loading libraries")
    from pyrolora.fitting import Request, StoredPosterior, arguments_of
    from pyrolora.guides import full_name
    from pyrolora.processes import all_processes
    from pyrolora.tasks import choice_task

    request = _with_settings(
        Request(
            model=place(model),
            data=examples,
            guide=guide,
            eval_data=held_out,
            task=choice_task(choices, task),
            given=None if given is None else StoredPosterior(given),
            prior=None if prior is None else StoredPosterior(prior),
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
            output_dir=output_dir,
            saves=False,
        ),
        set_options,
    )
    request.check()
    writes = arguments_of(request).should_save  # of several processes the first one does
    record = {
        **request.record(),
        "data": place(data),
        "data_digest": fingerprint(data, examples),
        "split": split,
        "eval_data": None if eval_data is None else place(eval_data),
        "eval_data_digest": None if eval_data is None else fingerprint(eval_data, held_out),
        "eval_split": eval_split,
        "columns": columns,
        "model_files": sizes_of_files(model),
    }
    run = Run(output_dir)
    command = shlex.join(["pyrolora", *hidden_arguments(context.obj)])
    with run.locked() if writes else nullcontext():
        known = run.start(record, command, write=writes)
        result = run.result
        if result is None:
            posterior, result = fitted(run, request, resume=known, writes=writes)
            if held_out is not None:
                with all_processes():
                    result["metrics"] = posterior.evaluate(held_out, seed=seed)
            if not writes:
                return
            run.save(posterior, result)
        else:
            if writes:
                run.tidy()  # the process may have ended between the result and this
            say(f"{output_dir} holds this fit already, finished; another --output-dir fits it anew")
    if json:
        print_json({"output_dir": str(output_dir), **result})
    else:
        _tell(output_dir, full_name(request.options), result, again(context))


def _with_settings(request: Request, values: dict[str, dict[str, Any]]) -> Request:
    """Return the request with the options of ``--set``."""
    from pyrolora.adapters.config import AdapterConfig
    from pyrolora.data import TextOptions

    settings.check_training(values["training"])
    adapter, texts = None, None
    if values["texts"]:
        texts = settings.build(TextOptions, "texts", values["texts"])
    if values["adapter"]:
        adapter = settings.build(AdapterConfig, "adapter", values["adapter"])
    guide = request.guide
    if values["guide"]:
        guide = settings.refined(request.options, values["guide"])
    return replace(
        request,
        guide=guide,
        adapter=adapter,
        texts=texts,
        training_options=values["training"],
    )


def _tell(folder: Path, guide: str, result: dict[str, Any], command: str) -> None:
    if result.get("metrics"):
        metrics_table({guide: result["metrics"]})
    if held_back := result.get("held_back"):
        width = f"the width {result['width']:.3g} and " if "width" in result else ""
        tell(
            f"{held_back} of {result['num_examples'] + held_back} examples were held back, and "
            f"chose {width}the temperature {result['temperature']:.3g}."
        )
    name = shlex.quote(str(folder))
    tell(f"The posterior is in {folder}. Next:")
    tell(f"  {command} evaluate {name} TEST_DATA")
    tell(f"  {command} predict {name} DATA --output predictions.csv")
