"""What others wrote is seen at the terminal and has no effect there."""

from __future__ import annotations

import pytest

from pyrolora.visible import visible


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("plain [red]text[/red]", "plain [red]text[/red]"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x1b]8;;http://x\x07link", r"\x1b]8;;http://x\x07link"),
        ("\x9b31m", r"\x9b31m"),
        ("a\rb\bc", r"a\rb\x08c"),
        ("user\u202etxt.exe", r"user\u202etxt.exe"),
        ("\u2066a\u2069", r"\u2066a\u2069"),
        ("\ud800", r"\ud800"),
        ("line\n\tindented, größer, 漢字, नि\u200dक", "line\n\tindented, größer, 漢字, नि\u200dक"),
    ],
)
def test_visible(text: str, seen: str) -> None:
    assert visible(text) == seen
