"""The adapted layer computes W x + b + s B A x for what is bound to it, and W x + b otherwise."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from pyrolora.adapters import AdapterLayer, Binding, Factors, HeadSlot, bind, current_binding
from pyrolora.adapters.weight_noise import WeightNoise
from pyrolora.errors import BindingError

IN, OUT, RANK, SCALING, DRAWS = 5, 7, 3, 1.5, 4
BASES = {
    "linear": lambda: nn.Linear(IN, OUT),
    "linear-without-bias": lambda: nn.Linear(IN, OUT, bias=False),
    "conv1d": lambda: Conv1D(OUT, IN),
}
ROWS = {"2-D": (6,), "3-D": (2, 6), "4-D": (2, 3, 2)}


@pytest.fixture(params=BASES.values(), ids=BASES.keys())
def layer(request):
    base = request.param()
    if getattr(base, "bias", None) is not None:
        nn.init.normal_(base.bias)
    return AdapterLayer(base).double().eval()


def dense(layer):
    """(W (out, in), b) of the base."""
    base = layer.base_layer
    weight = base.weight.T if isinstance(base, Conv1D) else base.weight
    bias = base.bias if base.bias is not None else weight.new_zeros(OUT)
    return weight, bias


def matrices(*draws, dtype=torch.float64):
    """A (*draws, r, in) and B (*draws, out, r)."""
    return torch.randn(*draws, RANK, IN, dtype=dtype), torch.randn(*draws, OUT, RANK, dtype=dtype)


def factors(A, B, dropout=0.0):
    return Factors(A, SCALING * B.mT, dropout)


def run(layer, bound, x):
    with bind(Binding({layer: bound})):
        return layer(x)


def test_the_input_may_be_given_by_name(layer):
    x, name = torch.randn(6, IN).double(), "x" if isinstance(layer.base_layer, Conv1D) else "input"
    with bind(Binding({layer: factors(*matrices())})):
        assert torch.equal(layer(**{name: x}), layer(x))


# Values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [*ROWS.values(), ()], ids=[*ROWS, "1-D"])
def test_a_bound_layer_computes_the_base_plus_the_scaled_product(layer, rows):
    W, b = dense(layer)
    A, B = matrices()
    x = torch.randn(*rows, IN, dtype=torch.float64)
    expected = x @ W.T + b + SCALING * (x @ A.T) @ B.T
    torch.testing.assert_close(run(layer, factors(A, B), x), expected)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("latent", ["A", "B", "AB"])
def test_draws_outermost_in_the_batch_equal_draw_by_draw(layer, rows, latent):
    """Which factor is drawn and which is shared makes no difference to the rows of a draw."""
    W, b = dense(layer)
    A = matrices(DRAWS)[0] if "A" in latent else matrices()[0]
    B = matrices(DRAWS)[1] if "B" in latent else matrices()[1]
    x = torch.randn(DRAWS, *rows, IN, dtype=torch.float64)

    actual = run(layer, factors(A, B), x.flatten(0, 1)).unflatten(0, (DRAWS, -1))

    assert actual.shape == (DRAWS, *rows, OUT)
    for s in range(DRAWS):
        A_s, B_s = (t[s] if t.dim() == 3 else t for t in (A, B))
        expected = x[s] @ W.T + b + SCALING * (x[s] @ A_s.T) @ B_s.T
        torch.testing.assert_close(actual[s], expected)


@pytest.mark.parametrize("latent", ["A", "B", "AB"])
def test_one_draw_equals_the_same_factors_without_a_draw_axis(layer, latent):
    A, B = matrices()
    x = torch.randn(2, 6, IN, dtype=torch.float64)
    one = factors(A[None] if "A" in latent else A, B[None] if "B" in latent else B)
    torch.testing.assert_close(run(layer, one, x), run(layer, factors(A, B), x))


@pytest.mark.parametrize("draws", [(), (2,)], ids=["single", "draws"])
def test_inputs_that_are_not_contiguous_give_the_same_result(draws):
    """Of ``nn.Linear``; transformers' ``Conv1D`` itself takes contiguous inputs only."""
    layer = AdapterLayer(nn.Linear(IN, OUT)).double()
    x = torch.randn(6, 4, IN, dtype=torch.float64).transpose(0, 1)
    bound = factors(*matrices(*draws))
    assert not x.is_contiguous()
    torch.testing.assert_close(run(layer, bound, x), run(layer, bound, x.contiguous()))


