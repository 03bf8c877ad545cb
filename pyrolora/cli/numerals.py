"""Numbers that are text, as CSV and TSV have them."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)


def is_number(cell: str) -> bool:
    """Return whether a cell is a finite number in plain notation."""
    return _NUMBER.fullmatch(cell) is not None


def is_not_finite(cell: str) -> bool:
    """Return whether a cell is NaN or an infinity."""
    return _NOT_FINITE.fullmatch(cell) is not None
