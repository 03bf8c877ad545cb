"""Posterior against prior: exact where both are known, and there for every guide that has both."""

from __future__ import annotations

import pytest
import torch
from problems import absolute, mlp

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.diagnostics.contraction import contractions
from pyrolora.guides import MAP, Ensemble, Flat, Guide, Laplace, MeanField, MonteCLoRA

X = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))


def program(guide: Guide, r: int = 8):
    """An untrained posterior of a network of 64 x 16 and 16 x 16."""
    data = (X, torch.arange(6) % 3)
    options = {"task": "classification", "adapter": AdapterConfig(r=r)}
    fitted = pyrolora.fit(
        mlp(64, 16), data, guide, epochs=1, learning_rate=1e-9, batch_size=6, **options
    )
    return fitted.model.program


@pytest.mark.parametrize("scale", [0.2, 0.05])
def test_mean_field_against_its_prior(scale: float) -> None:
    """σ / σ₀ and rms(m) / σ₀ are parameters."""
    made = program(absolute(MeanField, scale_learning_rate=1e-9, init_scale=scale))
    found = {one.block: one for one in contractions(made)}
    assert set(found) == {"0.A", "2.A"}, "B has no spread"
    means = made.bank.layouts["A"].matrices(made.bank.means().A)
    for block, one in found.items():
        expected = means[block.removesuffix(".A")].detach().square().mean().sqrt() / 0.2
        entries = means[block.removesuffix(".A")].numel()
        assert one.scale == pytest.approx(scale / 0.2, rel=5 * (2 / 63 / entries) ** 0.5)
        assert one.shift == pytest.approx(float(expected), rel=0.15)
        assert not one.prior_dominated


def test_a_posterior_that_is_its_prior_is_found() -> None:
    made = program(absolute(MeanField, init_scale=0.2, latent="AB"), r=16)
    made.bank.assign("A_loc", torch.zeros_like(made.bank.get_parameter("A_loc")))
    found = contractions(made)
    assert {one.block for one in found} == {"0.A", "2.A", "0.B", "2.B"}
    assert all(one.prior_dominated for one in found), found


def test_montec_starts_inside_its_prior() -> None:
    """V₀ = 0.01 I: a tenth of the prior's spread; the mixture weights' law is nearly the same."""
    made = program(absolute(MonteCLoRA, scale_learning_rate=1e-9))
    for one in contractions(made):
        assert one.scale == pytest.approx(0.1, rel=0.25)
    around = MonteCLoRA(scale_updates="gradient", scale_learning_rate=1e-9)
    for one in contractions(program(around, r=16)):
        assert one.scale == pytest.approx(1, rel=0.15)
        assert one.shift < 0.15


def test_a_point_has_no_scale() -> None:
    for one in contractions(program(MAP(prior_scale=0.5))):
        assert one.scale == 0


@pytest.mark.parametrize("guide", [MAP(), Ensemble(members=2), Flat(inner=MAP())])
def test_without_a_prior_there_is_nothing_to_compare(guide: Guide) -> None:
    assert contractions(program(guide)) == []


@pytest.mark.parametrize("guide", [Laplace(prior_scale=0.5), Flat(inner=MonteCLoRA(), rho=0.1)])
def test_every_guide_with_a_prior_has_a_contraction(guide: Guide) -> None:
    found = contractions(program(guide))
    assert found
    assert all(0 < one.scale < 1.2 for one in found)


def test_a_small_spread_around_a_large_mean_is_not_lost() -> None:
    made = program(absolute(MeanField, init_scale=1e-4, scale_learning_rate=1e-9))
    made.bank.assign("A_loc", torch.full_like(made.bank.get_parameter("A_loc"), 100.0))
    for one in contractions(made):
        assert one.scale == pytest.approx(5e-4, rel=0.1)
        assert one.shift == pytest.approx(500, rel=0.01)
