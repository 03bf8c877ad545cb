"""x (W + s B A + E)ᵀ with E redrawn from a seed: its law, its gradients, its memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from pyrolora.adapters import weight_noise
from pyrolora.adapters.weight_noise import WeightNoise, row_norms
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


def dense_noise(noise, weight, A, sB, dtype=torch.float32):
    """E (out, in): what a single draw adds to nothing, for the unit vectors as inputs."""
    outputs, inputs = weight.shape
    out = torch.zeros(inputs, outputs, dtype=dtype)
    return noise.add_to(out, torch.eye(inputs, dtype=dtype), weight, A, sB).T


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


def test_the_output_and_the_gradient_are_those_of_the_dense_formula(small_chunks):
    arguments = problem()
    noise = WeightNoise((5,), 0.3, 1)
    E = dense_noise(noise, *arguments)
    x = torch.randn(2, 4, IN, requires_grad=True)
    out = torch.randn(2, 4, OUT, requires_grad=True)
    result = noise.add_to(out, x, *arguments)
    torch.testing.assert_close(result, out + x @ E.T)
    grad = torch.randn_like(result)
    result.backward(grad)
    torch.testing.assert_close(x.grad, grad @ E)
    torch.testing.assert_close(out.grad, grad, rtol=0, atol=0)


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
    arguments = problem()
    x, out = torch.randn(4, IN, requires_grad=True), torch.zeros(4, OUT)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        result = WeightNoise((5,), 0.3, 1).add_to(out, x, *arguments)
        result.sum().backward()
        assert torch.equal(torch.get_rng_state(), before)
        results += [result.detach(), x.grad]
        x.grad = None
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


def test_at_scale_zero_nothing_is_drawn(monkeypatch):
    monkeypatch.delattr(weight_noise, "_generator")
    out = torch.zeros(4, OUT)
    assert WeightNoise((5,), 0.0, 1).add_to(out, torch.randn(4, IN), *problem()) is out


# The expectation: of the loss and of its gradients.


def test_a_quadratic_loss_rises_by_its_closed_form():
    """E ½‖x (W + E)ᵀ - t‖² = ½‖x Wᵀ - t‖² + ½ Σ_i σ² ‖W_i‖² / in ‖x‖²."""
    seeds, scale, rows = range(4000), 0.3, 5
    weight, A, sB = problem()
    x, target = torch.randn(rows, IN), torch.randn(rows, OUT)
    plain = x @ (weight + sB.T @ A).T
    noise = WeightNoise(tuple(seeds), scale, 0)
    x_all, plain_all = x.repeat(len(seeds), 1), plain.repeat(len(seeds), 1)
    out = noise.add_to(plain_all, x_all, weight, A, sB).view(len(seeds), rows, OUT)
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
    x_all, plain_all = x.repeat(len(seeds), 1), plain.repeat(len(seeds), 1)
    out = noise.add_to(plain_all, x_all, weight, A, sB).view(len(seeds), rows, OUT).double()
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
    hidden, out = layers(*copies, x)
    noise = WeightNoise(tuple(range(draws)), scale, 0)
    result = noise.add_to(out.flatten(0, 1), hidden.flatten(0, 1), W2, *copies[2:])
    (result.view_as(out) - target).square().sum().div(2).backward()

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
def test_the_weight_stays_as_it_is_to_the_bit(dtype, small_chunks):
    arguments = problem(dtype=dtype)
    before = [t.clone() for t in arguments]
    x = torch.randn(4, IN, dtype=dtype, requires_grad=True)
    out = x @ arguments[0].T
    kept = out.detach().clone()
    WeightNoise((5,), 0.3, 1).add_to(out, x, *arguments).sum().backward()
    assert all(torch.equal(t, b) for t, b in zip((*arguments, out), (*before, kept), strict=True))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, but for those of ``known``."""

    def __init__(self, *known):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet(t.untyped_storage() for t in known)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        if storage not in self.seen:
            self.seen.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.release, storage.nbytes())

    def release(self, size):
        self.now -= size


def naive(noise, out, x, weight, A, sB):
    E = dense_noise(noise, weight, A, sB, dtype=x.dtype)
    return out - x @ weight.T + x @ (weight + E).T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "naive"])
def test_no_tensor_of_the_weights_size_exists_in_forward_or_backward(ours, dtype, monkeypatch):
    monkeypatch.setattr(weight_noise, "CHUNK", 2**13)
    arguments = problem(outputs=512, inputs=512, dtype=dtype)
    x = torch.randn(8, 512, dtype=dtype, requires_grad=True)
    noise = WeightNoise((5,), 0.3, 1)
    function = noise.add_to if ours else lambda *args: naive(noise, *args)
    size = arguments[0].untyped_storage().nbytes()
    for factor in arguments[1:]:
        factor.requires_grad_()
    with LiveBytes(x, *arguments) as live:
        out = x @ arguments[0].T
        result = function(out, x, *arguments)
        between = live.now
        result.sum().backward()
    assert live.now > 0, "nothing was counted"
    if ours:
        assert between < size / 8
        assert live.peak < size / 2
    else:
        assert between > size
        assert live.peak > 2 * size


def test_nothing_is_drawn_in_backward_for_an_input_without_gradient(monkeypatch):
    drawn = []
    original = weight_noise._generator
    monkeypatch.setattr(
        weight_noise, "_generator", lambda *key: drawn.append(key) or original(*key)
    )
    for needs_gradient in (False, True):
        x = torch.randn(4, IN, requires_grad=needs_gradient)
        out = torch.randn(4, OUT, requires_grad=True)
        result = WeightNoise((5,), 0.3, 1).add_to(out, x, *problem())
        forward = list(drawn)
        result.sum().backward()
        assert drawn[len(forward) :] == (forward if needs_gradient else [])
        drawn.clear()


