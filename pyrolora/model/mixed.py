"""One pass through a network for the rows of several posteriors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrolora.adapters import FlatFactors, Portion, SharedPassError, mixed_binding
from pyrolora.columns import Batch
from pyrolora.model.joint import JointModel


@dataclass(frozen=True)
class Share:
    """The draws of one posterior, and the number of rows of a mixed batch that they read.

    Attributes
    ----------
    joint
        The joint model.
    factors
        The factors of S draws, or of one setting.
    size
        b, its rows, which are neighbours in the batch.
    """

    joint: JointModel
    factors: FlatFactors
    size: int

    @property
    def mixes(self) -> bool:
        """Whether its rows can stand beside those of others.

        Draws with noise on the weights cannot, nor those that are linearised, or whose posterior
        owns the network.
        """
        joint = self.joint
        return bool(joint.attachment.layers) and self.factors.seeds is None and not joint.linearises

    def portion(self) -> Portion:
        """Return the factors and heads by name."""
        joint = self.joint
        names: dict[Any, str] = {layer: name for name, layer in joint.attachment.layers.items()}
        factors = joint.binding(self.factors).factors
        return Portion(
            {names[layer]: bound for layer, bound in factors.items()},
            joint.named_heads(self.factors),
            self.factors.draws or 1,
            self.size,
        )

    def narrowed(self, output: Tensor) -> Tensor:
        """Return the columns of its own classes, where a network with heads had others to give."""
        if not self.joint.attachment.heads:
            return output
        base: Any = self.joint.base
        return output[..., : base.config.num_labels]


def mixed_pass(shares: Sequence[Share], batch: Batch) -> list[Tensor] | None:
    """Return the outputs (S, b, ...) of every share, from one pass of Σ S b rows.

    It runs the first share's network; the others have the same one, but for heads.

    Parameters
    ----------
    shares
        The shares, which all mix, in the order of their rows.
    batch
        The rows of all shares, Σ b of them.

    Returns
    -------
    list of Tensor or None
        None where rows of several posteriors cannot share a pass through this network.
    """
    carrier = shares[0].joint
    if not carrier.together(batch, several_heads=True):
        return None
    device = next(iter(batch.values())).device
    starts, numbers = 0, []
    for share in shares:
        rows = torch.arange(starts, starts + share.size, device=device)
        numbers.append(rows.repeat(share.factors.draws or 1))
        starts += share.size
    index = torch.cat(numbers)
    repeated = {n: t[index] if isinstance(t, Tensor) else t for n, t in batch.items()}
    portions = [share.portion() for share in shares]
    attachment = carrier.attachment
    binding = mixed_binding(portions, attachment.layers, attachment.heads)
    try:
        output = carrier.run(repeated, binding)
    except SharedPassError:
        carrier.keep_apart(several_heads=True)
        return None
    if not carrier.fits(binding, several_heads=True):
        return None
    pieces = output.split([portion.rows for portion in portions])
    return [
        share.narrowed(piece).unflatten(0, (portion.draws, portion.examples))
        for piece, portion, share in zip(pieces, portions, shares, strict=True)
    ]
