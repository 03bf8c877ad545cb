"""Copies of the task heads that a posterior owns."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

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
        if factors is not None and factors.head is not None:
            return self._drawn(heads, factors.head)
        if self.members == 1:
            return {name: [head] for name, head in heads.items()}
        assert factors is not None
        assert factors.members is not None
        chosen = factors.members.flatten().tolist()
        drawn = {name: [head[i] for i in chosen] for name, head in heads.items()}
        return {name: [_mean_of(h)] for name, h in drawn.items()} if factors.pooled else drawn

    # The last layer ------------------------------------------------------------------------------

    def last_layer(self) -> tuple[str, str] | None:
        """Return the head with the last linear layer, and the layer's path in it; None without.

        The order is that in which the modules were defined.
        """
        for name in reversed(self.names):
            for path, module in reversed([*self[_key(name)].named_modules()]):
                if isinstance(module, nn.Linear):
                    return name, path
        return None

    def last_module(self) -> nn.Linear:
        """Return the last linear layer."""
        name, path = self._last()
        layer = self[_key(name)].get_submodule(path)
        assert isinstance(layer, nn.Linear)
        return layer

    def last_entries(self) -> Tensor:
        """Return the last layer's weight with its bias, if it has one, as the last column."""
        layer = self.last_module()
        if layer.bias is None:
            return layer.weight.detach()
        return torch.cat([layer.weight, layer.bias.unsqueeze(-1)], -1).detach()

    def _last(self) -> tuple[str, str]:
        place = self.last_layer()
        assert place is not None
        return place

    def _drawn(self, heads: Mapping[str, nn.Module], drawn: Tensor) -> dict[str, list[nn.Module]]:
        """Return a copy per draw of the last layer's entries, (P,) or (S, P); all else is shared.

        Heads without that layer come as often.
        """
        last, path = self._last()
        values = drawn.reshape(-1, drawn.shape[-1])
        changed = [
            _with_layer(heads[last], path, _valued(self.last_module(), row)) for row in values
        ]
        return {n: changed if n == last else [h] * len(values) for n, h in heads.items()}

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


def _with_layer(module: nn.Module, path: str, layer: nn.Module) -> nn.Module:
    """Return the module with another layer at ``path``; everything else is the very same."""
    if not path:
        return layer
    child, _, rest = path.partition(".")
    changed = copy.copy(module)
    inner = _with_layer(module.get_submodule(child), rest, layer)
    changed._modules = {**module._modules, child: inner}
    return changed


def _valued(layer: nn.Linear, entries: Tensor) -> nn.Linear:
    """Return the layer with other entries of its weight and bias, (P,)."""
    rows = entries.view(layer.out_features, -1)
    values: dict[str, Any] = {"weight": rows[:, : layer.in_features], "bias": None}
    if layer.bias is not None:
        values["bias"] = rows[:, -1]
    changed = copy.copy(layer)
    # A parameter would cut off the gradient of a draw that has one.
    changed._parameters = {
        name: value if value is None or value.requires_grad else nn.Parameter(value)
        for name, value in values.items()
    }
    return changed


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
