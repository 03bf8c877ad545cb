"""The bank: flat vectors to matrices and back, scaled factors, and how the means start."""

from __future__ import annotations

import math
from dataclasses import replace

import peft
import pytest
import scipy.stats
import torch
from problems import bert
from torch import nn

from pyrolora.adapters import AdapterBank, Block, FlatFactors, LayerSpec, Layout, attach
from pyrolora.adapters.config import AdapterConfig, RankAllocation

# Layers of several shapes, ranks and scalings, such that equal shapes are not neighbours.
SPECS = [
    LayerSpec("a", 4, 6, 2, 1.0),
    LayerSpec("b", 5, 3, 3, 2.0),
    LayerSpec("c", 4, 6, 2, 0.5),
    LayerSpec("d", 4, 3, 1, 4.0),
    LayerSpec("e", 5, 6, 3, 0.25),
]
EQUAL = [LayerSpec(s.name, s.in_features, s.out_features, s.rank, 1.5) for s in SPECS]


def bank(specs=SPECS, **options):
    return AdapterBank(specs, AdapterConfig(**options))


def random_factors(of, draws_a=(), draws_b=()):
    return FlatFactors(
        torch.randn(*draws_a, of.layouts["A"].total), torch.randn(*draws_b, of.layouts["B"].total)
    )


def named(layout, flat):
    """Block name -> matrix, by slicing; the reference for everything below."""
    found, start = {}, 0
    for block in layout.blocks:
        size = block.rank * block.columns
        piece = flat[..., start : start + size]
        found[block.name] = piece.reshape(*flat.shape[:-1], block.rank, block.columns)
        start += size
    assert start == flat.shape[-1] == layout.total
    return found


# The layout ------------------------------------------------------------------------------------


def test_a_layout_holds_every_block_once_with_equal_shapes_as_neighbours():
    layout = bank().layouts["A"]
    assert [block.layer for block in layout.blocks] == ["a", "c", "b", "e", "d"]
    assert [group.shape for group in layout.groups] == [(2, 2, 4), (2, 3, 5), (1, 1, 4)]
    assert layout.total == sum(s.rank * s.in_features for s in SPECS)
    assert layout.rank == 3
    assert len(layout) == 5


def test_the_layout_of_b_holds_the_transposes():
    layout = bank().layouts["B"]
    shapes = {block.layer: (block.rank, block.columns) for block in layout.blocks}
    assert shapes == {s.name: (s.rank, s.out_features) for s in SPECS}


def test_the_layout_of_both_factors_has_those_of_a_first():
    """Also where a block of A and a block of B have one shape: they stay apart."""
    both = bank().layout("AB")
    a, b = bank().layout("A"), bank().layout("B")
    assert both.blocks == [*a.blocks, *b.blocks]
    assert both.groups == (*a.groups, *b.groups)
    square = Layout([Block("x", "A", 2, 4)]) + Layout([Block("x", "B", 2, 4)])
    assert [group.shape for group in square.groups] == [(1, 2, 4), (1, 2, 4)]
    assert [block.name for block in square.blocks] == ["x.A", "x.B"]


@pytest.mark.parametrize("draws", [(), (3,), (2, 3)])
@pytest.mark.parametrize("latent", ["A", "B"])
def test_matrices_of_a_flat_vector_are_its_slices_by_layer(latent, draws):
    layout = bank().layout(latent)
    flat = torch.randn(*draws, layout.total)
    expected = named(layout, flat)
    actual = layout.matrices(flat)
    assert set(actual) == {s.name for s in SPECS}
    for name, matrix in actual.items():
        assert torch.equal(matrix, expected[f"{name}.{latent}"])


@pytest.mark.parametrize("latent", ["A", "B"])
def test_flattening_the_matrices_in_the_layouts_order_gives_the_vector_back(latent):
    layout = bank().layout(latent)
    flat = torch.randn(3, layout.total)
    matrices = layout.matrices(flat)
    again = torch.cat([matrices[block.layer].flatten(-2) for block in layout.blocks], dim=-1)
    assert torch.equal(again, flat)


