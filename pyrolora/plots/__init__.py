"""Plots of predictions and of posteriors, and tables for a terminal."""

from pyrolora.plots.posterior import (
    adapter_norms,
    elbo_curve,
    kl_curves,
    mixture_weights,
    signal_to_noise_map,
)
from pyrolora.plots.predictions import entropy_histogram, reliability_diagram, risk_coverage_curve
from pyrolora.plots.rich_table import as_table
from pyrolora.plots.tokens import token_text

__all__ = [
    "adapter_norms",
    "as_table",
    "elbo_curve",
    "entropy_histogram",
    "kl_curves",
    "mixture_weights",
    "reliability_diagram",
    "risk_coverage_curve",
    "signal_to_noise_map",
    "token_text",
]
