"""What others read of a posterior: ArviZ."""

from pyrolora.report.arviz import to_inference_data

__all__ = ["to_inference_data"]