# Where it has to work.


def test_draws_are_blocks_of_rows_with_their_own_seed_and_factors(small_chunks):
    weight, A, sB = problem(DRAWS)
    x, out = torch.randn(DRAWS, 4, IN), torch.randn(DRAWS, 4, OUT)
    seeds = (3, 1, 4)

    def run(seeds, out, x, A, sB):
        x = x.clone().requires_grad_()
        result = WeightNoise(seeds, 0.3, 1).add_to(out, x, weight, A, sB)
        return result, torch.autograd.grad(result.square().sum(), x)[0]

    def equals(together, alone):
        for one, many in zip(together, zip(*alone, strict=True), strict=True):
            torch.testing.assert_close(one, torch.cat(many))

    rows = (out.flatten(0, 1), x.flatten(0, 1))
    both = run(seeds, *rows, A, sB)
    equals(both, [run(seeds[s : s + 1], out[s], x[s], A[s], sB[s]) for s in range(DRAWS)])
    seeds_alone = run(seeds, *rows, A[0], sB[0])
    equals(seeds_alone, [run(seeds[s : s + 1], out[s], x[s], A[0], sB[0]) for s in range(DRAWS)])
    factors_alone = run((3,), *rows, A, sB)
    equals(factors_alone, [run((3,), out[s], x[s], A[s], sB[s]) for s in range(DRAWS)])


def test_the_transposed_weight_of_a_conv1d_is_read_as_it_lies(small_chunks):
    _, A, sB = problem()
    weight = Conv1D(OUT, IN).weight.detach().T
    assert not weight.is_contiguous()
    x, out = torch.randn(4, IN), torch.randn(4, OUT)
    noise = WeightNoise((5,), 0.3, 1)
    torch.testing.assert_close(
        noise.add_to(out, x, weight, A, sB), noise.add_to(out, x, weight.contiguous(), A, sB)
    )


def test_checkpointing_gives_the_same_gradients(small_chunks):
    weight, A, sB = problem()
    noise = WeightNoise((5,), 0.3, 1)

    def network(x, A, sB):
        out = torch.addmm(x @ weight.T, x @ A.T, sB)
        return noise.add_to(out, x, weight, A, sB).tanh()

    leaves = [t.requires_grad_() for t in (torch.randn(4, IN), A, sB)]
    plain = torch.autograd.grad(network(*leaves).square().sum(), leaves)
    kept = checkpoint(network, *leaves, use_reentrant=False)
    torch.manual_seed(99)
    recomputed = torch.autograd.grad(kept.square().sum(), leaves)
    for one, other in zip(plain, recomputed, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing_in_forward_or_backward(dtype, small_chunks):
    """The product is computed in the dtype of the layer's output, whether inside or outside."""
    weight, A, sB = problem()
    arguments = (weight, A.to(dtype), sB.to(dtype))
    noise = WeightNoise((5,), 0.3, 1)
    x = torch.randn(4, IN, requires_grad=True)
    out, grad = torch.randn(2, 4, OUT).to(dtype)
    E = dense_noise(noise, *arguments, dtype=dtype)
    plain = noise.add_to(out, x, *arguments)
    (plain_gradient,) = torch.autograd.grad(plain, x, grad)
    torch.testing.assert_close(plain, torch.addmm(out, x.detach().to(dtype), E.T))
    tolerances = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(plain_gradient, grad.float() @ E.float(), **tolerances)
    with torch.autocast("cpu", torch.bfloat16):
        result = noise.add_to(out, x, *arguments)
        (inside,) = torch.autograd.grad(result, x, grad, retain_graph=True)
    (outside,) = torch.autograd.grad(result, x, grad)
    assert torch.equal(result, plain)
    assert result.dtype == dtype
    assert torch.equal(inside, plain_gradient)
    assert torch.equal(outside, plain_gradient)


def test_a_low_precision_weight_and_float32_factors_have_float32_norms():
    weight, A, sB = problem()
    weight = weight.bfloat16()
    torch.testing.assert_close(row_norms(weight, A, sB), dense_norms(weight, A, sB))


def test_a_second_derivative_is_refused():
    x = torch.randn(4, IN, requires_grad=True)
    result = WeightNoise((5,), 0.3, 1).add_to(x @ torch.randn(IN, OUT), x, *problem())
    (first,) = torch.autograd.grad(result.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


# What is refused.


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_a_quantised_weight_is_refused_from_the_first_step_on(dtype, scale):
    _, A, sB = problem()
    weight = torch.zeros(OUT, IN).to(dtype)
    with pytest.raises(ConfigError, match=rf"{dtype}.*quantised.*'montec', 'map'"):
        WeightNoise((5,), scale, 1).add_to(torch.zeros(4, OUT), torch.zeros(4, IN), weight, A, sB)


@pytest.mark.parametrize(("seeds", "draws", "rows"), [(2, (3,), 6), (3, (), 4), (1, (3,), 4)])
def test_draws_that_do_not_agree_are_refused(seeds, draws, rows):
    noise = WeightNoise(tuple(range(seeds)), 0.3, 1)
    with pytest.raises(BindingError, match=f"got {seeds} seed.* and {rows} rows"):
        noise.add_to(torch.zeros(rows, OUT), torch.zeros(rows, IN), *problem(*draws))


@pytest.mark.parametrize(("seeds", "scale"), [((), 0.1), ((1,), -0.1), ((1,), float("nan"))])
def test_noise_without_a_seed_or_with_an_impossible_scale_is_refused(seeds, scale):
    with pytest.raises(ConfigError, match="weight noise"):
        WeightNoise(seeds, scale, 0)