@pytest.mark.parametrize("latent", ["A", "B", "AB"])
@pytest.mark.parametrize("draws", [(), (3,)])
def test_transform_multiplies_each_block_by_the_leading_part_of_its_own_matrix(latent, draws):
    layout = bank().layout(latent)
    per_block = torch.randn(*draws, len(layout), layout.rank, layout.rank)
    flat = torch.randn(*draws, layout.total)
    actual = named(layout, layout.transform(per_block, flat))
    before = named(layout, flat)
    for i, block in enumerate(layout.blocks):
        r = block.rank
        expected = per_block[..., i, :r, :r] @ before[block.name]
        torch.testing.assert_close(actual[block.name], expected)


@pytest.mark.parametrize("latent", ["A", "B", "AB"])
@pytest.mark.parametrize("draws", [(), (3,)])
def test_scale_multiplies_each_block_by_its_own_number(latent, draws):
    layout = bank().layout(latent)
    per_block = torch.randn(*draws, len(layout))
    flat = torch.randn(*draws, layout.total)
    actual = named(layout, layout.scale(per_block, flat))
    before = named(layout, flat)
    for i, block in enumerate(layout.blocks):
        expected = per_block[..., i, None, None] * before[block.name]
        torch.testing.assert_close(actual[block.name], expected)


def test_the_rank_mask_marks_the_rows_that_each_block_has():
    layout = bank().layout("A")
    expected = [[row < block.rank for row in range(3)] for block in layout.blocks]
    assert layout.rank_mask().tolist() == expected
    assert layout.rank_mask().sum(1).tolist() == [2, 2, 3, 3, 1]


# Factors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draws_a", "draws_b"), [((), ()), ((3,), ()), ((), (3,)), ((3,), (3,))], ids=str
)
def test_draws_are_counted_and_indexed_on_the_factors_that_have_them(draws_a, draws_b):
    factors = random_factors(bank(), draws_a, draws_b)
    assert factors.draws == (3 if draws_a or draws_b else None)
    one = factors[1]
    assert one.draws is None
    assert torch.equal(one.A, factors.A[1] if draws_a else factors.A)
    assert torch.equal(one.B, factors.B[1] if draws_b else factors.B)
    assert factors[:2].draws == (2 if draws_a or draws_b else None)


@pytest.mark.parametrize("draws", [(), (3,)])
def test_matrices_are_a_and_b_of_each_layer_unscaled(draws):
    of = bank()
    factors = random_factors(of, draws, draws)
    A, B = named(of.layouts["A"], factors.A), named(of.layouts["B"], factors.B)
    found = of.matrices(factors)
    assert list(found) == [s.name for s in SPECS]
    for spec in SPECS:
        a, b = found[spec.name]
        assert a.shape == (*draws, spec.rank, spec.in_features)
        assert b.shape == (*draws, spec.out_features, spec.rank)
        assert torch.equal(a, A[f"{spec.name}.A"])
        assert torch.equal(b.mT, B[f"{spec.name}.B"])


@pytest.mark.parametrize("specs", [SPECS, EQUAL], ids=["differing", "equal"])
@pytest.mark.parametrize(
    ("draws_a", "draws_b"), [((), ()), ((3,), ()), ((), (3,)), ((3,), (3,))], ids=str
)
def test_layer_factors_hold_a_and_the_scaled_transpose_of_b(specs, draws_a, draws_b):
    """The update of a layer's weight, s B A, is the product of what the layer receives."""
    of = bank(specs)
    factors = random_factors(of, draws_a, draws_b)
    matrices = of.matrices(factors)
    found = of.layer_factors(factors, torch.float32)
    assert list(found) == [s.name for s in specs]
    for spec in specs:
        A, B = matrices[spec.name]
        torch.testing.assert_close(found[spec.name].A, A)
        torch.testing.assert_close(found[spec.name].sB, spec.scaling * B.mT)
        assert found[spec.name].A.shape == (*draws_a, spec.rank, spec.in_features)
        assert found[spec.name].sB.shape == (*draws_b, spec.rank, spec.out_features)


def test_layer_factors_are_scaled_in_float32_and_cast_once():
    """bfloat16(s · B), not bfloat16(s) · bfloat16(B), which rounds three times."""
    of = bank([LayerSpec("a", 64, 64, 8, 1 / 3), LayerSpec("b", 64, 64, 8, 0.7)])
    factors = random_factors(of)
    B = of.matrices(factors)
    for name, found in of.layer_factors(factors, torch.bfloat16).items():
        expected = (of.specs[name].scaling * B[name][1].mT).bfloat16()
        assert found.A.dtype == torch.bfloat16
        assert torch.equal(found.sB, expected)


