"""Widths of a posterior beside its prior's: a table, and a sentence about what they can show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from pyrolora.diagnostics.contraction import Contraction, has_inputs, has_trained_widths
from pyrolora.guides import Program
from pyrolora.guides.wrapping import innermost
from pyrolora.report.facts import Subject, moved_width
from pyrolora.report.findings import Finding, prior_dominated


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
        if program.settles_at_first:
            said += (
                " (Curvature set them as if entries were independent, for the last time after "
                "three quarters of the steps, and the other steps have trained them from there.)"
            )
    if chosen:
        said += (
            " Examples that were held back chose one number that multiplies the widths of both, "
            "posterior and prior."
        )
    return said


def prior_finding(posterior: Subject, blocks: Sequence[Contraction]) -> Finding | None:
    """Return the warning about a posterior that is its prior, if it is."""
    program = posterior.model.program
    return prior_dominated(
        blocks,
        trained=has_trained_widths(program),
        chosen=moved_width(posterior),
        relative=innermost(program).options.unit == "row",
    )


def could_settle(program: Program) -> bool:
    """Return whether curvature could set the widths, which then have a closed optimum."""
    closed = program.supports.closed_scales and program.previous is None
    return closed and has_inputs(program.bank)


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
