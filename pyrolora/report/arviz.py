"""Draws to ArviZ, 0.2x (``InferenceData``) and 1.x (``DataTree``) alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Group = Mapping[str, tuple[np.ndarray, Sequence[str]]]
"""Variable -> (values, names of the dimensions after chain and draw)."""


def to_inference_data(
    groups: Mapping[str, Group],
    coords: Mapping[str, Sequence[Any]],
    attrs: Mapping[str, str | int | float],
) -> Any:
    """ArviZ's container for ``groups``.

    Parameters
    ----------
    groups
        ``posterior``, ``posterior_predictive``, ``log_likelihood``: values (chain, draw, ...);
        ``observed_data``: values without these two.
    coords
        Dimension -> labels.
    attrs
        Attributes of each group of draws: which guide made them, and from what.
    """
    import arviz

    data = {
        name: {variable: np.asarray(values) for variable, (values, _) in group.items()}
        for name, group in groups.items()
        if group
    }
    dims = {
        variable: list(names)
        for group in groups.values()
        for variable, (_, names) in group.items()
        if names
    }
    used = {name for names in dims.values() for name in names}
    labels = {name: list(values) for name, values in coords.items() if name in used}
    if int(arviz.__version__.split(".")[0]) >= 1:
        tree = arviz.from_dict(data, coords=labels, dims=dims)
        for name in data:
            tree[name].attrs.update(attrs)
        return tree
    idata = arviz.from_dict(**data, coords=labels, dims=dims)
    for name in data:
        idata[name].attrs.update(attrs)
    return idata
