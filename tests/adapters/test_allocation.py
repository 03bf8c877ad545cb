"""One round of moving ranks: what every move keeps, and which ranks go where."""

from __future__ import annotations

import pytest
import torch

from pyrolora.adapters import moved, pruned


def case(layers, most, seed):
    """Importance, active ranks, slots: all random, with one active rank a layer at least."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, most + 1, (layers, 1), generator=generator)
    slots = torch.arange(most) < sizes
    active = slots & (torch.rand(layers, most, generator=generator) < 0.6)
    active[:, 0] = True
    importance = torch.randn(layers, most, generator=generator).masked_fill(~active, torch.nan)
    return importance, active, slots


@pytest.mark.parametrize("share", [0.01, 0.2, 0.6, 1.0])
@pytest.mark.parametrize("seed", range(25))
def test_a_move_keeps_the_budget_the_slots_and_a_rank_of_every_layer(seed, share):
    importance, active, slots = case(layers=6, most=5, seed=seed)
    after = moved(importance, active, slots, share)
    assert after.sum() == active.sum()
    assert not (after & ~slots).any()
    assert after.any(-1).all()
    lost, won = (active & ~after), (after & ~active)
    assert not (lost.any(-1) & won.any(-1)).any(), "a layer lost and won"
    assert lost.sum() <= max(1, round(share * int(active.sum())))
    best = importance.nan_to_num(-torch.inf).argmax(-1)
    assert after[torch.arange(6), best].all(), "a layer's best rank went"


@pytest.mark.parametrize("seed", range(10))
def test_what_is_lost_is_worth_least_of_what_may_be_lost(seed):
    importance, active, slots = case(layers=6, most=5, seed=seed)
    lost = active & ~moved(importance, active, slots, 0.2)
    best = importance.nan_to_num(-torch.inf).argmax(-1)
    may = active.clone()
    may[torch.arange(6), best] = False
    kept = may & ~lost
    if lost.any() and kept.any():
        assert importance[lost].max() <= importance[kept].min()


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("budget", [0, 6, 9, 14, 99])
def test_pruning_leaves_the_best_of_all_layers_and_one_of_each(seed, budget):
    importance, active, _ = case(layers=6, most=5, seed=seed)
    after = pruned(importance, active, budget)
    assert after.sum() == min(int(active.sum()), max(budget, 6))
    assert not (after & ~active).any()
    best = importance.nan_to_num(-torch.inf).argmax(-1)
    assert after[torch.arange(6), best].all(), "a layer's best rank went"
    lost, kept = active & ~after, after.clone()
    kept[torch.arange(6), best] = False
    if lost.any() and kept.any():
        assert importance[lost].max() <= importance[kept].min()


def test_the_lost_ranks_go_in_turn_to_layers_that_lost_none():
    importance = torch.tensor(
        [[0.1, 0.2, 0.3, 9.0], [5.0, 5.0, 0, 0], [7.0, 6.0, 0, 0], [6.0, 6.5, 0, 0]]
    )
    active = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]).bool()
    slots = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    after = moved(importance, active, slots, 0.3)  # three of ten
    assert after.sum(-1).tolist() == [1, 3, 3, 3]
    after = moved(importance, active, slots, 0.1)
    assert after.sum(-1).tolist() == [3, 2, 3, 2], "the highest mean first"
    assert after[0].tolist() == [False, True, True, True]
    slots[1, 2:] = False
    assert moved(importance, active, slots, 0.3).sum(-1).tolist() == [1, 2, 3, 4]


def test_nothing_moves_where_nobody_can_take_it():
    importance, active = torch.randn(3, 2), torch.ones(3, 2, dtype=torch.bool)
    assert torch.equal(moved(importance, active, active, 0.5), active)


def test_less_moves_where_little_room_is_left():
    importance = torch.tensor([[0.0, 0.1, 0.2, 0.3], [5.0, 5.0, 5.0, 0.0]])
    active = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    after = moved(importance, active, torch.ones(2, 4).bool(), 0.4)
    assert after.sum(-1).tolist() == [3, 4]


def test_a_layer_of_one_rank_keeps_it_however_little_it_is_worth():
    importance = torch.tensor([[-9.0, 0.0], [1.0, 2.0], [3.0, 4.0]])
    active = torch.tensor([[1, 0], [1, 1], [1, 1]]).bool()
    after = moved(importance, active, torch.ones(3, 2).bool(), 0.2)
    assert after.tolist() == [[True, True], [False, True], [True, True]]