def test_layer_factors_carry_the_configured_dropout():
    of = bank(lora_dropout=0.25)
    found = of.layer_factors(of.means(), torch.float32)
    assert {factors.dropout for factors in found.values()} == {0.25}


def test_gradients_flow_back_to_both_means_with_differing_scalings():
    of = bank()
    found = of.layer_factors(of.means(), torch.float32)
    sum(f.A.sum() + f.sB.sum() for f in found.values()).backward()
    grad_a, grad_b = (parameter.grad for parameter in of.parameters())
    assert torch.equal(grad_a, torch.ones(of.layouts["A"].total))
    expected = {f"{s.name}.B": s.scaling for s in SPECS}
    for name, grad in named(of.layouts["B"], grad_b).items():
        assert torch.equal(grad, torch.full_like(grad, expected[name]))


@pytest.mark.parametrize("latent", ["A", "B", "AB"])
@pytest.mark.parametrize("draws", [(), (3,)])
def test_a_shift_moves_the_means_of_the_latent_factors_only(latent, draws):
    of = bank()
    layout, means = of.layout(latent), of.means()
    delta = torch.randn(*draws, layout.total)
    shifted = of.shifted(latent, delta)
    shift = named(layout, delta)
    for factor, flat, mean in (("A", shifted.A, means.A), ("B", shifted.B, means.B)):
        actual, start = named(of.layouts[factor], flat), named(of.layouts[factor], mean)
        for name, matrix in actual.items():
            expected = start[name] + shift[name] if factor in latent else start[name]
            torch.testing.assert_close(matrix, expected)


# Draws that are members, that have noise, or that are pooled --------------------------------------


def of_members(of, members):
    """The factors of each of three members, and a draw for each number in ``members``."""
    each = random_factors(of, (3,), (3,))
    index = torch.tensor(members)
    return FlatFactors(each.A[index], each.B[index], index), each


def test_draws_may_differ_in_member_or_in_noise_alone():
    A, B = torch.randn(5), torch.randn(4)
    assert FlatFactors(A, B).draws is None
    assert FlatFactors(A, B, members=torch.tensor(1), seeds=torch.tensor(7)).draws is None
    assert FlatFactors(A, B, seeds=torch.arange(6)).draws == 6
    assert FlatFactors(A, B, members=torch.arange(3)).draws == 3


def test_an_index_takes_member_and_seed_along():
    of = bank()
    factors, _ = of_members(of, [0, 2, 1])
    factors = replace(factors, seeds=torch.tensor([5, 6, 7]), noise_scale=0.1)
    one, two = factors[1], factors[1:]
    assert (one.draws, int(one.members), int(one.seeds), one.noise_scale) == (None, 2, 6, 0.1)
    assert (two.draws, two.members.tolist(), two.seeds.tolist()) == (2, [2, 1], [6, 7])
    assert torch.equal(two.A, factors.A[1:])
    assert torch.equal(one.B, factors.B[1])


def test_cut_draws_join_again():
    of = bank()
    factors, _ = of_members(of, [0, 0, 2, 1])
    factors = replace(factors, seeds=torch.arange(4))
    again = FlatFactors.cat([factors[:1], factors[1:]])
    for name in ("A", "B", "members", "seeds"):
        assert torch.equal(getattr(again, name), getattr(factors, name))
    shared = random_factors(of, (4,))  # B is the same for all draws
    again = FlatFactors.cat([shared[:3], shared[3:]])
    assert torch.equal(again.A, shared.A)
    assert torch.equal(again.B, shared.B)


@pytest.mark.parametrize(
    ("members", "chosen", "counts"),
    [
        ([0, 0, 1, 2, 2, 2], [0, 2, 3], [2, 1, 3]),
        ([0, 1, 0], [0, 1, 2], [1, 1, 1]),
        ([2], [0], [1]),
    ],
)
def test_neighbours_of_one_member_are_one_setting(members, chosen, counts):
    factors, each = of_members(bank(), members)
    settings, found = factors.distinct()
    assert found.tolist() == counts
    assert settings.members.tolist() == [members[i] for i in chosen]
    assert torch.equal(settings.A, each.A[settings.members])
    assert torch.equal(settings.members.repeat_interleave(found), factors.members)


