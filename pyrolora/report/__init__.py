"""What others read of a posterior: ArviZ, pictures, tables."""

from pyrolora.report.arviz import summary, to_inference_data
from pyrolora.report.chains import as_chains
from pyrolora.report.groups import inference_data
from pyrolora.report.khat import judge
from pyrolora.report.leave_one_out import loo
from pyrolora.report.plots import entropy_histogram, reliability_diagram, risk_coverage_curve
from pyrolora.report.posterior_plots import (
    adapter_norms,
    elbo_curve,
    kl_curves,
    mixture_weights,
    signal_to_noise_map,
)
from pyrolora.report.psis import PSIS
from pyrolora.report.rich_table import as_table
from pyrolora.report.text_plot import token_text

__all__ = [
    "PSIS",
    "adapter_norms",
    "as_chains",
    "as_table",
    "elbo_curve",
    "entropy_histogram",
    "inference_data",
    "judge",
    "kl_curves",
    "loo",
    "mixture_weights",
    "reliability_diagram",
    "risk_coverage_curve",
    "signal_to_noise_map",
    "summary",
    "to_inference_data",
    "token_text",
]
