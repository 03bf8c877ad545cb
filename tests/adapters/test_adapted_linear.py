"""One product of the frozen layer and its adapter: values, gradients, memory; and where it is not
to be used."""

from __future__ import annotations

import pytest
import torch
from memory import LiveBytes
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from pyrolora.adapters import Factors
from pyrolora.adapters.adapted_linear import adapted_linear, plain

IN, OUT, RANK, DRAWS = 5, 7, 3, 2
KINDS = {
    "linear": lambda: nn.Linear(IN, OUT),
    "without bias": lambda: nn.Linear(IN, OUT, bias=False),
    "conv1d": lambda: Conv1D(OUT, IN),
}


def frozen_layer(kind="linear", dtype=torch.float64):
    return KINDS[kind]().to(dtype).requires_grad_(False)


def problem(drawn="", dtype=torch.float64):
    """x, A and sB that ask for gradients; those of ``drawn`` with a dimension of draws."""
    shapes = {"A": (RANK, IN), "B": (RANK, OUT)}
    A, sB = (
        torch.randn(*((DRAWS,) if name in drawn else ()), *shape, dtype=dtype)
        for name, shape in shapes.items()
    )
    return [t.requires_grad_() for t in (torch.randn(DRAWS * 2, 3, IN, dtype=dtype), A, sB)]


def joined(layer, x, A, sB, dropout=0.0):
    weights = plain(layer, x)
    assert weights is not None
    return adapted_linear(weights, x, A, sB, dropout)


def in_two_parts(layer, x, A, sB):
    """The layer called, and the adapter's product added to what it gives."""
    return Factors(A, sB).add_to(layer(x), x)


@pytest.mark.parametrize("drawn", ["", "A", "B", "AB"])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients_are_those_of_the_two_parts(kind, drawn):
    layer, inputs = frozen_layer(kind), problem(drawn)
    results = [way(layer, *inputs) for way in (joined, in_two_parts)]
    torch.testing.assert_close(*results)
    weights = torch.randn_like(results[0])
    grads = [torch.autograd.grad((weights * r).sum(), inputs) for r in results]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(joined(layer, *inputs), results[1])


@pytest.mark.parametrize("drawn", ["", "A", "AB"])
def test_first_and_second_derivatives_agree_with_finite_differences(drawn):
    layer, inputs = frozen_layer(), problem(drawn)

    def function(*tensors):
        return joined(layer, *tensors)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_what_asks_for_no_gradient_gets_none(missing):
    layer, inputs = frozen_layer(), problem()
    inputs[missing] = inputs[missing].detach()
    joined(layer, *inputs).square().sum().backward()
    assert [t.grad is None for t in inputs] == [i == missing for i in range(3)]
    assert layer.weight.grad is None


