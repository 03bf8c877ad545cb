"""x (W + E)ᵀ + b with E redrawn from a seed: its law, its gradients, its memory."""

from __future__ import annotations

import pytest
import torch
from memory import LiveBytes
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from pyrolora.adapters import AdapterLayer, Factors, weight_noise, with_noise_measured
from pyrolora.adapters.adapted_linear import adapted_linear
from pyrolora.adapters.weight_noise import WeightNoise, product_dtype
from pyrolora.errors import BindingError, ConfigError

IN, OUT, RANK, DRAWS = 6, 11, 2, 3


@pytest.fixture
def small_chunks(monkeypatch):
    """Four output rows a chunk: three chunks of 11 rows, the last one shorter."""
    monkeypatch.setattr(weight_noise, "CHUNK", 4 * IN + 1)


def problem(*draws, outputs=OUT, inputs=IN, dtype=torch.float32):
    """W (out, in), A (*draws, r, in) and sB (*draws, r, out): products of W's own size."""
    weight = torch.randn(outputs, inputs) * torch.rand(outputs, 1).add(0.5)
    A, sB = torch.randn(*draws, RANK, inputs), torch.randn(*draws, RANK, outputs)
    return weight.to(dtype), A.to(dtype), sB.to(dtype)


def dense_norms(weight, A, sB):
    """‖(W + s B A)[i, :]‖ the plain way, by way of float64."""
    return (weight.double() + sB.double().mT @ A.double()).norm(dim=-1).float()


def row_norms(weight, A, sB):
    return weight_noise.row_norms([weight], [A], [sB])[0]


