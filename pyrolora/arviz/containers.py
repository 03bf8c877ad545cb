"""ArviZ's containers, alike for 0.2x (``InferenceData``) and 1.x (``DataTree``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

MOST_DIMS = 4
"""Dimensions of a variable in a summary: chain, draw, block and rank. Σ has one more."""

CALIBRATED = "calibrated_log_likelihood"
"""Variable of ``sample_stats`` with log p_T(y_i | draw s), where the temperature T is not 1."""

Group = Mapping[str, tuple[np.ndarray, Sequence[str]]]
"""Variable -> (values, names of the dimensions after chain and draw)."""


def to_inference_data(
    groups: Mapping[str, Group],
    coords: Mapping[str, Sequence[Any]],
    attrs: Mapping[str, str | int | float],
) -> Any:
    """Convert ``groups`` to ArviZ's container.

    Parameters
    ----------
    groups
        ``posterior``, ``posterior_predictive``, ``log_likelihood``: values (chain, draw, ...);
        ``observed_data``: values without chain and draw.
    coords
        Dimension -> labels, ``draw`` among them; a dimension without labels is numbered from 0.
    attrs
        Attributes of each group: which guide made the draws, and from what.
    """
    import arviz

    trees = {}
    for name, group in groups.items():
        if not group:
            continue
        data = {variable: np.asarray(values) for variable, (values, _) in group.items()}
        dims = {variable: list(names) for variable, (_, names) in group.items() if names}
        labels = {
            dim: list(coords.get(dim, range(size)))
            for variable, names in dims.items()
            for dim, size in zip(names, data[variable].shape[-len(names) :], strict=True)
        }
        if "draw" in coords and name not in ("observed_data", "constant_data"):
            labels["draw"] = list(coords["draw"])
        # Each group is converted by itself, as ``y`` has other dimensions in each.
        trees[name] = _from_dict(arviz, name, data, labels, dims)
        trees[name][name].attrs.update(attrs)
    return container(arviz, {name: tree[name] for name, tree in trees.items()})


def summary(idata: Any) -> pd.DataFrame:
    """Return ``az.summary`` of the variables of ``posterior`` that are no matrices.

    It has R-hat and effective sample sizes where there are several chains; independent draws have
    none.
    """
    import arviz

    posterior = dataset(idata["posterior"])
    names = [name for name, values in posterior.data_vars.items() if values.ndim <= MOST_DIMS]
    kind = "all" if posterior.sizes["chain"] > 1 else "stats"
    with np.errstate(
        divide="ignore", invalid="ignore"
    ):  # chains that do not move have an infinite R-hat
        return arviz.summary(idata, var_names=names, kind=kind, round_to="none")


def netcdf(idata: Any) -> bytes:
    """Return a container as the bytes of a NetCDF file.

    They are made in memory: HDF5 that fails to write to a disk crashes its process at the end.
    """
    import xarray

    datasets = {f"/{name}": dataset(idata[name]) for name in group_names(idata)}
    tree = xarray.DataTree.from_dict(datasets)
    tree.attrs.update(idata.attrs)
    packed = {
        group: {name: {"zlib": True} for name, v in one.variables.items() if v.dtype.kind in "fiub"}
        for group, one in datasets.items()
    }
    return bytes(tree.to_netcdf(engine="h5netcdf", encoding=packed))


def is_modern(arviz: Any) -> bool:
    """Return whether this is ArviZ 1.x."""
    return int(arviz.__version__.split(".")[0]) >= 1


def group_names(idata: Any) -> list[str]:
    """Return the names of the groups of a container."""
    return list(idata.children) if hasattr(idata, "children") else list(idata.groups())


def dataset(group: Any) -> Any:
    """Return the dataset of a group; a group of ``InferenceData`` is one already."""
    return group.to_dataset() if hasattr(group, "to_dataset") else group


def _from_dict(arviz: Any, name: str, data: Any, coords: Any, dims: Any) -> Any:
    if is_modern(arviz):
        return arviz.from_dict({name: data}, coords=coords, dims=dims)
    return arviz.from_dict(**{name: data}, coords=coords, dims=dims)


def container(arviz: Any, groups: Mapping[str, Any]) -> Any:
    """Put all groups into one container."""
    if is_modern(arviz):
        import xarray

        return xarray.DataTree.from_dict(dict(groups))
    return arviz.InferenceData(**groups)
