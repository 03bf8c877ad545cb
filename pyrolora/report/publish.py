"""A posterior as a folder with its card, and as a repository of the hub."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import ModelCard

from pyrolora.checks import true_or_false
from pyrolora.errors import ConfigError
from pyrolora.peft import remove_mean, why_no_mean, write_mean
from pyrolora.predictive import warn_untempered
from pyrolora.report.card import card_of
from pyrolora.report.facts import Subject
from pyrolora.storage import describe, upload, write_card, write_folder

logger = logging.getLogger(__name__)

NOT_ASKED = "posterior.save(folder, peft=True) writes one."


class Saveable(Subject, Protocol):
    """The attributes of a posterior that are saved."""

    identity: dict[str, Any]


def save(
    posterior: Saveable,
    path: Path,
    *,
    peft: bool | None,
    card: ModelCard | None = None,
    repo_id: str | None = None,
) -> None:
    """Write what `Posterior.save` says; ``peft=None``: the mean, where PEFT can hold it.

    The card comes last: a fit of hours is on the disk before anything is said about it.
    """
    true_or_false("peft", bool(peft) if peft is None else peft)
    missing = why_no_mean(posterior.model, posterior.options)
    if peft and missing:
        raise ConfigError(f"peft=True cannot be had: {missing}")
    _check_card(card)
    description = describe(
        posterior.model,
        posterior.options,
        identity=posterior.identity,
        settings=posterior.settings,
        history=posterior.history,
        temperature=posterior.temperature,
    )
    if path.is_dir():
        remove_mean(path)
    write_folder(path, description, posterior.model.own_state(), posterior.tokenizer)
    if peft is not False and missing is None:
        missing = _write_mean(posterior, path, needed=bool(peft))
    elif missing is None:
        missing = NOT_ASKED
    made = card_of(posterior, repo_id=repo_id, mean=missing) if card is None else card
    write_card(path, str(made), replace=card is not None)


def push(
    posterior: Saveable,
    repo_id: str,
    *,
    card: ModelCard | None,
    peft: bool | None,
    private: bool | None,
    revision: str | None,
    token: str | bool | None,
    commit_message: str | None,
    create_pr: bool,
) -> str:
    """Upload what `save` writes, as `Posterior.push_to_hub` says."""
    true_or_false("create_pr", create_pr)
    with tempfile.TemporaryDirectory(prefix="pyrolora-") as scratch:
        folder = Path(scratch)
        save(posterior, folder, peft=peft, card=card, repo_id=repo_id)
        return upload(
            folder,
            repo_id,
            private=private,
            revision=revision,
            token=token,
            commit_message=commit_message or "Upload a posterior with pyrolora",
            create_pr=create_pr,
            replace_card=card is not None,
        )


def _write_mean(posterior: Saveable, path: Path, *, needed: bool) -> str | None:
    """Write the mean; return why PEFT cannot hold it, unless it is ``needed``."""
    try:
        write_mean(path, posterior.model)
    except ConfigError as error:
        if needed:
            raise
        logger.warning("the mean is not among the files, since %s", error)
        return f"PEFT cannot hold the mean: {error}."
    warn_untempered("the mean", posterior.temperature)
    return None


def _check_card(card: Any) -> None:
    if card is not None and not isinstance(card, ModelCard):
        raise ConfigError(
            f"card must be a huggingface_hub.ModelCard, such as posterior.card(data), got {card!r}"
        )