def layer_of(weight, bias=None):
    """A frozen ``nn.Linear`` with this weight."""
    layer = nn.Linear(*reversed(weight.shape), bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def perturbed(noise, weight, A, sB, dtype=None):
    """W + E (out, in) of a single draw: what the unit vectors give as inputs."""
    inputs = torch.eye(weight.shape[1], dtype=dtype or weight.dtype)
    return linear(noise, layer_of(weight), inputs, A, sB).T


def dense_noise(noise, weight, A, sB):
    return perturbed(noise, weight, A, sB) - weight


def linear(noise, layer, x, A, sB):
    """x (W + E)ᵀ + b alone: its adapter is zero."""
    frozen = noise.frozen(layer, x, A, sB)
    if frozen is None:
        return layer(x)
    nothing = x.new_zeros(1, A.shape[-1]), x.new_zeros(1, sB.shape[-1])
    return adapted_linear(frozen, x.to(product_dtype(x)), *nothing)


def adapted(noise, weight, x, A, sB):
    """x (W + s B A + E)ᵀ, as the adapted layer computes it."""
    return Factors(A, sB, noise=noise).apply(layer_of(weight), x, training=True)


# The law.


def test_row_norms_equal_those_of_the_dense_matrix(small_chunks):
    for draws in ((), (DRAWS,)):
        arguments = problem(*draws)
        torch.testing.assert_close(row_norms(*arguments), dense_norms(*arguments))
    weight, A, sB = problem(DRAWS)
    torch.testing.assert_close(row_norms(weight, A, sB[0]), dense_norms(weight, A, sB[0]))


def test_the_norm_of_a_row_that_cancels_is_zero_and_not_nan():
    A, sB = torch.randn(RANK, IN), torch.randn(RANK, OUT)
    assert row_norms(-sB.T @ A, A, sB).max() < 5e-3


@pytest.mark.parametrize("bias", [torch.linspace(-1, 1, OUT), None], ids=["bias", "no bias"])
def test_the_output_and_the_gradient_are_those_of_the_dense_formula(bias, small_chunks):
    weight, A, sB = problem()
    noise = WeightNoise((5,), 0.3, 1)
    dense = perturbed(noise, weight, A, sB)
    assert (dense - weight).abs().max() > 0.1
    x = torch.randn(2, 4, IN, requires_grad=True)
    result = linear(noise, layer_of(weight, bias), x, A, sB)
    torch.testing.assert_close(result, F.linear(x, dense, bias))
    grad = torch.randn_like(result)
    result.backward(grad)
    torch.testing.assert_close(x.grad, grad @ dense)


def test_the_noise_is_independent_gaussian_with_the_variance_of_its_row(monkeypatch):
    monkeypatch.setattr(weight_noise, "CHUNK", 2**12)  # 13 rows, so 16 chunks
    outputs, inputs, scale = 200, 300, 0.05
    arguments = problem(outputs=outputs, inputs=inputs)
    E = dense_noise(WeightNoise((7,), scale, 0), *arguments)
    Z = E / (scale * dense_norms(*arguments) / inputs**0.5).unsqueeze(-1)
    # Five standard errors of 60,000 values, or of a row's 300.
    assert Z.mean().abs() < 5 / Z.numel() ** 0.5
    assert (Z.square().mean() - 1).abs() < 5 * (2 / Z.numel()) ** 0.5
    assert (Z.pow(4).mean() - 3).abs() < 5 * (96 / Z.numel()) ** 0.5
    assert (Z.square().mean(-1) - 1).abs().max() < 5 * (2 / inputs) ** 0.5
    between_rows = torch.corrcoef(Z) - torch.eye(outputs)
    assert between_rows.abs().max() < 5.5 / inputs**0.5
    between_columns = torch.corrcoef(Z.T) - torch.eye(inputs)
    assert between_columns.abs().max() < 5.5 / outputs**0.5


def test_every_seed_and_every_stream_has_independent_noise():
    """Also 1 and 2 against 2 and 1, which a seed plus a stream would not tell apart."""
    arguments = problem(outputs=40, inputs=50)
    keys = [(seed, stream) for seed in (0, 1, 2, 2**32) for stream in range(4)]
    E = torch.stack([dense_noise(WeightNoise((k,), 1.0, s), *arguments) for k, s in keys])
    Z = E / row_norms(*arguments).unsqueeze(-1)
    others = torch.corrcoef(Z.flatten(1)) - torch.eye(len(keys))
    assert others.abs().max() < 5 / (40 * 50) ** 0.5


def test_one_seed_is_one_noise_whatever_the_global_generator_which_stays_untouched():
    weight, A, sB = problem()
    layer = layer_of(weight)
    x = torch.randn(4, IN, requires_grad=True)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        result = linear(WeightNoise((5,), 0.3, 1), layer, x, A, sB)
        result.sum().backward()
        assert torch.equal(torch.get_rng_state(), before)
        results += [result.detach(), x.grad]
        x.grad = None
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_noise_is_that_of_float32_and_the_sum_is_rounded_once(dtype, small_chunks):
    weight, A, sB = problem(dtype=dtype)
    noise = WeightNoise((5,), 0.3, 1)
    exact = perturbed(noise, weight.float(), A, sB)
    actual = perturbed(noise, weight, A, sB)
    assert actual.dtype == dtype
    assert torch.equal(actual, exact.to(dtype))


@pytest.mark.parametrize(("scale", "share"), [(0.05, 1.00), (0.005, 1.08), (0.001, 0.68)])
def test_on_the_grid_of_bfloat16_the_noise_has_the_variance_that_the_docstring_says(scale, share):
    weight, A, sB = problem(outputs=400, inputs=500)
    weight = torch.randn_like(weight).bfloat16()
    E = perturbed(WeightNoise((7,), scale, 0), weight, A, sB * 0).float() - weight.float()
    Z = E / (scale * weight.float().norm(dim=-1) / 500**0.5).unsqueeze(-1)
    assert Z.mean().abs() < 5 / Z.numel() ** 0.5
    assert (Z.square().mean() - share).abs() < 0.02


@pytest.mark.parametrize("base", [nn.Linear(IN, OUT), Conv1D(OUT, IN)], ids=["linear", "conv1d"])
def test_at_scale_zero_the_layer_is_called_and_nothing_is_drawn(base, monkeypatch):
    monkeypatch.delattr(weight_noise, "_generator")
    called = []
    with base.register_forward_hook(lambda *_: called.append(1)):
        _, A, sB = problem()
        x = torch.randn(4, IN)
        result = linear(WeightNoise((5,), 0.0, 1), base, x, A, sB)
        assert called
        assert torch.equal(result, base(x))


# The expectation: of the loss and of its gradients.


def test_a_quadratic_loss_rises_by_its_closed_form():
    """E ½‖x (W + E)ᵀ - t‖² = ½‖x Wᵀ - t‖² + ½ Σ_i σ² ‖W_i‖² / in ‖x‖²."""
    seeds, scale, rows = range(4000), 0.3, 5
    weight, A, sB = problem()
    x, target = torch.randn(rows, IN), torch.randn(rows, OUT)
    plain = x @ (weight + sB.T @ A).T
    noise = WeightNoise(tuple(seeds), scale, 0)
    out = adapted(noise, weight, x.repeat(len(seeds), 1), A, sB).view(len(seeds), rows, OUT)
    losses = (out - target).square().sum((-2, -1)).double() / 2
    variances = scale**2 * dense_norms(weight, A, sB).square() / IN
    rise = x.square().sum() * variances.sum() / 2
    error = losses.std() / len(seeds) ** 0.5
    assert error < rise / 10  # there is something to see
    expected = (plain - target).square().sum() / 2 + rise
    assert (losses.mean() - expected).abs() < 4 * error


def test_a_softmax_loss_rises_by_its_second_order_expansion():
    """E log-loss ≈ log-loss + ½ Σ_i p_i (1 - p_i) σ² ‖W_i‖² / in ‖x‖², to a percent at 0.05.

    The term of first order has mean zero and is larger than all others: it is subtracted.
    """
    seeds, scale, rows, inputs = range(8000), 0.05, 24, 32
    weight, A, sB = (t / 2 for t in problem(inputs=inputs))
    x, labels = torch.randn(rows, inputs), torch.randint(OUT, (rows,))
    plain = x @ (weight + sB.T @ A).T
    noise = WeightNoise(tuple(seeds), scale, 0)
    out = adapted(noise, weight, x.repeat(len(seeds), 1), A, sB).double()
    out = out.view(len(seeds), rows, OUT)
    plain = plain.double().requires_grad_()
    loss = F.cross_entropy(plain, labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, plain)
    losses = F.cross_entropy(out.flatten(0, 1), labels.repeat(len(seeds)), reduction="none")
    losses = losses.view(len(seeds), rows).sum(-1) - ((out - plain) * gradient).sum((-2, -1))
    p = plain.softmax(-1)
    variances = scale**2 * dense_norms(weight, A, sB).square() / inputs
    expected = (p * (1 - p) * variances * x.square().sum(-1, keepdim=True)).sum() / 2
    ratios = ((losses - loss) / expected).detach()
    assert ratios.std() / len(seeds) ** 0.5 < 0.005
    assert (ratios.mean() - 1).abs() < 0.02


def test_gradients_of_all_factors_are_those_of_the_expected_loss_at_constant_norms():
    """Two layers, noise on the second: h = x (W₁ + B₁A₁)ᵀ, y = h (W₂ + B₂A₂ + E)ᵀ, loss ½‖y - t‖².

    Its expectation is ½‖h (W₂ + B₂A₂)ᵀ - t‖² + ½‖h‖² Σ_i σ² c_i² / in, with c, the norms, constant.
    """
    draws, scale, rows = 3000, 0.5, 4
    W1, *first = problem(outputs=IN)
    W2, *second = problem()
    x, target = torch.randn(rows, IN), torch.randn(rows, OUT)
    norms = dense_norms(W2, *second)

    def layers(A1, B1, A2, B2, inputs):
        hidden = inputs @ (W1 + B1.mT @ A1).mT
        return hidden, hidden @ (W2 + B2.mT @ A2).mT

    def expected(noise_counts, norms_count):
        factors = [t.clone().requires_grad_() for t in (*first, *second)]
        hidden, out = layers(*factors, x)
        c = (W2 + factors[3].mT @ factors[2]).norm(dim=-1) if norms_count else norms
        rise = scale**2 / IN * hidden.square().sum() * c.square().sum()
        loss = (out - target).square().sum() / 2 + noise_counts * rise / 2
        return torch.autograd.grad(loss, factors)

    copies = [t.expand(draws, *t.shape).clone().requires_grad_() for t in (*first, *second)]
    hidden, _ = layers(*copies, x)
    noise = WeightNoise(tuple(range(draws)), scale, 0)
    result = adapted(noise, W2, hidden.flatten(0, 1), *copies[2:])
    (result.view(draws, rows, OUT) - target).square().sum().div(2).backward()

    def worst(reference):
        """Standard errors between the mean of the draws' gradients and a reference, at most."""
        return [
            float(((c.grad.mean(0) - r).abs() / (c.grad.std(0) / draws**0.5)).max())
            for c, r in zip(copies, reference, strict=True)
        ]

    assert max(worst(expected(1, False))) < 4.5
    assert min(worst(expected(0, False))[:2]) > 10  # the noise counts for the layer before it
    assert min(worst(expected(1, True))[2:]) > 10  # so would a gradient through the norms


# What it leaves alone, and what it costs.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_and_factors_stay_as_they_are_to_the_bit_and_take_no_gradient(dtype, small_chunks):
    weight, A, sB = problem(dtype=dtype)
    layer = layer_of(weight, torch.randn(OUT, dtype=dtype))
    tensors = [layer.weight, layer.bias, A.requires_grad_(), sB.requires_grad_()]
    before = [t.detach().clone() for t in tensors]
    x = torch.randn(4, IN, dtype=dtype, requires_grad=True)
    linear(WeightNoise((5,), 0.3, 1), layer, x, A, sB).sum().backward()
    assert x.grad.abs().min() > 0
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
    assert all(t.grad is None for t in tensors)


def naive(noise, layer, x, A, sB):
    return F.linear(x, perturbed(noise, layer.weight, A, sB))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["linear", "conv1d", "naive"])
