"""Secrets that a run's record leaves out: tokens, passwords, and addresses that hold them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "<hidden>"
_SECRET_WORDS = r"token|password|passwd|passphrase|secret|credentials?|authorization"
# ``hub_token`` is one, ``include_tokens_per_second`` is not; ``api_key`` is, BERT's ``key`` is not.
_NAME = re.compile(
    rf"(?:.*[_.\-])?(?:{_SECRET_WORDS}|\w*(?:api|access|secret|private|auth|account)_?key)",
    re.IGNORECASE,
)
_ADDRESS = re.compile(r"(\b[a-z][a-z0-9+.\-]*://)[^/\s@]+@", re.IGNORECASE)
_TOKEN = re.compile(r"\b(?:hf_|sk-|gh[opsu]_|github_pat_|glpat-|xox[abp]-|AKIA)[\w\-]{12,}")
_SETTING = re.compile(r"([\w.\-]+)(\s*[=:]\s*)(\S.*)", re.DOTALL)
_QUERY = re.compile(
    rf"([?&](?:[\w\-]*(?:{_SECRET_WORDS}|key|sig(?:nature)?))=)[^&\s]+", re.IGNORECASE
)


def hidden(value: Any, name: str = "") -> Any:
    """Return the value of an option called ``name`` as it may be written down.

    Every secret becomes ``<hidden>``: a repeat of the command matches its record, and so does the
    same command with another token, which is no setting of the fit.
    """
    if value is not None and value != "" and not isinstance(value, bool) and _NAME.fullmatch(name):
        return HIDDEN
    if isinstance(value, Mapping):
        return {key: hidden(part, str(key)) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [hidden(part) for part in value]
    return _without_secrets(value) if isinstance(value, str) else value


def hidden_arguments(arguments: list[str]) -> list[str]:
    """Return a command's words as they may be written down."""
    words, name = [], ""
    for argument in arguments:
        words.append(hidden(argument, name))
        name = argument.lstrip("-") if argument.startswith("--") and "=" not in argument else ""
    return words


def _without_secrets(text: str) -> str:
    text = _TOKEN.sub(HIDDEN, _QUERY.sub(rf"\1{HIDDEN}", _ADDRESS.sub(rf"\1{HIDDEN}@", text)))
    setting = _SETTING.fullmatch(text)
    if setting is not None and "://" not in setting[1] + setting[2] + setting[3][:2]:
        name, between, value = setting.groups()
        if _NAME.fullmatch(name.lstrip("-")):
            return f"{name}{between}{HIDDEN}"
        if value.startswith(("{", "[")):
            return f"{name}{between}{_nested(value)}"
        return f"{name}{between}{_without_secrets(value)}"
    return text


def _nested(text: str) -> str:
    """Hide the secrets in JSON that is a word of a command."""
    import json

    try:
        return json.dumps(hidden(json.loads(text)))
    except ValueError:
        return text
