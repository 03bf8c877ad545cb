"""What others read of a posterior: ArviZ, and pictures."""

from pyrolora.report.arviz import to_inference_data
from pyrolora.report.plots import entropy_histogram, reliability_diagram

__all__ = ["entropy_histogram", "reliability_diagram", "to_inference_data"]
