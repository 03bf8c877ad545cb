"""Text from elsewhere, made safe for a terminal."""

from __future__ import annotations

import unicodedata

KEPT = "\n\t\u200c\u200d"
"""Line breaks, tabs, and the joiners that some scripts are written with."""
UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def visible(text: str) -> str:
    r"""Replace characters that steer a terminal by escapes such as ``\x1b``.

    They show nothing themselves, and tell a terminal what to do, or in which direction to write.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if c in KEPT or unicodedata.category(c) not in UNSEEN else _escaped(c) for c in text
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