@pytest.mark.parametrize("draws", [(), (2,)], ids=["single", "draws"])
def test_gradients_reach_factors_and_input_and_agree_with_finite_differences(layer, draws):
    layer.requires_grad_(False)
    A, B = (m.requires_grad_() for m in matrices(*draws))
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda A, B, x: run(layer, factors(A, B), x), (A, B, x))


def test_an_unbound_layer_is_the_base(layer):
    x = torch.randn(2, 6, IN, dtype=torch.float64)
    expected = layer.base_layer(x)
    assert torch.equal(layer(x), expected)
    other = AdapterLayer(nn.Linear(IN, OUT))
    with bind(Binding({other: factors(*matrices())})):
        assert torch.equal(layer(x), expected), "another layer's factors were used"
    with bind(None):
        assert torch.equal(layer(x), expected)


def test_zero_b_leaves_the_base_bit_identical(layer):
    A, B = matrices()
    x = torch.randn(2, 6, IN, dtype=torch.float64)
    actual = run(layer, factors(A, torch.zeros_like(B)), x)
    torch.testing.assert_close(actual, layer.base_layer(x), rtol=1e-14, atol=1e-14)


# Dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [(), (DRAWS,)], ids=["single", "draws"])
@pytest.mark.parametrize("factor_dtype", [torch.bfloat16, torch.float32])
def test_a_bf16_base_stays_bf16_whatever_the_factors_are(draws, factor_dtype):
    """bfloat16 keeps 8 bits: sums of some ten products of size one are right to about 0.1."""
    layer = AdapterLayer(nn.Linear(IN, OUT)).to(torch.bfloat16)
    A, B = matrices(*draws, dtype=factor_dtype)
    x = torch.randn(8, IN, dtype=torch.bfloat16)

    actual = run(layer, factors(A, B), x)

    W, b = layer.base_layer.weight.float(), layer.base_layer.bias.float()
    rows = x.float().unflatten(0, (draws[0] if draws else 1, -1))
    low_rank = (rows @ A.float().mT) @ B.float().mT
    expected = x.float() @ W.T + b + SCALING * low_rank.flatten(0, 1)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=0.03, atol=0.15)


@pytest.mark.parametrize("draws", [(), (DRAWS,)], ids=["single", "draws"])
def test_gradients_of_float32_factors_on_a_bf16_base_are_float32(draws):
    layer = AdapterLayer(nn.Linear(IN, OUT)).to(torch.bfloat16)
    A, B = (m.requires_grad_() for m in matrices(*draws, dtype=torch.float32))
    run(layer, factors(A, B), torch.randn(8, IN, dtype=torch.bfloat16)).float().sum().backward()
    assert A.grad.dtype == B.grad.dtype == torch.float32
    assert A.grad.abs().sum() > 0
    assert B.grad.abs().sum() > 0


@pytest.mark.parametrize("latent", ["A", "B", "AB"])
def test_autocast_runs_the_layer_in_bf16_for_factors_of_that_dtype(latent):
    layer = AdapterLayer(nn.Linear(IN, OUT))
    A, B = matrices(dtype=torch.float32)
    A = A.expand(2, -1, -1) if "A" in latent else A
    B = B.expand(2, -1, -1) if "B" in latent else B
    x = torch.randn(6, IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(layer, factors(A.bfloat16(), B.bfloat16()), x)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), run(layer, factors(A, B), x), rtol=0.05, atol=0.15)


# Noise -----------------------------------------------------------------------------------------


