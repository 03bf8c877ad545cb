"""Plots of predictions and of posteriors: functions that draw on matplotlib axes."""

from pyrolora.plots.posterior import (
    adapter_norms,
    elbo_curve,
    kl_curves,
    mixture_weights,
    signal_to_noise_map,
)
from pyrolora.plots.predictions import entropy_histogram, reliability_diagram, risk_coverage_curve
from pyrolora.plots.tokens import token_text

__all__ = [
    "adapter_norms",
    "elbo_curve",
    "entropy_histogram",
    "kl_curves",
    "mixture_weights",
    "reliability_diagram",
    "risk_coverage_curve",
    "signal_to_noise_map",
    "token_text",
]