def test_no_tensor_of_the_weights_size_exists_in_forward_or_backward(way, dtype, monkeypatch):
    monkeypatch.setattr(weight_noise, "CHUNK", 2**13)
    weight, A, sB = problem(outputs=512, inputs=512, dtype=dtype)
    layer = layer_of(weight)
    if way == "conv1d":
        layer = Conv1D(512, 512).to(dtype).requires_grad_(False)
    x = torch.randn(8, 512, dtype=dtype, requires_grad=True)
    noise = WeightNoise((5,), 0.3, 1)
    size = weight.untyped_storage().nbytes()
    with LiveBytes(x, A, sB, *layer.parameters()) as live:
        args = (layer, x, A, sB)
        result = naive(noise, *args) if way == "naive" else linear(noise, *args)
        between = live.now
        result.sum().backward()
    assert live.now > 0, "nothing was counted"
    if way == "naive":
        assert between > size
        assert live.peak > size
    else:
        assert between < size / 8
        assert live.peak < size / 2


def test_nothing_is_drawn_in_backward_for_an_input_without_gradient(monkeypatch):
    drawn = []
    original = weight_noise._generator
    monkeypatch.setattr(
        weight_noise, "_generator", lambda *key: drawn.append(key) or original(*key)
    )
    weight, A, sB = problem()
    for needs_gradient in (False, True):
        x = torch.randn(4, IN, requires_grad=needs_gradient)
        result = adapted(WeightNoise((5,), 0.3, 1), weight, x, A.requires_grad_(), sB)
        forward = list(drawn)
        result.sum().backward()
        assert drawn[len(forward) :] == (forward if needs_gradient else [])
        drawn.clear()
        alone = linear(WeightNoise((5,), 0.3, 1), layer_of(weight), x, A, sB)
        assert alone.requires_grad == needs_gradient
        drawn.clear()


