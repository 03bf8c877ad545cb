"""Widths of a posterior beside its prior's: a table, and a sentence about what they can show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from pyrolora.diagnostics.contraction import Contraction, chosen_width, has_trained_widths
from pyrolora.guides import Program


def about_widths(program: Program, blocks: Sequence[Contraction]) -> str:
    """Return a sentence about what the widths of a posterior can show about the data."""
    if not any(block.scale for block in blocks):
        return "The posterior is a point: it has no widths."
    chosen = chosen_width(program)
    if chosen is not None:
        return (
            f"The prior's width is {chosen:.2g} times the size of what each rank has learnt, as "
            "training examples chose from which the fit did not learn. A width below the prior's "
            "says that the data constrain those entries, which random labels do, too."
        )
    if has_trained_widths(program):
        return (
            "The widths come from the training steps: from their number and size, with any data or "
            "none. Their KL is no sign of learning, and whether the data would have them so is not "
            "known. (For montec and meanfield, scale_updates='curvature' finds out.)"
        )
    return (
        "The widths are those of the objective: the prior's where the data said nothing. Their KL "
        "shows that the data constrain the entries, which random labels do, too."
    )


def contraction_table(blocks: Sequence[Contraction]) -> pd.DataFrame:
    """Return a row per block: ratio of the widths, distance of the means, nats per entry."""
    by_rank = [(np.array(block.width_kl), np.array(block.mean_kl)) for block in blocks]
    totals = [width + mean for width, mean in by_rank]
    return pd.DataFrame(
        {
            "block": [block.block for block in blocks],
            "width, relative to the prior's": [block.scale for block in blocks],
            "distance of the means": [block.shift for block in blocks],
            "KL of the width": [width.mean() for width, _ in by_rank],
            "KL of the mean": [mean.mean() for _, mean in by_rank],
            "KL, lowest rank": [kl.min() for kl in totals],
            "KL, highest rank": [kl.max() for kl in totals],
        }
    )
