"""The widest layers whose curvature is a dense matrix over their features."""

from __future__ import annotations

from pyrolora import defaults
from pyrolora.errors import ConfigError


def check_width(asked: str, layer: str, features: int, remedy: str) -> None:
    """Raise `ConfigError` for a layer with more features than `defaults.CURVATURE_WIDTH`.

    Parameters
    ----------
    asked
        The guide, or its option, that has a matrix over the features.
    layer
        The name of the layer.
    features
        The larger one of its numbers of inputs and outputs.
    remedy
        The ways out.
    """
    if features > defaults.CURVATURE_WIDTH:
        raise ConfigError(
            f"{asked} has a dense matrix over the features of a layer, and {layer!r} has "
            f"{features:,} of them, {4e-9 * features**2:,.3g} GB and as much again to decompose "
            f"it, where at most {defaults.CURVATURE_WIDTH:,} are taken; {remedy}"
        )