# Many layers at once.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_noise_of_many_layers_measured_at_once_is_that_of_each_to_the_bit(dtype, small_chunks):
    """Layers of two shapes and kinds, in several chunks and in one."""
    shapes = [(OUT, IN), (3, 2 * IN), (OUT, IN), (5, 5)]
    noises = [WeightNoise((7,), 0.1 * (i + 1), i) for i in range(5)]
    problems = [problem(outputs=out, inputs=inputs, dtype=dtype) for out, inputs in shapes]
    layers = [layer_of(weight) for weight, _, _ in problems]
    turned = Conv1D(OUT, IN).to(dtype)
    layers.append(turned)
    problems.append((turned.weight.T, *problem(dtype=dtype)[1:]))
    measured = weight_noise.at_once(noises, layers, *zip(*(p[1:] for p in problems), strict=True))
    for noise, known, layer, (weight, A, sB) in zip(
        noises, measured, layers, problems, strict=True
    ):
        assert noise.std is None
        x = torch.randn(4, weight.shape[1], dtype=dtype)
        assert torch.equal(linear(known, layer, x, A, sB), linear(noise, layer, x, A, sB))
        expected = noise.scale * dense_norms(weight, A, sB) / weight.shape[1] ** 0.5
        torch.testing.assert_close(known.std, expected, rtol=1e-5, atol=1e-6)