def test_a_point_that_is_repeated_is_one_setting():
    of = bank()
    point = random_factors(of)
    expanded = FlatFactors(point.A.expand(7, -1), point.B.expand(7, -1))
    settings, counts = expanded.distinct()
    assert (settings.draws, counts.tolist()) == (1, [7])
    assert torch.equal(settings[0].A, point.A)


def test_draws_and_noise_are_settings_of_their_own():
    of = bank()
    point = random_factors(of)
    drawn = random_factors(of, (4,))
    assert drawn.distinct()[0] is drawn
    assert drawn.distinct()[1].tolist() == [1, 1, 1, 1]
    noisy = FlatFactors(point.A.expand(3, -1), point.B.expand(3, -1), seeds=torch.arange(3))
    assert noisy.distinct()[1].tolist() == [1, 1, 1]
    member, _ = of_members(of, [1, 1])
    noisy = replace(member, seeds=torch.arange(2))
    assert noisy.distinct()[1].tolist() == [1, 1]


@pytest.mark.parametrize("specs", [SPECS, EQUAL], ids=["differing", "equal"])
def test_pooled_draws_are_the_mean_of_their_updates(specs):
    """One setting, of rank S r unless the layer has less; the mean of the factors would be
    another."""
    of = bank(specs)
    each = random_factors(of, (3,), (3,))
    pooled = replace(each, pooled=True)
    assert (each.draws, pooled.draws) == (3, None)
    layers, matrices = of.layer_factors(pooled, torch.float32), of.matrices(pooled)
    norms = of.update_norms(pooled)
    for i, (name, (A, B)) in enumerate(of.matrices(each).items()):
        spec = of.specs[name]
        update = (B @ A).mean(0)
        own_a, own_b = matrices[name]
        rank = min(3 * spec.rank, spec.in_features, spec.out_features)
        assert own_a.shape == (rank, spec.in_features)
        torch.testing.assert_close(own_b @ own_a, update)
        torch.testing.assert_close(layers[name].sB.mT @ layers[name].A, spec.scaling * update)
        torch.testing.assert_close(norms[i], spec.scaling * update.norm(), atol=1e-5, rtol=1e-4)
        assert (B.mean(0) @ A.mean(0) - update).abs().max() > 0.1


def test_update_norms_are_those_of_the_products():
    of = bank()
    factors = random_factors(of, (4,))
    norms = of.update_norms(factors)
    assert norms.shape == (4, len(SPECS))
    for i, (name, (A, B)) in enumerate(of.matrices(factors).items()):
        expected = of.specs[name].scaling * torch.linalg.matrix_norm(B @ A)
        torch.testing.assert_close(norms[:, i], expected, atol=1e-5, rtol=1e-4)


def test_noise_reaches_every_layer_with_a_stream_of_its_own():
    of = bank()
    factors = replace(random_factors(of), seeds=torch.tensor([3, 9]), noise_scale=0.5)
    noises = [found.noise for found in of.layer_factors(factors, torch.float32).values()]
    assert [noise.seeds for noise in noises] == [(3, 9)] * len(SPECS)
    assert {noise.scale for noise in noises} == {0.5}
    assert len({noise.stream for noise in noises}) == len(SPECS)
    silent = of.layer_factors(replace(factors, noise_scale=0.0), torch.float32)
    assert all(found.noise is None for found in silent.values())


# How the means start ---------------------------------------------------------------------------

LARGE = [LayerSpec("x", 900, 40, 8, 2.0), LayerSpec("y", 400, 40, 4, 2.0)]


@pytest.mark.parametrize("name", ["kaiming", "gaussian"])
def test_b_starts_at_zero(name):
    assert (bank(LARGE, init_lora_weights=name).means().B == 0).all()


@pytest.mark.parametrize("name", ["kaiming", "gaussian"])
def test_the_means_are_two_float32_parameters(name):
    of = bank(LARGE, init_lora_weights=name)
    parameters = list(of.parameters())
    assert [p.numel() for p in parameters] == [of.layouts["A"].total, of.layouts["B"].total]
    assert all(p.dtype == torch.float32 and p.requires_grad for p in parameters)


