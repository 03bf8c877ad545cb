"""TFB: its noise, its scale on a linear layer in closed form, and what its search says."""

from __future__ import annotations

import math

import pytest
import torch
from linear import NOISE, layer
from problems import mlp

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.errors import ConfigError
from pyrolora.guides import MAP, TFB
from pyrolora.guides.tfb import SCALES, largest_scale


def fitted(problem, **options):
    return problem.fit(TFB(relative=False, **options))


def test_the_scale_is_that_of_the_closed_form():
    """E loss(σ) − loss(0) = ½ s² σ² r mean ‖x‖² / noise²: the mean of the odd terms is zero."""
    problem = layer(MAP(), n=20)
    posterior = fitted(problem, tolerance=0.2, draws=2000)
    s = posterior.bank.specs["0"].scaling
    per_square = 0.5 * s**2 * 2 * problem.inputs.square().sum(-1).mean() / NOISE**2
    expected = math.sqrt(0.2 / float(per_square))
    found = float(posterior.model.program.scale)
    assert found == pytest.approx(expected, rel=0.08)
    assert posterior.history[-1]["noise_scale"] == pytest.approx(found)
    four = fitted(problem, tolerance=0.8, draws=2000)
    assert float(four.model.program.scale) == pytest.approx(2 * found, rel=0.05)


def test_a_relative_tolerance_is_a_share_of_the_loss():
    problem = layer(MAP(), n=20)
    share = problem.fit(TFB(tolerance=0.01))
    loss = share.history[-1]["anchor_loss"]
    nats = fitted(problem, tolerance=0.01 * loss)
    assert share.model.program.scale == nats.model.program.scale > 0


def test_the_noise_is_the_same_in_every_direction_of_b_and_the_mean_stays():
    problem = layer(MAP(), n=20, inputs=5, outputs=6)
    bank = problem.joint.program.bank
    stretch = torch.tensor([[3.0], [0.2]])
    bank.assign("B_loc", (bank.B_loc.detach().view(2, 6) * stretch).flatten())
    before = {name: tensor.clone() for name, tensor in bank.state_dict().items()}
    posterior = fitted(problem, tolerance=0.1)
    assert all(torch.equal(before[n], t) for n, t in posterior.bank.state_dict().items())
    A, B = posterior.factors(posterior.sample(20_000, seed=0))["0"]
    mean, _ = posterior.factors()["0"]
    x = problem.inputs[0]
    scaling, scale = posterior.bank.specs["0"].scaling, posterior.model.program.scale
    noise = scaling * (A - mean) @ x @ B.mT  # (S, out)
    U, d, _ = torch.linalg.svd(B, full_matrices=False)
    assert d[0] > 10 * d[1]
    expected = (scaling * scale * x.norm()) ** 2
    torch.testing.assert_close((noise @ U).T.cov(), expected * torch.eye(2), rtol=0.05,
                               atol=0.05 * float(expected))  # fmt: skip


def test_a_direction_that_b_does_not_have_gets_no_noise():
    problem = layer(MAP(), n=20)
    bank = problem.joint.program.bank
    bank.assign("B_loc", torch.cat([bank.B_loc.detach()[:4], torch.zeros(4)]))
    posterior = fitted(problem, tolerance=0.1)
    A, _ = posterior.factors(posterior.sample(5))["0"]
    mean, _ = posterior.factors()["0"]
    assert (A[:, 0] != mean[0]).all()
    torch.testing.assert_close(A[:, 1], mean[1].expand(5, -1))


@pytest.mark.parametrize("power", [1.0, 2.0, 5.0])
def test_the_search_finds_the_scale_for_any_rising_loss(power):
    asked = []

    def rise(scale):
        asked.append(scale)
        return (scale / 0.3) ** power if scale < 2 else math.nan

    found = largest_scale(rise, 0.5, 12)
    assert 0.9 < found / (0.3 * 0.5 ** (1 / power)) <= 1
    assert len(asked) <= 12


def test_a_loss_that_falls_first_stops_no_search():
    found = largest_scale(lambda scale: scale**2 - 0.5 * scale, 0.1, 20)
    assert 0.9 < found / (0.25 + math.sqrt(0.1625)) <= 1


def test_the_bounds_of_the_search_are_what_it_ends_at():
    assert largest_scale(lambda scale: 0.0, 0.1, 10) == SCALES[1]
    assert largest_scale(lambda scale: 1.0, 0.1, 10) == 0.0


def test_bounds_are_named():
    problem = layer(MAP(), n=20)
    with pytest.warns(UserWarning, match="posterior is a point"):
        fitted(problem, tolerance=1e-9, steps=1)
    bank = problem.joint.program.bank
    bank.assign("B_loc", torch.zeros_like(bank.B_loc))
    with pytest.warns(UserWarning, match="upper bound of its search, σ = 10"):
        fitted(problem, tolerance=0.1)


def test_held_out_data_may_be_the_anchor_and_have_to_be_there(steps):
    x = torch.randn(30, 4)
    y = (x[:, 0] > 0).long()
    options = {"task": "classification", "adapter": AdapterConfig(r=2), "epochs": 2}
    with pytest.raises(ConfigError, match="pass eval_data="):
        pyrolora.fit(mlp(outputs=2), (x, y), guide=TFB(anchor="validation"), **options)
    assert steps == []
    found = pyrolora.fit(
        mlp(outputs=2), (x, y), guide=TFB(anchor="validation", tolerance=0.1), eval_data=(x, y),
        learning_rate=0.02, **options,
    )  # fmt: skip
    other = pyrolora.fit(
        mlp(outputs=2), (x, y), guide=TFB(tolerance=0.1), learning_rate=0.02, **options
    )
    assert found.model.program.scale == pytest.approx(float(other.model.program.scale), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.0}, "tolerance"),
        ({"anchor": "test"}, "anchor must be one of"),
        ({"draws": 3}, "draws must be even"),
        ({"steps": 0}, "steps"),
        ({"relative": "no"}, "relative"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TFB(**options)
