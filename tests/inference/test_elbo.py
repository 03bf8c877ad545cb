"""Our ELBO: Pyro's `TraceMeanField_ELBO` at the same draw, validated once."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import batch_of, bert, tokens
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO

import pyrolora
from pyrolora.guides import MonteCLoRA
from pyrolora.inference import NamedELBO


@pytest.mark.parametrize("prior", ["isotropic", "hierarchical"])
def test_equals_pyros_at_the_same_draw_on_every_path(prior):
    posterior = pyrolora.fit(
        bert(), tokens(), guide=MonteCLoRA(component_prior=prior, latent="AB"), epochs=1
    )
    ours, stock, batch = NamedELBO(), TraceMeanField_ELBO(), batch_of(tokens())
    for seed in range(3):  # the first evaluation is validated, the others are not
        values = []
        for elbo in (ours, stock):
            torch.manual_seed(seed)
            values.append(elbo.differentiable_loss(posterior.model, posterior.guide, batch).item())
        assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_a_site_without_a_closed_form_is_scored_at_the_draw():
    def model():
        pyro.sample("x", dist.Laplace(0.0, 1.0))

    def guide():
        pyro.sample("x", dist.StudentT(5.0, 0.5, 1.0))

    for seed in range(2):
        values = []
        for elbo in (NamedELBO(), TraceMeanField_ELBO()):
            torch.manual_seed(seed)
            values.append(float(elbo.differentiable_loss(model, guide)))
        assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_sites_of_different_weights_dtypes_and_order_keep_their_terms():
    """Sites of one weight are weighted together, whatever stands between them."""
    laws = {"a": 0.5, "b": 2.0, "c": 0.5}

    def model():
        for name, weight in laws.items():
            with poutine.scale(scale=weight):
                dtype = torch.float64 if name == "c" else torch.float32
                pyro.sample(name, dist.Normal(torch.zeros((), dtype=dtype), 1.0))
            pyro.factor(f"after_{name}", torch.tensor(0.1))

    def guide():
        for number, (name, weight) in enumerate(laws.items()):
            with poutine.scale(scale=weight):
                dtype = torch.float64 if name == "c" else torch.float32
                pyro.sample(name, dist.Normal(torch.tensor(number + 1.0, dtype=dtype), 1.0))

    ours = NamedELBO()
    for _ in range(2):
        value = float(ours.differentiable_loss(model, guide))
        assert value == pytest.approx(0.5 * 0.5 + 2.0 * 2.0 + 0.5 * 4.5 - 0.3, rel=1e-6)
        assert {name: float(term) for name, term in ours.terms.items()} == pytest.approx(
            {
                "kl/a": 0.25,
                "after_a": 0.1,
                "kl/b": 4.0,
                "after_b": 0.1,
                "kl/c": 2.25,
                "after_c": 0.1,
            }
        )
        assert [*ours.terms] == ["kl/a", "after_a", "kl/b", "after_b", "kl/c", "after_c"]


def test_validation_finds_a_site_with_the_wrong_shape_on_the_first_evaluation():
    def model():
        with pyro.plate("plate", 3):
            pyro.sample("x", dist.Normal(torch.zeros(3), 1.0))

    def guide():
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0))  # no plate

    with pytest.raises(ValueError, match="invalid log_prob shape"):
        NamedELBO().differentiable_loss(model, guide)


def test_validation_setting_is_left_as_it_was():
    posterior = pyrolora.fit(bert(), tokens(), epochs=1)
    assert pyro.settings.get("validate_distributions_pyro")
    with pyro.validation_enabled(False):
        NamedELBO().differentiable_loss(posterior.model, posterior.guide, batch_of(tokens()))
        assert not pyro.settings.get("validate_distributions_pyro")