def test_kaiming_is_uniform_up_to_one_over_the_root_of_the_inputs():
    of = bank(LARGE, init_lora_weights="kaiming")
    for name, (a, _) in of.matrices(of.means()).items():
        bound = 1 / math.sqrt(of.specs[name].in_features)
        assert a.abs().max() <= bound
        law = scipy.stats.uniform(-bound, 2 * bound)
        assert scipy.stats.kstest(a.detach().flatten().numpy(), law.cdf).pvalue > 1e-3


def test_gaussian_is_normal_with_standard_deviation_one_over_the_rank():
    of = bank(LARGE, init_lora_weights="gaussian")
    for name, (a, _) in of.matrices(of.means()).items():
        law = scipy.stats.norm(0, 1 / of.specs[name].rank)
        assert scipy.stats.kstest(a.detach().flatten().numpy(), law.cdf).pvalue > 1e-3


@pytest.mark.parametrize(("ours", "pefts"), [("kaiming", True), ("gaussian", "gaussian")])
def test_the_start_has_the_law_of_pefts(ours, pefts):
    """Two-sample Kolmogorov-Smirnov on 4 x 300 weights each; PEFT's B is zero as well."""
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=pefts)
    network = peft.get_peft_model(nn.Sequential(nn.Linear(300, 20)), config)
    layer = network.base_model.model[0]
    spec = LayerSpec("0", 300, 20, 4, 2.0)
    of = bank([spec], r=4, init_lora_weights=ours)
    theirs = layer.lora_A["default"].weight.detach().flatten().numpy()
    test = scipy.stats.ks_2samp(of.means().A.detach().numpy(), theirs)
    assert test.pvalue > 1e-3
    assert (layer.lora_B["default"].weight == 0).all()


def test_the_test_of_the_start_tells_the_two_initialisers_apart():
    """Otherwise passing it would show nothing."""
    kaiming, gaussian = (
        bank(LARGE, init_lora_weights=name).means().A.detach().numpy()
        for name in ("kaiming", "gaussian")
    )
    assert scipy.stats.ks_2samp(kaiming, gaussian).pvalue < 1e-6


def test_the_bank_of_an_attachment_fits_its_layers():
    network = bert()
    config = AdapterConfig(r=4, target_modules="all-linear", rank_pattern={"query": 2})
    attachment = attach(network, config)
    of = AdapterBank(attachment.specs, config)
    for name, (A, B) in of.matrices(of.means()).items():
        W = attachment.layers[name].weight
        assert (B @ A).shape == W.shape
        assert A.shape[0] == (2 if name.endswith("query") else 4)


# Ranks that are idle ---------------------------------------------------------------------------


def allocated(specs=SPECS, growth=2.0, schedule="move", **options):
    allocation = RankAllocation(growth=growth, schedule=schedule)
    return AdapterBank(specs, AdapterConfig(rank_allocation=allocation, **options))


def some_active(of):
    """A mask that is not the start, and not the leading ranks."""
    mask = of.slots() & (torch.rand(of.slots().shape) < 0.5)
    mask[:, 0] |= ~mask.any(-1)
    return mask


def test_a_uniform_bank_has_the_tensors_that_it_had():
    assert list(bank().state_dict()) == ["A_loc", "B_loc"]
    assert bank().active is None
    assert bank().ranks() == {s.name: s.rank for s in SPECS}


def test_layers_start_with_their_ranks_and_have_slots_for_more():
    of = allocated()
    assert of.ranks() == {s.name: s.rank for s in SPECS}
    sizes = {s.name: min(2 * s.rank, s.in_features, s.out_features) for s in SPECS}
    assert dict(zip(of.specs, of.slots().sum(-1).tolist(), strict=True)) == sizes
    assert {b.layer: b.rank for b in of.layouts["B"].blocks} == sizes
    for name, (A, B) in of.matrices(of.means()).items():
        spec = of.specs[name]
        assert A.shape == (spec.rank, spec.in_features)
        assert B.shape == (spec.out_features, spec.rank)
        assert (A != 0).all()
    assert (of.means().A[~of.entries("A")] == 0).all()


