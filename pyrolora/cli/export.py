"""``pyrolora export``."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyrolora import defaults
from pyrolora.cli import posteriors
from pyrolora.cli.output import print_json, tell
from pyrolora.errors import ConfigError
from pyrolora.files import replacing_folder, write_whole, writing
from pyrolora.serving.vllm import TOP_LOGPROBS

if TYPE_CHECKING:
    from pyrolora.posterior import Posterior


class Format(StrEnum):
    """Forms of an export."""

    TRANSFORMERS = "transformers"
    ARVIZ = "arviz"
    PEFT = "peft"
    VLLM = "vllm"

    @property
    def takes(self) -> tuple[str, ...]:
        """The options that act on this form."""
        return {
            Format.TRANSFORMERS: ("draw",),
            Format.ARVIZ: ("num_samples", "draws", "seed"),
            Format.PEFT: ("draw", "draws", "uniform"),
            Format.VLLM: ("draws",),
        }[self]


def export(
    run: posteriors.Folder,
    path: Annotated[Path, typer.Argument(help="A new folder, or file (arviz).")],
    to: Annotated[
        Format,
        typer.Option(
            help="transformers: a plain model with the adapter merged into its weights, and the "
            "tokenizer. peft: a LoRA adapter, for PEFT and servers. vllm: draws as LoRA adapters "
            "for vLLM, which 'serve --engine vllm' asks. arviz: draws as a NetCDF file."
        ),
    ] = Format.TRANSFORMERS,
    draw: Annotated[
        int | None,
        typer.Option(
            min=0, help="The number of a draw (transformers, peft); otherwise the mean adapter."
        ),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(help="Draws (arviz); otherwise 200, or all that are stored.")
    ] = None,
    draws: Annotated[
        str | None,
        typer.Option(
            help="Numbers of draws, such as 0,1,2 (peft, a folder draw-<k> for each; arviz; vllm, "
            "otherwise the first 8, or every member of an ensemble)."
        ),
    ] = None,
    uniform: Annotated[
        bool,
        typer.Option(
            "--uniform",
            help="Give all layers one rank and the scaling 1 (peft), for servers that read no "
            "patterns.",
        ),
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=defaults.MAX_SEED,
            help="Seed of draws other than the numbered ones 0, 1, ... (arviz).",
        ),
    ] = None,
    model: posteriors.Model = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write a posterior in a form that other tools read.

    \b
    pyrolora export run merged
    pyrolora export run adapter --to peft
    pyrolora export run adapters --to peft --draws 0,1,2 --uniform
    pyrolora export run adapters/books --to vllm --draws 0,1,2,3
    pyrolora export run posterior.nc --to arviz --num-samples 500
    """
    if os.path.lexists(path):
        raise ConfigError(f"{path} exists; choose another name")
    beside = {"draw": draw, "num_samples": num_samples, "seed": seed}
    _check(to, draws=draws, uniform=uniform or None, **beside)
    numbers = posteriors.draw_numbers(draws, **beside)
    posterior = posteriors.load(run, model)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if to is Format.ARVIZ:
        from pyrolora.arviz import netcdf

        write_whole(path, netcdf(posterior.to_arviz(num_samples, draws=numbers, seed=seed)))
        next_step = f"az.summary(az.from_netcdf({str(path)!r}), kind='stats')"
    elif to is Format.PEFT:
        which = numbers or ("mean" if draw is None else draw)
        posterior.to_peft(path, which, uniform=uniform)
        first = path if numbers is None else path / f"draw-{numbers[0]}"
        next_step = f"peft.PeftModel.from_pretrained(network, {str(first)!r})"
    elif to is Format.VLLM:
        next_step = _for_vllm(posterior, path, numbers)
    else:
        _merged(posterior, path, "mean" if draw is None else draw)
        next_step = f"{type(posterior.base).__name__}.from_pretrained({str(path)!r})"
    if json:
        print_json({"run": str(run), "to": to.value, "path": str(path)})
    else:
        tell(
            f"Written: {path}. Next, in {'a shell' if to is Format.VLLM else 'Python'}: {next_step}"
        )


def _check(to: Format, **options: object) -> None:
    """Raise `ConfigError` for options that would have no effect on the form."""
    useless = [n for n, value in options.items() if value is not None and n not in to.takes]
    if useless:
        raise ConfigError(
            f"{_flags(useless)} would do nothing with --to {to.value}, which takes "
            f"{_flags(to.takes)}; leave it out, or choose another form"
        )


def _flags(names: Sequence[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _for_vllm(posterior: Posterior, path: Path, draws: Sequence[int] | None) -> str:
    """Write draws for vLLM; return the commands that serve them."""
    from pyrolora.serving.vllm.checks import serve_line
    from pyrolora.serving.vllm.engine import ALL
    from pyrolora.serving.vllm.export import export_vllm
    from pyrolora.serving.vllm.exported import read_exported

    export_vllm(posterior, path, draws)
    network = str(posterior.base.name_or_path or "NETWORK")
    directory = shlex.quote(str(path.parent))
    # A temperature acts on whole distributions.
    top, option = (TOP_LOGPROBS, "") if posterior.temperature == 1 else (ALL, " --top-logprobs -1")
    return (
        f"{serve_line(network, [read_exported(path)], top)} --port 8001; then pyrolora "
        f"serve {directory} --engine vllm --url http://127.0.0.1:8001{option}"
    )


def _merged(posterior: Posterior, path: Path, draw: str | int) -> None:
    from transformers import PreTrainedModel

    network = posterior.merge(draw)
    if not isinstance(network, PreTrainedModel):
        raise ConfigError(
            f"a {type(network).__name__} is no transformers model; use posterior.merge()"
        )
    with replacing_folder(path) as scratch:
        network.save_pretrained(scratch)
        if posterior.tokenizer is not None:
            posterior.tokenizer.save_pretrained(scratch)
