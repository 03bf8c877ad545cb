"""Posteriors in folders, which a request can name before they are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pyrolora.errors import ConfigError
from pyrolora.guides import MAP, Guide
from pyrolora.loading import from_peft, load
from pyrolora.peft import CONFIG_FILE as PEFT_FILE
from pyrolora.posterior import Posterior
from pyrolora.storage import read_description
from pyrolora.tasks import Task, load_network


@dataclass(frozen=True)
class StoredPosterior:
    """A saved posterior, or an adapter that PEFT saved, in ``folder``.

    Raises
    ------
    ConfigError
        When there is no such folder.
    """

    folder: Path

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise ConfigError(
                f"there is no folder {str(self.folder)!r}; pass that of a fit, or of an adapter "
                "that PEFT saved"
            )

    @property
    def from_peft(self) -> bool:
        """Whether PEFT saved it: a point, which says nothing about its task."""
        return (self.folder / PEFT_FILE).is_file()

    @cached_property
    def options(self) -> Guide:
        """The guide of the posterior."""
        return MAP() if self.from_peft else read_description(self.folder).guide

    def load(self, model: Any, data: Any, task: str | Task | None) -> Posterior:
        """Load the posterior on the network ``model``.

        A saved posterior knows its task and its classes; an adapter of PEFT takes those of
        ``data``.
        """
        if not self.from_peft:
            return load(self.folder, model)
        network, tokenizer = load_network(model, data, task=task)
        return from_peft(self.folder, network, task=task, tokenizer=tokenizer)
