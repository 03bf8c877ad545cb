"""Posteriors on a model hub: a repository is what `Posterior.save` writes, with its card.

Only huggingface_hub talks to the hub. Of a repository nothing is fetched but ``posterior.json`` and
the files that it names, which then are read as any folder is.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from pyrolora.errors import CheckpointError, ConfigError, SaveError
from pyrolora.files import read_bytes
from pyrolora.storage.card_file import CARD_FILE, MOST_CARD, is_untouched
from pyrolora.storage.folder import META_FILE, OWN_FILES, read_description

logger = logging.getLogger(__name__)

_FAILED: Any = (*HfHubHTTPError.__bases__, OSError)
"""The errors of a transfer: huggingface_hub's and those of the HTTP client that it uses."""


def is_repository(name: Any) -> bool:
    """Return whether a name can be that of a repository, ``owner/name``."""
    if not isinstance(name, str) or name.count("/") != 1:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def located(
    path: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """Return the folder of a posterior: ``path`` itself, or a copy of the repository of that name.

    A folder of that name wins, as in transformers.

    Raises
    ------
    ConfigError
        When ``path`` or ``revision`` has another type, or when a ``revision`` or a ``token`` is
        given for what is no repository, or for a name that a folder has, too.
    CheckpointError
        When neither a folder nor a repository of that name can be read.
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(
            f"path must be a folder, or the name of a repository, owner/name, got {path!r}"
        )
    if not isinstance(revision, str | None):
        raise ConfigError(
            f"revision must be the name of a branch, a tag or a commit, got {revision!r}"
        )
    asked = {"revision": revision, "token": token}
    given = [f"{name}=" for name, value in asked.items() if value is not None]
    folder = Path(path).expanduser() if str(path).startswith("~") else Path(path)
    try:
        exists = folder.exists()
    except (OSError, ValueError):  # a name that no file can have
        exists = False
    if given and (exists or not is_repository(path)):
        what = "there is a folder of that name, which wins" if exists else "it names no repository"
        raise ConfigError(
            f"{' and '.join(given)} belong to a repository of the hub, and of {str(path)!r} "
            f"{what}; leave them out, or pass owner/name from where no such folder is"
        )
    if exists or not is_repository(path):
        return folder
    return _downloaded(str(path), revision, token)


def _downloaded(repo_id: str, revision: str | None, token: str | bool | None) -> Path:
    """Fetch what belongs to the posterior of a repository into the hub's cache."""

    def fetched(names: list[str], commit: str | None) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                repo_id, revision=commit, token=token, allow_patterns=names
            )
        )

    try:
        folder = fetched([META_FILE], revision)
        if not (folder / META_FILE).exists():
            raise CheckpointError(
                f"the repository {repo_id!r} of the hub holds no posterior: it has no {META_FILE}; "
                "pass one that posterior.push_to_hub(...) wrote (an adapter of PEFT's is read by "
                "pyrolora.from_peft)"
            )
        description = read_description(folder)
        names = [description.state_file]
        if description.tokenizer is not None:
            names += [f"{description.tokenizer}/{name}" for name in description.tokenizer_files]
        folder = fetched(names, folder.name)  # the commit, so that both are of one state
        missing = [name for name in names if not (folder / name).exists()]
        if missing:  # the hub's cache stands in for a hub that cannot be reached
            raise CheckpointError(
                f"of the repository {repo_id!r} the hub's cache has {META_FILE}, and not the "
                f"{missing[0]!r} that it names; load it once with the hub in reach (and "
                "HF_HUB_OFFLINE unset), or push the posterior again"
            )
        return folder
    except (HFValidationError, LocalEntryNotFoundError, *_FAILED) as error:
        if isinstance(error, CheckpointError):
            raise
        asked = "" if revision is None else f" at revision {revision!r}"
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        raise CheckpointError(
            f"there is no folder {repo_id!r} here, and no repository of that name can be read from "
            f"the hub{asked}{offline}: {_reason(error)}; pass the folder that posterior.save(...) "
            "wrote, or a repository's owner/name, with token= for a private one"
        ) from error


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None,
    revision: str | None,
    token: str | bool | None,
    commit_message: str,
    create_pr: bool,
    replace_card: bool,
) -> str:
    """Upload the files of a posterior in one commit, and return the commit's address.

    Files of an older posterior in the repository are removed by the same commit. A card there that
    somebody has edited stays, unless ``replace_card``; a log says so.

    Raises
    ------
    ConfigError
        When ``repo_id`` is no name of a repository.
    SaveError
        When the hub refuses, or cannot be reached.
    """
    if not isinstance(repo_id, str):
        raise ConfigError(f"repo_id must be the name of a repository, owner/name, got {repo_id!r}")
    try:
        validate_repo_id(repo_id)
        api = huggingface_hub.HfApi(token=token, library_name="pyrolora")
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo, branch=revision, exist_ok=True)
        kept = not replace_card and _edited(api, repo, revision)
        if kept:
            logger.warning(
                "%s of %s was edited, and stays as it is; pass card=posterior.card() to replace it",
                CARD_FILE,
                repo,
            )
        info: Any = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            delete_patterns=[*OWN_FILES],
            ignore_patterns=[CARD_FILE] if kept else None,
        )
    except HFValidationError as error:
        raise ConfigError(
            f"repo_id must be the name of a repository, owner/name, got {repo_id!r}: {error}"
        ) from error
    except _FAILED as error:
        raise SaveError(
            f"the posterior could not be uploaded to {repo_id!r}: {_reason(error)}; log in with "
            "'hf auth login' or pass token=, and look whether the repository is yours to write to"
        ) from error
    return str(info.pr_url if create_pr else info.commit_url)


def _edited(api: Any, repo: str, revision: str | None) -> bool:
    """Return whether the repository has a card that is not as `write_card` left it."""
    if not api.file_exists(repo, CARD_FILE, revision=revision):
        return False
    card = Path(api.hf_hub_download(repo, CARD_FILE, revision=revision))
    return not is_untouched(read_bytes(card, MOST_CARD).decode("utf-8", "replace"))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
