"""Diagnostics of a posterior: importance weights, leave-one-out, contraction."""

from pyrolora.diagnostics.khat import judge
from pyrolora.diagnostics.leave_one_out import loo
from pyrolora.diagnostics.psis import PSIS

__all__ = ["PSIS", "judge", "loo"]
