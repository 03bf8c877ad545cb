"""``pyrolora generate``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyrolora import defaults
from pyrolora.cli import posteriors
from pyrolora.cli.output import metrics_table, say, tell
from pyrolora.cli.readers import KINDS
from pyrolora.errors import ConfigError, DataError
from pyrolora.files import write_whole

if TYPE_CHECKING:
    from pyrolora.predictive import Generation, SemanticEntropy

WRITTEN = (
    *("agreement", "continuations"),
    *("semantic_entropy", "semantic_aleatoric", "semantic_epistemic"),
)
"""The columns that the output has beside those of the data."""


def generate(
    run: posteriors.Folder,
    prompts: Annotated[str, typer.Argument(help=f"Prompts: a file ({KINDS}), folder or name.")],
    output: Annotated[
        Path | None, typer.Option(help="A .jsonl file; otherwise the lines are printed.")
    ] = None,
    num_samples: Annotated[
        int | None,
        typer.Option(
            help="Draws that write; 0: the mean adapter alone; otherwise 8, or every "
            "member of an ensemble."
        ),
    ] = None,
    draws: posteriors.Draws = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most tokens of a continuation; otherwise what the network's settings say, or "
            f"{defaults.MAX_NEW_TOKENS}.",
        ),
    ] = None,
    do_sample: Annotated[
        bool, typer.Option("--do-sample", help="Sample tokens; otherwise take the likeliest.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(help="Temperature of sampled tokens (with --do-sample).")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Sample from the likeliest tokens with this probability."),
    ] = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams per draw.")] = 1,
    num_return_sequences: Annotated[int, typer.Option(min=1, help="Continuations per draw.")] = 1,
    stop_string: Annotated[
        list[str] | None,
        typer.Option(help="A text that ends a continuation. May be repeated."),
    ] = None,
    seed: posteriors.Seed = defaults.SEED,
    text: posteriors.Text = None,
    split: posteriors.Split = None,
    model: posteriors.Model = None,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Add every token with its uncertainty.")
    ] = False,
    entailment: Annotated[
        str | None,
        typer.Option(
            help="A model of natural language inference, by its folder or name: adds the semantic "
            "entropy of each prompt, and the meaning of each continuation."
        ),
    ] = None,
    p_true: Annotated[
        bool,
        typer.Option("--p-true", help="Add the probability that each continuation is true."),
    ] = False,
    correct: Annotated[
        str | None,
        typer.Option(
            help="The column with the right answer: prints how well the uncertainties tell wrong "
            "answers from right ones (with --output)."
        ),
    ] = None,
) -> None:
    """Continue prompts: every draw of the posterior writes its own continuation.

    \b
    pyrolora generate run prompts.txt --max-new-tokens 20
    pyrolora generate run prompts.jsonl --output out.jsonl --do-sample --temperature 0.8
    pyrolora generate run chats.jsonl --stop-string $'\\n\\n'

    Prompts are the only column of texts, or, as in a fit, chats ("messages"), "prompt",
    "question", "instruction" and "input", ...

    --entailment, --p-true and --correct ask what the answers mean and whether they are right.

    Writes one line of JSON per prompt: the columns of the data, "agreement" (0 to 1,
    how similar the texts of the draws are) and "continuations": text, nll, entropy,
    aleatoric and epistemic, in nats per token, under all draws.
    """
    numbers = posteriors.draw_numbers(draws, num_samples=num_samples)
    if (temperature is not None or top_p is not None) and not do_sample:
        raise ConfigError("--temperature and --top-p are for sampled tokens; add --do-sample")
    if num_return_sequences > num_beams and not (do_sample and num_beams == 1):
        raise ConfigError("--num-return-sequences needs --do-sample, or as many --num-beams")
    if output is not None and output.suffix.lower() != ".jsonl":
        raise ConfigError(f"the output is JSON lines; name it .jsonl, got {output}")
    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"there is no folder {output.parent} to write {output.name} to")
    if correct is not None and output is None:
        raise ConfigError("--correct prints scores, so that the lines need a file; add --output")
    original, inputs = posteriors.unlabelled(run, prompts, split, text)
    rows = original.to_list()
    if correct is not None:
        from pyrolora.predictive.answers import judge

        judge(correct, rows)
        inputs = inputs.remove_columns([n for n in inputs.column_names if n == correct])
    clash = [name for name in original.column_names if name in WRITTEN]
    if clash:
        raise DataError(f"{prompts} has columns that the output has too, {clash}; rename them")
    posterior = posteriors.load(run, model)
    if posterior.task.as_text() is None:
        raise ConfigError(
            f"the posterior in {run} is of the task {posterior.task.name!r}, which writes no text; "
            "'pyrolora predict' has its answers"
        )
    same = None
    if entailment is not None:
        from pyrolora.predictive import Entailment

        same = Entailment(entailment)
    texts = _prompts(inputs, prompts, apart=posterior.task.writes == "apart")
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "stop_strings": stop_string,
    }
    generation = posterior.generate(
        texts,
        num_samples,
        draws=numbers,
        seed=seed,
        do_sample=do_sample,
        num_beams=num_beams,
        num_return_sequences=num_return_sequences,
        **{name: value for name, value in options.items() if value is not None},
    )
    semantic = None if same is None else generation.semantic_entropy(same)
    truth = None
    if p_true:
        if num_samples is None and numbers is None:
            num_samples = len(generation.log_likelihood)
        truth = posterior.p_true(
            generation, num_samples, draws=numbers, seed=None if numbers else seed
        )
    found = _rows(rows, generation, tokens)
    lines = [json.dumps(row, default=str) for row in _with_meanings(found, semantic, truth)]
    if output is None:
        sys.stdout.writelines(f"{line}\n" for line in lines)
    else:
        write_whole(output, "".join(f"{line}\n" for line in lines).encode())
        say(f"continuations of {len(lines)} prompts are in {output}")
    if correct is not None:
        from pyrolora.predictive import scored_answers

        scored = scored_answers(generation, rows, correct, semantic=semantic, p_true=truth)
        tell(f"{scored.accuracy:.3f} ± {scored.accuracy_se:.3f} of the answers are right.")
        metrics_table(scored.metrics.T.to_dict(orient="index"))


def _prompts(inputs: Any, source: str, *, apart: bool) -> Any:
    """Return the texts to continue, or the rows that have chats, pictures, or prompts in parts.

    ``apart`` says that the answers are texts of their own, which a decoder writes.
    """
    from pyrolora.data.chats.dialogues import prompt_of
    from pyrolora.data.media.illustrated import Illustrator
    from pyrolora.data.pairs import joined_texts, source_of

    if Illustrator.column_of(inputs) is not None:
        return inputs
    if apart:
        names = source_of(inputs)
        texts, read = joined_texts(inputs, names), " and ".join(map(repr, names))
    else:
        dialogue = prompt_of(inputs)
        if dialogue.kind != "text":
            return inputs
        texts, read = inputs[dialogue.prompt[0]][:], str(dialogue)
    if any(not isinstance(text, str) or not text for text in texts):
        raise DataError(f"{source} has empty prompts in {read}; fill or remove them")
    return texts


def _rows(
    original: list[dict[str, Any]], generation: Generation, tokens: bool
) -> Iterator[dict[str, Any]]:
    """Yield one object per prompt."""
    table = generation.to_pandas().drop(columns="agreement")
    for i, (row, agreement) in enumerate(zip(original, generation.agreement.tolist(), strict=True)):
        texts = table[table["prompt"] == i].drop(columns="prompt").to_dict(orient="records")
        if tokens:
            for k, continuation in enumerate(texts):
                continuation["tokens"] = _tokens(generation, i, k)
        yield {
            **row,
            "agreement": agreement if agreement == agreement else None,  # JSON has no NaN
            "continuations": texts,
        }


def _with_meanings(
    rows: Iterator[dict[str, Any]], semantic: SemanticEntropy | None, truth: Any
) -> Iterator[dict[str, Any]]:
    """Yield the rows with the semantic entropy of each, and p_true of its continuations."""
    for i, row in enumerate(rows):
        for k, continuation in enumerate(row["continuations"]):
            if semantic is not None:
                continuation["meaning"] = int(semantic.clusters[i, k])
            if truth is not None:
                continuation["p_true"] = float(truth[:, i, k].mean())
        if semantic is not None:
            row["semantic_entropy"] = float(semantic.entropy[i])
            row["semantic_aleatoric"] = float(semantic.aleatoric[i])
            row["semantic_epistemic"] = float(semantic.epistemic[i])
        yield row


def _tokens(generation: Generation, i: int, k: int) -> list[dict[str, Any]]:
    assert generation.tokens is not None
    entropy, epistemic = generation.entropy[i, k], generation.epistemic[i, k]
    numbers = zip(generation.tokens[i][k], entropy, epistemic, strict=False)
    return [{"token": t, "entropy": float(h), "epistemic": float(m)} for t, h, m in numbers]