def test_a_network_measures_its_noise_before_its_layers_are_called():
    """A layer that has no weight of its own before the call, and draws, leave it to the call."""
    wrapped = [AdapterLayer(layer_of(problem()[0])) for _ in range(3)]
    gathered = AdapterLayer(layer_of(problem()[0].to("meta")))
    factors = {
        layer: Factors(*problem()[1:], noise=WeightNoise((5,), 0.3, i))
        for i, layer in enumerate([*wrapped[:2], gathered])
    }
    factors[wrapped[2]] = Factors(*problem(DRAWS)[1:], noise=WeightNoise((5,) * DRAWS, 0.3, 3))
    measured = with_noise_measured(factors)
    known = [measured[layer].noise.std is not None for layer in [*wrapped, gathered]]
    assert known == [True, True, False, False]
    plain = {wrapped[0]: Factors(*problem()[1:])}
    assert with_noise_measured(plain) == plain


# Where it has to work.


def test_draws_are_blocks_of_rows_with_their_own_seed_and_factors(small_chunks):
    weight, A, sB = problem(DRAWS)
    layer = layer_of(weight, torch.randn(OUT))
    x = torch.randn(DRAWS, 4, IN)
    seeds = (3, 1, 4)

    def run(seeds, x, A, sB):
        x = x.clone().requires_grad_()
        result = linear(WeightNoise(seeds, 0.3, 1), layer, x, A, sB)
        return result, torch.autograd.grad(result.square().sum(), x)[0]

    def equals(together, alone):
        for one, many in zip(together, zip(*alone, strict=True), strict=True):
            torch.testing.assert_close(one, torch.cat(many))

    rows = x.flatten(0, 1)
    both = run(seeds, rows, A, sB)
    equals(both, [run(seeds[s : s + 1], x[s], A[s], sB[s]) for s in range(DRAWS)])
    seeds_alone = run(seeds, rows, A[0], sB[0])
    equals(seeds_alone, [run(seeds[s : s + 1], x[s], A[0], sB[0]) for s in range(DRAWS)])
    factors_alone = run((3,), rows, A, sB)
    equals(factors_alone, [run((3,), x[s], A[s], sB[s]) for s in range(DRAWS)])


def test_the_transposed_weight_of_a_conv1d_is_read_as_it_lies(small_chunks):
    _, A, sB = problem()
    conv = Conv1D(OUT, IN).requires_grad_(False)
    nn.init.normal_(conv.bias)
    x = torch.randn(2, 4, IN)
    noise = WeightNoise((5,), 0.3, 1)
    expected = linear(noise, layer_of(conv.weight.T.contiguous(), conv.bias), x, A, sB)
    torch.testing.assert_close(linear(noise, conv, x, A, sB), expected)


def test_inputs_that_are_not_contiguous_and_single_rows_give_the_same_result(small_chunks):
    weight, A, sB = problem()
    layer, noise = layer_of(weight), WeightNoise((5,), 0.3, 1)
    x = torch.randn(4, 3, IN).transpose(0, 1)
    assert not x.is_contiguous()
    result = linear(noise, layer, x, A, sB)
    torch.testing.assert_close(result, linear(noise, layer, x.contiguous(), A, sB))
    torch.testing.assert_close(linear(noise, layer, x[1, 2], A, sB), result[1, 2])


@pytest.mark.parametrize("rows", [(0,), (0, 3)])
def test_no_rows_give_no_rows(rows):
    weight, A, sB = problem()
    x = torch.randn(*rows, IN, requires_grad=True)
    result = adapted(WeightNoise((5,), 0.3, 1), weight, x, A, sB)
    assert result.shape == (*rows, OUT)
    result.sum().backward()
    assert x.grad.shape == x.shape


def test_checkpointing_gives_the_same_gradients(small_chunks):
    weight, A, sB = problem()
    noise = WeightNoise((5,), 0.3, 1)

    def network(x, A, sB):
        return adapted(noise, weight, x, A, sB).tanh()

    leaves = [t.requires_grad_() for t in (torch.randn(4, IN), A, sB)]
    plain = torch.autograd.grad(network(*leaves).square().sum(), leaves)
    kept = checkpoint(network, *leaves, use_reentrant=False)
    torch.manual_seed(99)
    recomputed = torch.autograd.grad(kept.square().sum(), leaves)
    for one, other in zip(plain, recomputed, strict=True):
        assert torch.equal(one, other)


