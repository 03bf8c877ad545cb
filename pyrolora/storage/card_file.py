"""The model card in a posterior's folder: text for people and for the hub, which no load reads."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path

from pyrolora.errors import CheckpointError
from pyrolora.files import read_bytes, write_whole

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
MOST_CARD = 2**22
"""The largest card that is read, in bytes."""
_MARK = re.compile(r"\n<!-- written by pyrolora: ([0-9a-f]{16}) -->\n*$")


def marked(text: str) -> str:
    """Return a card with a last line by which it is known that nobody has edited it."""
    text = text.rstrip("\n") + "\n"
    return f"{text}\n<!-- written by pyrolora: {_digest(text)} -->\n"


def is_untouched(text: str) -> bool:
    """Return whether a card is as `marked` made it, line endings aside."""
    text = text.replace("\r\n", "\n")
    found = _MARK.search(text)
    return found is not None and found[1] == _digest(text[: found.start()])


def write_card(folder: Path, text: str, *, replace: bool = False) -> None:
    """Write the card of a folder; one that somebody wrote or edited stays, unless ``replace``.

    A log says so then.
    """
    file = folder / CARD_FILE
    if not replace and file.exists() and not _is_ours(file):
        logger.warning("%s was written or edited by somebody, and stays as it is", file)
        return
    write_whole(file, marked(text).encode())


def _is_ours(file: Path) -> bool:
    try:
        return is_untouched(read_bytes(file, MOST_CARD).decode())
    except (CheckpointError, UnicodeDecodeError):
        return False


def _digest(text: str) -> str:
    return hashlib.sha256(text.rstrip("\n").encode()).hexdigest()[:16]