def test_dropout_is_on_the_input_of_the_adapter_alone():
    layer, (x, A, sB) = frozen_layer(), problem()
    inputs = (x, A, sB)
    torch.manual_seed(0)
    actual = joined(layer, *inputs, dropout=0.4)
    torch.manual_seed(0)
    expected = layer(x) + F.dropout(x, 0.4) @ A.mT @ sB
    torch.testing.assert_close(actual, expected)
    weights = torch.randn_like(actual)
    grads = [torch.autograd.grad((weights * r).sum(), inputs) for r in (actual, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_no_second_output_and_no_second_gradient_is_ever_in_memory():
    """Of a layer so wide that all else is small: the output, the gradient that comes and the one
    that goes are three tensors; the two parts have two outputs, and two gradients of x."""
    width, rows = 64, 512
    layer = nn.Linear(width, width, bias=False).requires_grad_(False)
    x = torch.randn(rows, width, requires_grad=True)
    A, sB = (torch.randn(1, width, requires_grad=True) for _ in range(2))
    peaks = []
    for way in (joined, in_two_parts):
        with LiveBytes(x, A, sB, layer.weight) as live:
            way(layer, x, A, sB).sum().backward()
        peaks.append(live.peak / (4 * rows * width))
        x.grad = None
    assert peaks[0] < 2.2 < 2.9 < peaks[1]


def test_the_output_can_be_changed_in_place():
    layer, inputs = frozen_layer(), problem()
    torch.testing.assert_close(*(F.relu_(way(layer, *inputs)) for way in (joined, in_two_parts)))
    out = joined(layer, *inputs)
    out += 1
    out.view(-1)[:5].mul_(2)
    out.sum().backward()
    assert all(t.grad is not None for t in inputs)


@pytest.mark.parametrize("rows", [(0,), (0, 3), (2, 0)])
@pytest.mark.parametrize("drawn", ["", "AB"])
def test_no_rows_give_no_rows(rows, drawn):
    layer, (_, A, sB) = frozen_layer(), problem(drawn)
    x = torch.randn(*rows, IN, dtype=torch.float64, requires_grad=True)
    out = joined(layer, x, A, sB)
    assert out.shape == (*rows, OUT)
    out.sum().backward()
    assert (A.grad == 0).all()


def test_a_backward_pass_inside_of_autocast_has_the_dtype_of_the_forward_pass():
    layer, inputs = frozen_layer(dtype=torch.float32), problem(dtype=torch.float32)
    loss = joined(layer, *inputs).square().sum()
    expected = torch.autograd.grad(loss, inputs, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(loss, inputs)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


# Where the layer has to be called ---------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def patched(layer):
    layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)


def hooked(layer):
    layer.register_forward_hook(lambda module, args, out: 2 * out)


def hooked_before(layer):
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def hooked_backward(layer):
    layer.register_full_backward_hook(lambda module, grads, _: (2 * grads[0],))


def trained(layer):
    layer.weight.requires_grad_(True)


def with_trained_bias(layer):
    layer.bias.requires_grad_(True)


def parametrised(layer):
    nn.utils.parametrizations.weight_norm(layer)
    layer.requires_grad_(False)


class Doubling(nn.Module):
    def forward(self, tensor):
        return 2 * tensor


def with_parametrised_bias(layer):
    nn.utils.parametrize.register_parametrization(layer, "bias", Doubling())


def with_buffer_as_bias(layer):
    bias = layer.bias
    del layer.bias
    layer.register_buffer("bias", 2 * bias.detach())


@pytest.mark.parametrize(
    "change",
    [
        patched, hooked, hooked_before, hooked_backward, trained, with_trained_bias,
        parametrised, with_parametrised_bias, with_buffer_as_bias,
    ],
)  # fmt: skip
def test_a_layer_that_is_more_than_its_weight_is_called(change):
    layer, inputs = frozen_layer(), problem()
    change(layer)
    assert plain(layer, inputs[0]) is None
    x, A, sB = inputs
    actual = Factors(A, sB).apply(layer, x, training=True)
    torch.testing.assert_close(actual, layer(x) + x @ A.mT @ sB)
    actual.sum().backward()
    for parameter in layer.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad


def test_a_layer_with_a_product_of_its_own_is_called():
    layer, (x, A, sB) = Doubled(IN, OUT).double().requires_grad_(False), problem()
    assert plain(layer, x) is None
    actual = Factors(A, sB).apply(layer, x, training=True)
    torch.testing.assert_close(actual, layer(x) + x @ A.mT @ sB)


def test_a_layer_is_called_under_autocast_in_another_dtype_and_inside_of_transformations():
    layer, (x, A, sB) = frozen_layer(dtype=torch.float32), problem(dtype=torch.float32)
    assert plain(layer, x) is not None
    assert plain(layer, x.bfloat16()) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert plain(layer, x) is None
    factors = Factors(A.detach(), sB.detach())
    x = x.detach()
    gradient = torch.func.grad(lambda x: factors.apply(layer, x, training=False).sum())(x)
    torch.testing.assert_close(gradient, (layer.weight + (A.mT @ sB).T).sum(0).expand_as(x))


def test_a_layer_is_called_where_somebody_listens_to_all_modules():
    layer, inputs = frozen_layer(), problem()
    heard = []
    handle = nn.modules.module.register_module_forward_hook(lambda *given: heard.append(given[0]))
    try:
        assert plain(layer, inputs[0]) is None
        Factors(*inputs[1:]).apply(layer, inputs[0], training=True)
    finally:
        handle.remove()
    assert heard == [layer]
    assert plain(layer, inputs[0]) is not None
