"""Independent fits as the chains of one ArviZ container."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyrolora.arviz.containers import container, dataset, group_names
from pyrolora.errors import ConfigError

FITTED_FROM = ("guide", "guide_options", "task", "base", "num_examples")
"""Attributes that are equal in all fits that can be chains of one another."""
BY_HELD_BACK = ("temperature", "fit_seed")
"""Those of fits that chose a temperature by examples that they held back, each by its own."""


def as_chains(fits: Sequence[Any]) -> Any:
    """Join the draws of independent fits as the chains of one container.

    R-hat then compares fits: on ``adapter_norm`` it shows whether they found updates of the same
    size, on ``posterior_predictive`` whether they predict the same. Near 1, another fit would
    change nothing; far above 1, the differences between fits, and not the draws within one, carry
    most of the uncertainty.

        two = as_chains([a.to_arviz(200, data=test), b.to_arviz(200, data=test)])
        az.rhat(two, var_names=["adapter_norm"])
        az.rhat(two["posterior_predictive"]["probs"])

    Parameters
    ----------
    fits
        Results of ``Posterior.to_arviz``, or what was read from their files: two or more, with the
        same guide, layers, data and number of draws. The fits differ in their seeds.

    Raises
    ------
    ConfigError
        When the fits cannot be chains of one another.
    """
    import arviz
    import xarray

    fits = [{name: dataset(fit[name]) for name in group_names(fit)} for fit in fits]
    if len(fits) < 2:
        raise ConfigError(
            f"chains need two fits or more, got {len(fits)}; fit again with another seed"
        )
    for number, fit in enumerate(fits[1:], start=1):
        _check_alike(fits[0], fit, number)
        for other, earlier in enumerate(fits[:number]):
            if fit["posterior"].equals(earlier["posterior"]):
                raise ConfigError(
                    f"fit {number} has the very draws of fit {other}, and chains are independent "
                    "fits; fit again with another seed"
                )
    joined = {}
    for name, first in fits[0].items():
        groups = [fit[name] for fit in fits]
        if "chain" in first.dims:
            both = xarray.concat(groups, dim="chain", join="override", combine_attrs="override")
            for key in BY_HELD_BACK:
                if any(group.attrs.get(key) != first.attrs.get(key) for group in groups):
                    both.attrs.pop(key, None)
            joined[name] = both.assign_coords(chain=range(both.sizes["chain"]))
        else:
            joined[name] = first
    return container(arviz, joined)


def _check_alike(first: Mapping[str, Any], other: Mapping[str, Any], number: int) -> None:
    """Raise `ConfigError` unless ``other`` can stand as a chain beside ``first``."""

    def refuse(what: str, expected: object, received: object) -> None:
        raise ConfigError(
            f"fit {number} has another {what} than fit 0: {received} for {expected}; chains are "
            "fits of one guide to the same layers and data, with as many draws each"
        )

    if set(first) != set(other):
        refuse("set of groups", sorted(first), sorted(other))
    for name, group in first.items():
        keys = (*FITTED_FROM, "held_back")
        for key in keys if group.attrs.get("held_back") else (*keys, "temperature"):
            if group.attrs.get(key) != other[name].attrs.get(key):
                refuse(key, group.attrs.get(key), other[name].attrs.get(key))
        if set(group.data_vars) != set(other[name].data_vars):
            refuse(f"set of variables in {name}", list(group), list(other[name]))
        for dim in sorted(map(str, {*group.dims, *other[name].dims} - {"chain"})):
            mine, yours = (
                list(g[dim].values) if dim in g.dims else [] for g in (group, other[name])
            )
            if mine != yours:
                refuse(f"{dim!r} in {name}", _shown(mine), _shown(yours))
    data = "observed_data"
    if data in first and not first[data].equals(other[data]):
        raise ConfigError(f"fit {number} has other observed data than fit 0; pass the same data=")


def _shown(labels: list[Any]) -> str:
    return f"{len(labels)} ({', '.join(map(str, labels[:3]))}{', ...' if len(labels) > 3 else ''})"
