"""Posteriors as ArviZ reads them."""

from pyrolora.arviz.arviz import summary, to_inference_data
from pyrolora.arviz.chains import as_chains
from pyrolora.arviz.groups import inference_data

__all__ = ["as_chains", "inference_data", "summary", "to_inference_data"]