def test_autocast_runs_the_product_in_its_dtype_and_a_backward_pass_inside_of_it(small_chunks):
    """As in the layer itself: x, W + E and b in bfloat16, and the gradient for x in x's dtype."""
    weight, A, sB = problem()
    bias = torch.randn(OUT)
    layer, noise = layer_of(weight, bias), WeightNoise((5,), 0.3, 1)
    dense = perturbed(noise, weight, A, sB).bfloat16()
    x = torch.randn(2, 4, IN, requires_grad=True)
    grad = torch.randn(2, 4, OUT).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.linear(x, dense, bias)
        result = linear(noise, layer, x, A, sB)
        (inside,) = torch.autograd.grad(result, x, grad, retain_graph=True)
    (outside,) = torch.autograd.grad(result, x, grad)
    (reference,) = torch.autograd.grad(expected, x, grad)
    assert result.dtype == layer_dtype(layer, x) == torch.bfloat16
    assert torch.equal(result, expected)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    # Three chunks, each of which rounds the sum to 8 bits.
    torch.testing.assert_close(inside, reference, rtol=2e-2, atol=5e-2)


def layer_dtype(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x).dtype


def test_autocast_leaves_a_float64_layer_alone():
    weight, A, sB = problem(dtype=torch.float64)
    x = torch.randn(4, IN, dtype=torch.float64)
    layer, noise = layer_of(weight), WeightNoise((5,), 0.3, 1)
    with torch.autocast("cpu", torch.bfloat16):
        result = linear(noise, layer, x, A, sB)
    assert result.dtype == torch.float64
    assert torch.equal(result, linear(noise, layer, x, A, sB))


def test_gradients_agree_with_finite_differences(small_chunks):
    weight, A, sB = problem(DRAWS, dtype=torch.float64)
    noise = WeightNoise((5, 6, 7), 0.3, 1)
    x = torch.randn(DRAWS * 2, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: linear(noise, layer_of(weight), x, A, sB), x)


def test_a_low_precision_weight_and_float32_factors_have_float32_norms():
    weight, A, sB = problem()
    weight = weight.bfloat16()
    torch.testing.assert_close(row_norms(weight, A, sB), dense_norms(weight, A, sB))


def test_hooks_of_the_layer_do_not_run():
    weight, A, sB = problem()
    layer = layer_of(weight)
    layer.register_forward_hook(lambda *_: pytest.fail("called"))
    linear(WeightNoise((5,), 0.3, 1), layer, torch.randn(4, IN), A, sB)


def test_a_second_derivative_is_refused():
    weight, A, sB = problem()
    x = torch.randn(4, IN, requires_grad=True)
    result = linear(WeightNoise((5,), 0.3, 1), layer_of(weight), x, A, sB)
    with pytest.raises(ConfigError, match="no second derivative"):
        torch.autograd.grad(result.square().sum(), x, create_graph=True)


# What is refused.


class Clamped(nn.Linear):
    """Computes something else with a plain weight."""

    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


def parametrised():
    return nn.utils.parametrizations.orthogonal(nn.Linear(IN, OUT))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_a_quantised_weight_is_refused_from_the_first_step_on(dtype, scale):
    _, A, sB = problem()
    layer = layer_of(torch.zeros(OUT, IN).to(dtype))
    with pytest.raises(ConfigError, match=rf"{dtype}.*quantised.*a guide without weight noise"):
        linear(WeightNoise((5,), scale, 1), layer, torch.zeros(4, IN), A, sB)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (parametrised, "this ParametrizedLinear has none"),
        (lambda: nn.Linear(IN, OUT, device="meta"), "this Linear has none in memory"),
        (lambda: Clamped(IN, OUT), "Clamped computes its output in a way of its own"),
    ],
)
def test_a_layer_whose_product_cannot_be_taken_over_is_refused(layer, message):
    _, A, sB = problem()
    with pytest.raises(ConfigError, match=message):
        linear(WeightNoise((5,), 0.3, 1), layer(), torch.zeros(4, IN), A, sB)


@pytest.mark.parametrize(("seeds", "draws", "rows"), [(2, (3,), 6), (3, (), 4), (1, (3,), 4)])
def test_draws_that_do_not_agree_are_refused(seeds, draws, rows):
    weight, A, sB = problem(*draws)
    noise = WeightNoise(tuple(range(seeds)), 0.3, 1)
    with pytest.raises(BindingError, match=f"got {seeds} seed.* and {rows} rows"):
        linear(noise, layer_of(weight), torch.zeros(rows, IN), A, sB)


@pytest.mark.parametrize(("seeds", "scale"), [((), 0.1), ((1,), -0.1), ((1,), float("nan"))])
def test_noise_without_a_seed_or_with_an_impossible_scale_is_refused(seeds, scale):
    with pytest.raises(ConfigError, match="weight noise"):
        WeightNoise(seeds, scale, 0)
