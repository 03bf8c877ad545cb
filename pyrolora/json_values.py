"""Python's and NumPy's values in the form that JSON has."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def as_json(value: Any) -> str:
    """Return a value as standard JSON: `finite`, one value per line."""
    return json.dumps(finite(value), indent=1, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """Return a value that JSON can hold: NaN and infinity become null, tuples lists.

    NumPy's numbers become Python's.
    """
    if isinstance(value, Mapping):
        return {str(key): finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