def test_noise_perturbs_the_base_product_alone_and_at_scale_zero_not_at_all(layer):
    """y with noise minus y without is x Eᵀ, with a row of E as large as σ times that of W + s B A;
    the adapter's own product, dropout and all, is what it was."""
    layer.train().requires_grad_(False)
    W, _ = dense(layer)
    A, B = matrices()
    x = torch.randn(2, 6, IN, dtype=torch.float64)

    def noisy(scale, seed=5):
        torch.manual_seed(7)
        return run(layer, Factors(A, SCALING * B.mT, 0.5, WeightNoise((seed,), scale, 0)), x)

    torch.manual_seed(7)
    plain = run(layer, factors(A, B, dropout=0.5), x)
    assert torch.equal(noisy(0.0), plain)
    draws = 200
    changes = torch.stack([noisy(0.1, seed) - plain for seed in range(draws)]).flatten(1, 2)
    rows = x.flatten(0, 1)
    E = (torch.linalg.pinv(rows) @ changes).mT
    torch.testing.assert_close(rows @ E.mT, changes)
    ratios = E.square().sum(-1).mean(0) / (0.01 * (W + SCALING * B @ A).square().sum(-1))
    assert (ratios - 1).abs().max() < 5 * (2 / (draws * IN)) ** 0.5  # means of chi-squares


def test_a_noisy_layer_is_marked_as_used_and_gradients_reach_factors_and_input(layer):
    layer.requires_grad_(False)
    A, B = (m.requires_grad_() for m in matrices(2))
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    binding = Binding({layer: Factors(A, SCALING * B.mT, noise=WeightNoise((5, 6), 0.3, 0))})
    with bind(binding):
        out = layer(x)
    assert binding.used == {layer}
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(out.square().sum(), (x, A, B)))


# Dropout ---------------------------------------------------------------------------------------


def test_dropout_acts_on_the_adapters_input_in_training_only(layer):
    W, b = dense(layer)
    A, B = matrices()
    x = torch.randn(2, 6, IN, dtype=torch.float64)
    bound = factors(A, B, dropout=0.5)

    torch.testing.assert_close(run(layer, bound, x), run(layer, factors(A, B), x))

    layer.train()
    torch.manual_seed(7)
    actual = run(layer, bound, x)
    torch.manual_seed(7)
    dropped = F.dropout(x, 0.5)
    assert not torch.equal(dropped, x)
    torch.testing.assert_close(actual, x @ W.T + b + SCALING * (dropped @ A.T) @ B.T)


def test_zero_dropout_draws_no_random_numbers_in_training(layer):
    layer.train()
    state = torch.get_rng_state()
    run(layer, factors(*matrices()), torch.randn(4, IN, dtype=torch.float64))
    torch.set_rng_state(state)
    A, B = matrices()
    x = torch.randn(4, IN, dtype=torch.float64)
    before = torch.get_rng_state()
    run(layer, factors(A, B), x)
    assert torch.equal(torch.get_rng_state(), before)


# Bindings --------------------------------------------------------------------------------------


def test_bindings_one_after_the_other_do_not_leak(layer):
    x = torch.randn(4, IN, dtype=torch.float64)
    first, second = factors(*matrices()), factors(*matrices())
    plain = layer(x)
    one = run(layer, first, x)
    assert torch.equal(layer(x), plain)
    two = run(layer, second, x)
    assert not torch.allclose(one, two)
    assert torch.equal(run(layer, first, x), one)
    assert current_binding() is None


def test_the_inner_of_two_nested_bindings_holds_and_the_outer_one_comes_back(layer):
    x = torch.randn(4, IN, dtype=torch.float64)
    outer, inner = Binding({layer: factors(*matrices())}), Binding({layer: factors(*matrices())})
    with bind(outer):
        first = layer(x)
        with bind(inner):
            assert current_binding() is inner
            assert not torch.allclose(layer(x), first)
            with bind(None):
                assert torch.equal(layer(x), layer.base_layer(x))
        assert current_binding() is outer
        assert torch.equal(layer(x), first)


def test_an_inner_binding_of_other_layers_hides_the_outer_ones(layer):
    """A binding replaces the one around it; factors of two posteriors never mix in one call."""
    x = torch.randn(4, IN, dtype=torch.float64)
    with bind(Binding({layer: factors(*matrices())})), bind(Binding({})):
        assert torch.equal(layer(x), layer.base_layer(x))


