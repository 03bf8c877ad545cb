"""Progress bars on a terminal or in a notebook, which go when they end; none in a log file."""

from __future__ import annotations

import os
import sys
from typing import Any

from tqdm.auto import tqdm

WAIT = 2.0
"""Seconds before a bar appears: what ends sooner needs none."""


def shows_bars() -> bool:
    """Return whether bars can be drawn: standard error is a terminal, or a notebook's."""
    return sys.stderr.isatty() or _in_notebook()


def _in_notebook() -> bool:
    """Return whether the code runs in a kernel of Jupyter's; a package may import one elsewhere."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and "IPKernelApp" in shell.config


def progress(iterable: Any = None, *, title: str, hidden: bool = False, **options: Any) -> Any:
    """Return ``iterable`` with a bar, which leaves no line behind.

    A user's ``TQDM_DISABLE`` hides it, too.

    Parameters
    ----------
    iterable
        Any, or None for a bar that is updated by hand.
    title
        The words before the bar.
    hidden
        Show none.
    options
        Those of ``tqdm``.
    """
    # Never ``disable=False``, which would overrule a user's TQDM_DISABLE.
    disabled = {"disable": True} if hidden or not shows_bars() else {}
    options = {"delay": WAIT, "leave": False, **options}
    return tqdm(iterable, desc=title, **{**options, **disabled})


def silenced() -> bool:
    """Return whether the user asked for no bars by ``TQDM_DISABLE``."""
    return bool(os.environ.get("TQDM_DISABLE"))
