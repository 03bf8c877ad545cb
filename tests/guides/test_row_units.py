"""Scales in units of the rows of A: the noise is relative to what is learnt."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.adapters import attach
from pyrolora.errors import ConfigError
from pyrolora.guides import Curvature, LowRank, MeanField, MonteCLoRA, Variational
from pyrolora.model import JointModel, build
from pyrolora.tasks import Regression

MONTEC = MonteCLoRA(
    units="row", prior_mean="learned", scale_updates="curvature", num_components=1, sample_scale=0.5
)
HIERARCHICAL = replace(MONTEC, component_prior="hierarchical")
MEANFIELD = MeanField(units="row", prior_mean="learned", scale_updates="curvature", prior_scale=0.5)
LOWRANK = LowRank(units="row", prior_mean="learned", prior_scale=0.5, init_scale=0.5)
GUIDES = [MONTEC, HIERARCHICAL, MEANFIELD, LOWRANK]
NAMES = ["montec", "hierarchical", "meanfield", "lowrank"]


def joint_of(guide: Variational, *widths: int) -> JointModel:
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))
    config = AdapterConfig(r=2)
    joint = build(network, attach(network, config), config, guide, Regression(), 10)
    bank = joint.program.bank
    bank.assign("B_loc", torch.randn(bank.layouts["B"].total))
    return joint


def settle(joint: JointModel, curvature: Curvature) -> None:
    if joint.program.settles:
        joint.program.settle(curvature, 1.0)


def nothing(joint: JointModel) -> Curvature:
    """The curvature of no data."""
    layout = joint.program.layout if hasattr(joint.program, "layout") else None
    layout = layout or joint.program.bank.layouts["A"]
    return Curvature(torch.zeros(layout.total), torch.zeros(len(layout), 2, 2))


def deviations(joint: JointModel, draws: int = 4000) -> Tensor:
    """Return the width of each entry of A over the root mean square of its row."""
    bank = joint.program.bank
    torch.manual_seed(1)
    drawn = joint.program.factors(joint.program.draw(draws)).A
    layout = bank.layouts["A"]
    sizes = layout.row_sizes(bank.means().A)
    return layout.scale_rows(1 / sizes, drawn.std(0)).detach()


@pytest.mark.parametrize("guide", GUIDES, ids=NAMES)
def test_without_data_the_noise_of_every_width_is_the_prior_scale(guide: Variational) -> None:
    joint = joint_of(guide, 64, 2048, 4)
    settle(joint, nothing(joint))
    torch.testing.assert_close(
        deviations(joint), torch.full((2 * (64 + 2048),), 0.5), rtol=0.15, atol=0
    )


@pytest.mark.parametrize("guide", GUIDES[:3], ids=NAMES[:3])
def test_the_law_of_the_update_is_one_for_every_size_of_a_and_b(guide: Variational) -> None:
    """A times 3 and B over 3: the curvature of A is a ninth, the update's deviations stay."""
    joint = joint_of(guide, 5, 4)
    bank = joint.program.bank
    root = torch.randn(2, 6)
    entries, ranks = torch.rand(10) * 300, (200 * root @ root.mT)[None]
    found = []
    for times in (1.0, 3.0):
        bank.assign("A_loc", times * bank.means().A.detach())
        bank.assign("B_loc", bank.means().B.detach() / times)
        settle(joint, Curvature(entries / times**2, ranks / times**2))
        found.append(deviations(joint))
    torch.testing.assert_close(*found)
    assert float(found[0].mean()) < 0.4  # the data say something


@pytest.mark.parametrize("guide", GUIDES, ids=NAMES)
def test_the_noise_follows_the_means_with_a_gradient(guide: Variational) -> None:
    """d draw / d mean is that of m + rms(row) ε z, z held."""
    joint = joint_of(guide, 3, 4)
    settle(joint, nothing(joint))
    program, bank = joint.program, joint.program.bank
    A = bank.means().A.detach().unflatten(-1, (2, 3))
    torch.manual_seed(2)
    if isinstance(guide, MonteCLoRA):
        drawn = program.factors({k: v[0] for k, v in program.draw(1).items()}).A
    else:
        drawn = program.law("A").rsample()
    noise = (drawn.detach().unflatten(-1, (2, 3)) - A) / A.square().mean(-1, keepdim=True).sqrt()
    weights = torch.randn(6)
    (drawn * weights).sum().backward()
    A.requires_grad_()
    by_hand = A + A.square().mean(-1, keepdim=True).sqrt() * noise
    (wanted,) = torch.autograd.grad((by_hand.flatten() * weights).sum(), A)
    gradient = bank.get_parameter("A_loc").grad
    assert gradient is not None
    torch.testing.assert_close(gradient, wanted.flatten())


@pytest.mark.parametrize("guide", GUIDES, ids=NAMES)
def test_ranks_that_move_have_finite_gradients(guide: Variational) -> None:
    """Idle ranks have zeros in A, whose size has no derivative."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    posterior = pyrolora.fit(
        network,
        (torch.randn(24, 6), torch.randint(0, 3, (24,))),
        guide,
        task="classification",
        adapter=AdapterConfig(r=2, target_modules=["0", "2"], rank_allocation="snr"),
        epochs=4,
        batch_size=4,
    )
    assert all(torch.isfinite(p).all() for p in posterior.model.parameters())
    assert not posterior.bank.mask().all()  # there are idle ranks


@pytest.mark.parametrize("guide", [MonteCLoRA, MeanField, LowRank])
def test_other_factors_and_means_with_a_price_have_no_such_unit(guide: type) -> None:
    for options in ({"latent": "B", "prior_mean": "learned"}, {"prior_mean": "zero"}):
        with pytest.raises(ConfigError, match="units='row'"):
            guide(units="row", **options)