def test_what_will_be_pruned_starts_with_every_slot_in_use():
    of = allocated(schedule="prune")
    assert torch.equal(of.mask(), of.slots())
    assert of.budget() == sum(s.rank for s in SPECS) < sum(of.ranks().values())
    for A, B in of.matrices(of.means()).values():
        assert (A != 0).all()
        assert not B.any()


@pytest.mark.parametrize("schedule", ["move", "prune"])
def test_the_law_of_the_start_is_that_of_the_rank_not_of_the_slots(schedule):
    of = allocated(LARGE, init_lora_weights="gaussian", schedule=schedule)
    of.activate(of.slots())
    for name, (A, _) in of.matrices(of.means()).items():
        assert len(A) == 2 * of.specs[name].rank
        law = scipy.stats.norm(0, 1 / of.specs[name].rank)
        assert scipy.stats.kstest(A.detach().flatten().numpy(), law.cdf).pvalue > 1e-3


@pytest.mark.parametrize("specs", [SPECS, EQUAL], ids=["differing", "equal"])
@pytest.mark.parametrize("draws", [(), (3,)])
def test_idle_ranks_add_nothing_and_get_no_gradient(specs, draws):
    of = allocated(specs)
    of.activate(some_active(of))
    flat = random_factors(of, draws, draws)
    A, B = flat.A.requires_grad_(), flat.B.requires_grad_()
    found = of.layer_factors(FlatFactors(A, B), torch.float32)
    matrices = of.matrices(FlatFactors(A, B))
    for name, spec in of.specs.items():
        own_a, own_b = matrices[name]
        assert own_a.shape[-2] == of.ranks()[name]
        update = found[name].sB.mT @ found[name].A
        torch.testing.assert_close(update, spec.scaling * (own_b @ own_a))
    sum((f.sB.mT @ f.A).square().sum() for f in found.values()).backward()
    for factor, tensor in (("A", A), ("B", B)):
        active = of.entries(factor)
        assert (tensor.grad[..., ~active] == 0).all()
        assert (tensor.grad[..., active] != 0).all()


def test_a_rank_that_comes_leaves_the_function_and_one_that_goes_leaves_zeros():
    of = allocated()
    of.assign("B_loc", of.kept("B", torch.randn(of.layouts["B"].total)))
    before = {n: B @ A for n, (A, B) in of.matrices(of.means()).items()}
    start = {n: (A.clone(), B.clone()) for n, (A, B) in of.matrices(of.means()).items()}
    mask = of.mask().clone()
    mask[0, 2], mask[1, 1] = True, False  # "a" has two of four, "b" three of three
    changed = of.activate(mask)
    after = of.matrices(of.means())
    torch.testing.assert_close(after["a"][1] @ after["a"][0], before["a"])
    assert torch.equal(after["a"][0][:2], start["a"][0])
    assert (after["a"][0][2] != 0).all()
    assert torch.equal(after["b"][0], start["b"][0][[0, 2]])
    assert torch.equal(after["b"][1], start["b"][1][:, [0, 2]])
    assert changed["A_loc"].sum() == 4 + 5
    assert changed["B_loc"].sum() == 6 + 3
    for factor in "AB":
        loc = of.get_parameter(f"{factor}_loc")
        assert (loc[~of.entries(factor)] == 0).all()
    mask[1, 1], mask[1, 2] = True, False  # back again: another row, and B at zero
    of.activate(mask)
    A, B = of.matrices(of.means())["b"]
    assert (A[1] != start["b"][0][1]).any()
    assert (B[:, 1] == 0).all()


def test_pooled_draws_of_active_ranks_are_the_mean_of_their_updates():
    of = allocated()
    of.activate(some_active(of))
    each = random_factors(of, (3,), (3,))
    pooled = replace(each, pooled=True)
    layers, matrices = of.layer_factors(pooled, torch.float32), of.matrices(pooled)
    for name, (A, B) in of.matrices(each).items():
        update = (B @ A).mean(0)
        torch.testing.assert_close(matrices[name][1] @ matrices[name][0], update)
        expected = of.specs[name].scaling * update
        torch.testing.assert_close(layers[name].sB.mT @ layers[name].A, expected)
