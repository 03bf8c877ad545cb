"""Copies of the task heads that a posterior owns."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pyrolora.adapters import FlatFactors


class HeadCopies(nn.ModuleDict):
    """Trainable float32 copies of a network's task heads: one per head, or K per head.

    Parameters
    ----------
    heads
        Name in the network -> the network's head.
    members
        K, where draws choose among several copies; 1: all draws use the same.
    """

    def __init__(self, heads: Mapping[str, nn.Module], members: int) -> None:
        super().__init__({_key(name): _copies(head, members) for name, head in heads.items()})
        self.names = list(heads)
        self.members = members
        self.float().requires_grad_(True)

    def named(self, factors: FlatFactors | None = None) -> dict[str, list[nn.Module]]:
        """Return the copies by their name in the network.

        They are one per head or one per draw of ``factors``; for pooled draws the mean one.
        """
        heads: dict[str, Any] = {name: self[_key(name)] for name in self.names}
        if self.members == 1:
            return {name: [head] for name, head in heads.items()}
        assert factors is not None
        assert factors.members is not None
        chosen = factors.members.flatten().tolist()
        drawn = {name: [head[i] for i in chosen] for name, head in heads.items()}
        return {name: [_mean_of(h)] for name, h in drawn.items()} if factors.pooled else drawn

    def adopt(self, other: HeadCopies, member: int | None = None) -> None:
        """Take the parameters of ``other``; with ``member``, as those of that copy."""
        if member is None:
            self.load_state_dict(other.state_dict())
            return
        for key, head in other.items():
            self.get_submodule(f"{key}.{member}").load_state_dict(head.state_dict())


def _copies(head: nn.Module, members: int) -> nn.Module:
    copies = [copy.deepcopy(head) for _ in range(members)]
    return copies[0] if members == 1 else nn.ModuleList(copies)


def _mean_of(heads: Sequence[nn.Module]) -> nn.Module:
    """Return a head whose parameters are the means of those of ``heads``."""
    mean = copy.deepcopy(heads[0])
    with torch.no_grad():
        for parameter, *others in zip(
            mean.parameters(), *(h.parameters() for h in heads), strict=True
        ):
            parameter.copy_(torch.stack(others).mean(0))
    return mean


def _key(name: str) -> str:
    """Return a module's name as a key of ``ModuleDict``, which takes no dots."""
    return name.replace(".", "-")
