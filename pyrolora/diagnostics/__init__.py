"""Diagnostics of a fit in numbers: k̂, leave-one-out, contraction, overconfidence, chance.

`pyrolora.report` puts their results into words.
"""

from pyrolora.diagnostics.importance import khat
from pyrolora.diagnostics.leave_one_out import loo
from pyrolora.diagnostics.psis import PSIS

__all__ = ["PSIS", "khat", "loo"]
