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

    trees = {}
    for name, group in groups.items():
        if not group:
            continue
        data = {variable: np.asarray(values) for variable, (values, _) in group.items()}
        dims = {variable: list(names) for variable, (_, names) in group.items() if names}
        used = {dim for names in dims.values() for dim in names}
        labels = {dim: list(values) for dim, values in coords.items() if dim in used}
        # One conversion a group: ``y`` has other dimensions in each.
        trees[name] = _from_dict(arviz, name, data, labels, dims)
        trees[name][name].attrs.update(attrs)
    return _joined(arviz, trees)


def _is_modern(arviz: Any) -> bool:
    return int(arviz.__version__.split(".")[0]) >= 1


def _from_dict(arviz: Any, name: str, data: Any, coords: Any, dims: Any) -> Any:
    if _is_modern(arviz):
        return arviz.from_dict({name: data}, coords=coords, dims=dims)
    return arviz.from_dict(**{name: data}, coords=coords, dims=dims)


def _joined(arviz: Any, trees: Mapping[str, Any]) -> Any:
    """All groups in one container."""
    if _is_modern(arviz):
        import xarray

        return xarray.DataTree.from_dict({name: tree[name] for name, tree in trees.items()})
    return arviz.InferenceData(**{name: tree[name] for name, tree in trees.items()})
