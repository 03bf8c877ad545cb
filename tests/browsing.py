"""The browser that pages are tested in."""

from __future__ import annotations

import os
import shutil

import pytest

REQUIRED = "PYROLORA_BROWSER"
"""Set to ``required``, a missing browser is a failure."""


def browser() -> str:
    """Chromium's path; where there is none the tests are skipped, or fail if it is required."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        missing = "there is no chromium to open the page with; on Debian: apt-get install chromium"
        if os.environ.get(REQUIRED) == "required":
            pytest.fail(missing)
        pytest.skip(missing)
    return path
