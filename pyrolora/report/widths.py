"""Widths of a posterior beside its prior's: a table, and a sentence about what they can show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from pyrolora.diagnostics.contraction import Contraction, has_trained_widths
from pyrolora.guides import Program


def about_widths(program: Program, blocks: Sequence[Contraction], *, chosen: bool = False) -> str:
    """Return a sentence about what the widths of a posterior can show about the data.

    ``chosen``: examples that were held back chose the number by which all are multiplied.
    """
    if not any(block.scale for block in blocks):
        return "The posterior is a point: it has no widths."
    if has_trained_widths(program):
        said = (
            "The widths come from the training steps: from their number and size, with any data or "
            "none. Their KL is no sign of learning, and whether the data would have them so is not "
            "known."
        )
        if could_settle(program):
            said += " (scale_updates='curvature' finds out.)"
    else:
        said = (
            "The widths are those of the objective: the prior's where the data said nothing. Their "
            "KL shows that the data constrain the entries, which random labels do, too."
        )
    if chosen:
        said += (
            " Examples that were held back chose one number that multiplies the widths of both, "
            "posterior and prior."
        )
    return said


def could_settle(program: Program) -> bool:
    """Return whether curvature could set the widths: they have a closed optimum, and layers inputs.

    Adapted embeddings and parameters have none that a curvature could be made of.
    """
    bank = program.bank
    readable = not (bank.config.target_parameters or any(s.lookup for s in bank.specs.values()))
    return program.supports.closed_scales and program.previous is None and readable


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
