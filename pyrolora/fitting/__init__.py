"""From a model and data to a posterior: the request, where it starts, and the fit."""

from pyrolora.fitting.fit import fit, fit_request
from pyrolora.fitting.request import Request
from pyrolora.fitting.stored import StoredPosterior
from pyrolora.fitting.training import arguments_of

__all__ = ["Request", "StoredPosterior", "arguments_of", "fit", "fit_request"]
