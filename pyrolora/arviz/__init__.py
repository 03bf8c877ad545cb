"""Draws of a posterior as ArviZ containers, for ArviZ 0.2x and 1.x alike."""

from pyrolora.arviz.chains import as_chains
from pyrolora.arviz.containers import netcdf, summary, to_inference_data
from pyrolora.arviz.groups import inference_data

__all__ = ["as_chains", "inference_data", "netcdf", "summary", "to_inference_data"]
