"""One pass through a network for the rows of several posteriors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyrolora.adapters import (
    AnyFactors,
    Binding,
    FlatFactors,
    LaterFactors,
    Portion,
    SharedPassError,
    mixed_binding,
)
from pyrolora.columns import Batch
from pyrolora.guides import GaussianHead
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
    like
        A share that differs in size alone, and may know its factors by name already.
    """

    joint: JointModel
    factors: AnyFactors
    size: int
    like: Share | None = None

    @property
    def mixes(self) -> bool:
        """Whether its rows can stand beside those of others.

        Draws with noise on the weights cannot, nor those that are linearised, that are made some at
        a time, or whose posterior owns the network.
        """
        joint = self.joint
        if isinstance(self.factors, LaterFactors) or joint.linearises:
            return False
        return bool(joint.attachment.layers) and self.factors.seeds is None

    @property
    def whole(self) -> FlatFactors:
        """The factors of all draws, of a share that mixes."""
        assert isinstance(self.factors, FlatFactors), "these draws are made some at a time"
        return self.factors

    @cached_property
    def portion(self) -> Portion:
        """The factors and heads by name."""
        if self.like is not None:
            return replace(self.like.portion, examples=self.size)
        joint = self.joint
        names: dict[Any, str] = {layer: name for name, layer in joint.attachment.layers.items()}
        factors = joint.binding(self.whole).factors
        return Portion(
            {names[layer]: bound for layer, bound in factors.items()},
            joint.named_heads(self.whole),
            self.factors.draws or 1,
            self.size,
        )

    def narrowed(self, output: Tensor) -> Tensor:
        """Return the columns of its own classes, where a network with heads had others to give."""
        if not self.joint.attachment.heads:
            return output
        base: Any = self.joint.base
        return output[..., : base.config.num_labels]


@dataclass(frozen=True)
class Mixture:
    """A pass of Σ S b rows, share after share, and in each share draw after draw.

    It runs the first share's network; the others have the same one, but for heads.

    Attributes
    ----------
    shares
        The shares, which all mix, in the order of their rows.
    """

    shares: Sequence[Share]

    @property
    def carrier(self) -> JointModel:
        """The joint model whose network runs."""
        return self.shares[0].joint

    @property
    def sizes(self) -> list[int]:
        """The number of rows of each share, S b."""
        return [(share.factors.draws or 1) * share.size for share in self.shares]

    def possible(self, batch: Batch) -> bool:
        """Return whether rows of several posteriors can share a pass on data such as ``batch``."""
        return self.carrier.together(batch, several_heads=True)

    def numbers(self) -> Tensor:
        """Return (Σ S b,), the row of a batch of Σ b rows that each row of the pass reads."""
        start, numbers = 0, []
        for share in self.shares:
            rows = torch.arange(start, start + share.size)
            numbers.append(rows.repeat(share.factors.draws or 1))
            start += share.size
        return torch.cat(numbers)

    def binding(self) -> Binding:
        """Return the binding of the pass."""
        attachment = self.carrier.attachment
        portions = [share.portion for share in self.shares]
        drawn = any(isinstance(share.joint.program, GaussianHead) for share in self.shares)
        binding = mixed_binding(portions, attachment.layers, attachment.heads)
        return replace(binding, eager=binding.eager or drawn)

    def fits(self, binding: Binding) -> bool:
        """Return whether the pass called only layers that were seen to allow sharing."""
        return self.carrier.fits(binding, several_heads=True)

    def keep_apart(self) -> None:
        """Let no rows of several posteriors share a pass from now on."""
        self.carrier.keep_apart(several_heads=True)


def mixed_pass(shares: Sequence[Share], batch: Batch) -> list[Tensor] | None:
    """Return the outputs (S, b, ...) of every share, from one pass of Σ S b rows.

    Parameters
    ----------
    shares
        As in `Mixture`.
    batch
        The rows of all shares, Σ b of them.

    Returns
    -------
    list of Tensor or None
        None where rows of several posteriors cannot share a pass through this network.
    """
    mixture = Mixture(shares)
    if not mixture.possible(batch):
        return None
    index = mixture.numbers().to(next(iter(batch.values())).device)
    repeated = {n: t[index] if isinstance(t, Tensor) else t for n, t in batch.items()}
    binding = mixture.binding()
    try:
        output = mixture.carrier.run(repeated, binding)
    except SharedPassError:
        mixture.keep_apart()
        return None
    if not mixture.fits(binding):
        return None
    return [
        share.narrowed(piece).unflatten(0, (share.factors.draws or 1, share.size))
        for piece, share in zip(output.split(mixture.sizes), shares, strict=True)
    ]
