"""Which ranks are active after a round: from the importance of each of them."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def pruned(importance: Tensor, active: Tensor, budget: int) -> Tensor:
    """Return the ``budget`` most important ranks, or more: every layer keeps its best one.

    Parameters
    ----------
    importance
        (L, r_max), read for active ranks alone.
    active
        (L, r_max) booleans.
    budget
        The number of ranks that stay active.

    Returns
    -------
    Tensor
        (L, r_max) booleans.
    """
    surplus = max(0, int(active.sum()) - budget)
    return _without(active, _least(importance, active)[:surplus])


def moved(importance: Tensor, active: Tensor, slots: Tensor, share: float) -> Tensor:
    """Return the ranks that are active after a round that moves some.

    The least important ranks, a ``share`` of all active ones and one at least, lose their place;
    every layer keeps its best one. Layers that lost none get as many, in turn, the one of the
    highest mean importance first, while they have slots; where these are too few, fewer move.

    Parameters
    ----------
    importance
        (L, r_max), read for active ranks alone.
    active
        (L, r_max) booleans.
    slots
        (L, r_max) booleans: the ranks that a layer has room for.
    share
        In (0, 1].

    Returns
    -------
    Tensor
        (L, r_max) booleans, as many of them true as of ``active``.
    """
    losers = _least(importance, active)[: max(1, round(share * int(active.sum())))]
    free = (slots & ~active).sum(-1).tolist()
    while losers and _room(free, losers) < len(losers):
        losers.pop()
    after = _without(active, losers)
    means = torch.where(active, importance, 0.0).sum(-1) / active.sum(-1)
    lost = {layer for layer, _ in losers}
    takers = [i for i in means.argsort(descending=True, stable=True).tolist() if i not in lost]
    left = len(losers)
    for layer in itertools.cycle(takers) if left else ():
        vacant = (slots[layer] & ~after[layer]).nonzero()
        if len(vacant):
            after[layer, vacant[0]] = True
            left -= 1
        if left == 0:
            break
    return after


def _least(importance: Tensor, active: Tensor) -> list[tuple[int, int]]:
    """Return (layer, rank) of the active ranks, least important first, but each layer's best."""
    best = importance.masked_fill(~active, -torch.inf).argmax(-1).tolist()
    places = [(i, k) for i, k in active.nonzero().tolist() if k != best[i]]
    return sorted(places, key=lambda place: float(importance[place]))


def _without(active: Tensor, losers: list[tuple[int, int]]) -> Tensor:
    after = active.clone()
    for layer, rank in losers:
        after[layer, rank] = False
    return after


def _room(free: list[int], losers: list[tuple[int, int]]) -> int:
    """Return how many ranks fit into the layers that lose none."""
    lost = {layer for layer, _ in losers}
    return sum(count for layer, count in enumerate(free) if layer not in lost)