def test_a_binding_ends_with_an_exception(layer):
    def failing():
        with bind(Binding({layer: factors(*matrices())})):
            raise RuntimeError("in the network")

    with pytest.raises(RuntimeError, match="in the network"):
        failing()
    assert current_binding() is None


def test_a_binding_records_the_layers_that_used_it(layer):
    other = AdapterLayer(nn.Linear(IN, OUT)).double()
    binding = Binding({layer: factors(*matrices()), other: factors(*matrices())})
    with bind(binding):
        layer(torch.randn(4, IN, dtype=torch.float64))
    assert binding.used == {layer}


def test_threads_with_different_bindings_use_their_own(layer):
    """Both threads are inside their binding at each of 50 calls: a barrier holds them together."""
    x = torch.randn(4, IN, dtype=torch.float64)
    bound = [factors(*matrices()) for _ in range(2)]
    expected = [run(layer, one, x) for one in bound]
    barrier = threading.Barrier(3, timeout=30)
    results = [[], [], []]

    def work(index):
        binding = Binding({layer: bound[index]}) if index < 2 else None
        with bind(binding):
            for _ in range(50):
                barrier.wait()
                results[index].append(layer(x).detach())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for found, value in zip(results, [*expected, layer.base_layer(x)], strict=True):
        assert len(found) == 50
        assert all(torch.equal(one, value) for one in found)


def test_a_new_thread_starts_without_the_binding_of_the_one_that_started_it(layer):
    found = []
    with bind(Binding({layer: factors(*matrices())})):
        thread = threading.Thread(target=lambda: found.append(current_binding()))
        thread.start()
        thread.join()
    assert found == [None]


def test_recomputation_outside_of_a_binding_raises_instead_of_dropping_the_adapter(layer):
    """Activation checkpointing runs the layer again in the backward pass."""
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    with bind(Binding({layer: factors(*matrices())})):
        out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    with pytest.raises(BindingError, match="gradient_checkpointing"):
        out.sum().backward()


def test_recomputation_inside_of_its_binding_gives_the_gradients_of_the_plain_pass(layer):
    A, B = (m.requires_grad_() for m in matrices())
    x = torch.randn(4, IN, dtype=torch.float64)
    binding = Binding({layer: factors(A, B)})
    plain = run(layer, binding.factors[layer], x).square().sum()
    expected = torch.autograd.grad(plain, (A, B), retain_graph=True)

    def contexts():
        return bind(current_binding()), bind(binding)

    with bind(binding):
        out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
    actual = torch.autograd.grad(out.square().sum(), (A, B))
    torch.testing.assert_close(actual, expected)


# Transparency ----------------------------------------------------------------------------------


def test_attributes_are_those_of_the_wrapped_layer():
    base = nn.Linear(IN, OUT)
    layer = AdapterLayer(base)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert layer.in_features == IN
    with pytest.raises(AttributeError, match="nothing"):
        _ = layer.nothing


def test_a_layer_holds_no_parameter_of_its_own(layer):
    owned = {id(p) for p in layer.base_layer.parameters()}
    assert {id(p) for p in layer.parameters()} == owned


# Heads -----------------------------------------------------------------------------------------


def test_a_head_slot_runs_the_bound_head_and_the_networks_own_otherwise():
    own, bound = nn.Linear(IN, 2), nn.Linear(IN, 2)
    slot = HeadSlot(own)
    x = torch.randn(4, IN)
    with bind(Binding({}, {slot: [bound]})):
        assert torch.equal(slot(x), bound(x))
    assert torch.equal(slot(x), own(x))
    with bind(Binding({})):
        assert torch.equal(slot(x), own(x))


def test_a_float32_head_on_a_bf16_network_takes_and_gives_float32():
    slot, head = HeadSlot(nn.Linear(IN, 2).bfloat16()), nn.Linear(IN, 2)
    x = torch.randn(4, IN, dtype=torch.bfloat16)
    with bind(Binding({}, {slot: [head]})):
        out = slot(x)
    assert out.dtype == torch.float32
    assert torch.equal(out, head(x.float()))
