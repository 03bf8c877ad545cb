"""A function of entries in pieces has the numbers of the whole, to the last bit, in less memory."""

from __future__ import annotations

import pytest
import torch
from memory import LiveBytes
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import kl_divergence

from pyrolora import defaults
from pyrolora.distributions.kl import divergence


def laws(n: int, *batch: int) -> tuple[list[Tensor], dist.Distribution, dist.Distribution]:
    torch.manual_seed(0)
    m, s = torch.randn(*batch, n), 0.1 + torch.rand(*batch, n)
    m0, s0 = torch.randn(n), torch.tensor(0.7)
    leaves = [t.requires_grad_() for t in (m, s, m0, s0)]
    p = dist.Normal(m, s).to_event(1)
    return leaves, p, dist.Normal(m0, s0).expand(m.shape).to_event(1)


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("n", [1000, 1024, 1])
def test_value_and_gradients_are_those_of_the_whole(
    batch: tuple[int, ...], n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, p, q = laws(n, *batch)
    whole = kl_divergence(p, q)
    expected = torch.autograd.grad(whole.square().sum(), leaves)
    monkeypatch.setattr(defaults, "ENTRIES_AT_ONCE", 64)
    leaves, p, q = laws(n, *batch)
    found = divergence(p, q)
    assert torch.equal(found, whole)
    for ours, theirs in zip(
        torch.autograd.grad(found.square().sum(), leaves), expected, strict=True
    ):
        assert torch.equal(ours, theirs)


def test_constants_get_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "ENTRIES_AT_ONCE", 64)
    leaves, p, q = laws(200)
    leaves[2].requires_grad_(False)
    divergence(p, q.expand([])).backward()
    assert leaves[2].grad is None
    assert leaves[0].grad is not None


def test_intermediate_values_are_those_of_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = []
    for most in (2**30, 2**10):
        monkeypatch.setattr(defaults, "ENTRIES_AT_ONCE", most)
        leaves, p, q = laws(2**18)
        with LiveBytes(*leaves) as live:
            divergence(p, q).backward()
        peaks.append(live.peak / leaves[0].nbytes)
    assert peaks[0] > 6
    assert peaks[1] < 5.2  # the value, and three gradients
