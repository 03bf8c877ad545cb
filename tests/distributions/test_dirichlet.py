"""The divergence of Dirichlet laws against torch's, and its gradient."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence
from torch.func import grad, vmap

from pyrolora.distributions.dirichlet import dirichlet_divergence
from pyrolora.distributions.kl import divergence


def concentrations(*shape, dtype=torch.float32):
    return (3 * torch.randn(shape, dtype=dtype)).exp()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (4,), (7, 4), (3, 1, 5)])
def test_value_and_gradient_are_torchs_to_the_bit(shape, dtype):
    b, weights = concentrations(*shape, dtype=dtype), concentrations(*shape[:-1], dtype=dtype)
    results = []
    for function in (dirichlet_divergence, lambda a, b: kl_divergence(law(a), law(b))):
        torch.manual_seed(1)
        a = concentrations(*shape, dtype=dtype).requires_grad_()
        value = function(a, b)
        (value * weights).sum().backward()
        results.append((value.detach(), a.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_gradients_and_their_gradients_are_those_of_finite_differences():
    b = concentrations(3, 4, dtype=torch.float64)
    a = (concentrations(3, 4, dtype=torch.float64) + 0.1).requires_grad_()
    torch.autograd.gradcheck(lambda a: dirichlet_divergence(a, b), [a])
    torch.autograd.gradgradcheck(lambda a: dirichlet_divergence(a, b), [a])


def test_a_constant_broadcasts_and_equal_laws_are_no_way_apart():
    a, b = concentrations(5, 4).requires_grad_(), concentrations(4)
    value = dirichlet_divergence(a, b)
    torch.testing.assert_close(value, kl_divergence(law(a), law(b.expand(5, 4))))
    value.sum().backward()
    assert a.grad.shape == (5, 4)
    assert dirichlet_divergence(b, b).abs() < 1e-5 * b.sum()


def test_gradients_of_both_laws_and_in_functorch_are_torchs():
    a, b = concentrations(2, 4).requires_grad_(), concentrations(2, 4).requires_grad_()
    got = torch.autograd.grad(dirichlet_divergence(a, b).sum(), [a, b])
    expected = torch.autograd.grad(kl_divergence(law(a), law(b)).sum(), [a, b])
    assert all(map(torch.equal, got, expected))
    rows = vmap(grad(dirichlet_divergence))(a.detach(), b.detach())
    torch.testing.assert_close(rows, got[0], rtol=1e-4, atol=1e-4)


def test_the_bound_takes_it_for_pyros_laws(monkeypatch):
    a, b = concentrations(2, 4), concentrations(2, 4)
    laws = dist.Dirichlet(a), dist.Dirichlet(b)
    expected = kl_divergence(*laws)
    monkeypatch.setattr("pyrolora.distributions.kl.kl_divergence", None)
    assert torch.equal(divergence(*laws), expected)


def law(concentration):
    return torch.distributions.Dirichlet(concentration, validate_args=False)
