"""``pyrolora export``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyrolora import defaults
from pyrolora.cli import posteriors
from pyrolora.cli.output import print_json
from pyrolora.errors import ConfigError

if TYPE_CHECKING:
    from pyrolora.posterior import Posterior


class Format(StrEnum):
    """What an export can be."""

    TRANSFORMERS = "transformers"
    ARVIZ = "arviz"


def export(
    run: posteriors.Folder,
    path: Annotated[Path, typer.Argument(help="A new folder (transformers) or file (arviz).")],
    to: Annotated[
        Format,
        typer.Option(
            help="transformers: a plain model with the mean adapter merged into its weights, and "
            "the tokenizer. arviz: draws as a NetCDF file for ArviZ."
        ),
    ] = Format.TRANSFORMERS,
    num_samples: Annotated[int, typer.Option(help="Draws (arviz).")] = 200,
    seed: Annotated[
        int, typer.Option(min=0, max=defaults.MAX_SEED, help="Of the draws (arviz).")
    ] = defaults.SEED,
    model: posteriors.Model = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write a posterior in a form that other tools read.

    \b
    pyrolora export run merged
    pyrolora export run posterior.nc --to arviz --num-samples 500
    """
    if path.exists():
        raise ConfigError(f"{path} exists; choose another name")
    posterior = posteriors.load(run, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    if to is Format.ARVIZ:
        posterior.to_arviz(num_samples, seed=seed).to_netcdf(str(path))
        next_step = f"az.summary(az.from_netcdf({str(path)!r}), kind='stats')"
    else:
        _merged(posterior, path)
        next_step = f"{type(posterior.base).__name__}.from_pretrained({str(path)!r})"
    if json:
        print_json({"run": str(run), "to": to.value, "path": str(path)})
    else:
        print(f"Written: {path}. Next, in Python: {next_step}")


def _merged(posterior: Posterior, path: Path) -> None:
    from transformers import PreTrainedModel

    network = posterior.merge()
    if not isinstance(network, PreTrainedModel):
        raise ConfigError(
            f"a {type(network).__name__} is no transformers model; use posterior.merge()"
        )
    network.save_pretrained(path)
    if posterior.tokenizer is not None:
        posterior.tokenizer.save_pretrained(path)
