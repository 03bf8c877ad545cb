"""Scales in units of the rows of A and of Bᵀ: the noise is relative to what is learnt."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.adapters import FlatFactors, attach
from pyrolora.errors import ConfigError
from pyrolora.guides import Curvature, LowRank, MeanField, MonteCLoRA, Variational
from pyrolora.inference import NamedELBO
from pyrolora.model import JointGuide, JointModel, build
from pyrolora.tasks import Classification

# At half of the size of a row; the mixture of one component has ‖π‖ = 1.
MONTEC = MonteCLoRA(num_components=1, sample_scale=0.5)
GUIDES = {
    "montec": MONTEC,
    "hierarchical": replace(MONTEC, component_prior="hierarchical"),
    "meanfield": MeanField(prior_scale=0.5),
    "lowrank": LowRank(prior_scale=0.5, init_scale=0.5),
}
BY_CURVATURE = [name for name in GUIDES if name != "lowrank"]
every_guide = pytest.mark.parametrize("name", GUIDES)
every_factor = pytest.mark.parametrize("latent", ["A", "B", "AB"])


def joint_of(guide: Variational, *widths: int, start: str = "kaiming") -> JointModel:
    """A plain network whose B is at random; or whose adapters have a start that is taken off."""
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))
    config = AdapterConfig(r=2, init_lora_weights=start)
    joint = build(network, attach(network, config), config, guide, Classification(), 10)
    bank = joint.program.bank
    if bank.origin is None:
        bank.assign("B_loc", torch.randn(bank.layouts["B"].total))
    else:
        for factor in "AB":
            origin = torch.randn(bank.layouts[factor].total)
            bank.assign(f"{factor}_loc", origin)
            bank.get_buffer(f"{factor}_start").copy_(origin)
    return joint


def named(name: str, latent: str, *widths: int, start: str = "kaiming") -> JointModel:
    return joint_of(replace(GUIDES[name], latent=latent), *widths, start=start)


def settle(joint: JointModel, curvature: Curvature | None = None) -> None:
    """Set the scales given that curvature of the loss; without one, given no data."""
    if curvature is None:
        layout = joint.program.bank.layout(joint.program.options.latent)
        curvature = Curvature(torch.zeros(layout.total), torch.zeros(len(layout), 2, 2))
    if joint.program.settles:
        joint.program.settle(curvature, 1.0)


def move(joint: JointModel) -> None:
    """Take the scales off the prior's, at random."""
    with torch.no_grad():
        for name in joint.program.scale_parameters():
            parameter = joint.program.get_parameter(name)
            parameter.add_(0.3 * torch.randn_like(parameter))


def part(joint: JointModel, factors: FlatFactors) -> Tensor:
    return joint.program.bank.latent_part(joint.program.options.latent, factors).detach()


def sizes(joint: JointModel) -> Tensor:
    """The root mean square of the row of each latent entry, by hand."""
    bank, rows = joint.program.bank, {}
    for factor in "AB":
        matrices = bank.layouts[factor].matrices(getattr(bank.means(), factor).detach())
        rows[factor] = torch.cat([
            matrix.square().mean(-1, keepdim=True).sqrt().expand_as(matrix).flatten()
            for matrix in matrices.values()
        ])  # fmt: skip
    return part(joint, FlatFactors(rows["A"], rows["B"]))


def deviations(joint: JointModel, draws: int = 4000) -> Tensor:
    """Return the width of each latent entry over the root mean square of its row."""
    torch.manual_seed(1)
    drawn = joint.program.factors(joint.program.draw(draws))
    return part(joint, drawn).std(0) / sizes(joint)


def divergence(joint: JointModel) -> tuple[float, Tensor]:
    """Return the KL of the guide from the model at one draw, and the gradient of the bound."""
    torch.manual_seed(1)
    elbo, inputs = NamedELBO(), torch.ones(4, joint.base[0].in_features)
    batch = {"inputs": inputs, "labels": torch.arange(4) % 3}
    joint.zero_grad()
    elbo.differentiable_loss(joint, JointGuide(joint.program), batch).backward()
    gradients = [p.grad.flatten() for p in joint.program.parameters() if p.grad is not None]
    return sum(float(v) for n, v in elbo.terms.items() if n.startswith("kl/")), torch.cat(gradients)


@every_guide
@every_factor
def test_without_data_the_noise_of_every_width_is_the_prior_scale(name: str, latent: str) -> None:
    joint = named(name, latent, 64, 1024, 4)
    settle(joint)
    found = deviations(joint)
    torch.testing.assert_close(found, torch.full_like(found, 0.5), rtol=0.15, atol=0)


@every_guide
@every_factor
def test_the_scale_of_the_noise_is_a_closed_form(name: str, latent: str) -> None:
    """σ d, or ε ‖π‖ L z d, with d the root mean square of each row."""
    joint = named(name, latent, 5, 4, 3)
    program = joint.program
    move(joint)
    if isinstance(program.options, MonteCLoRA):
        sites = program.draw(50)
        gain = 0.5 * sites["mixture_weights"].norm(dim=-1)[..., None]
        noise = program.layout.scale_rows(gain.expand(*gain.shape[:-1], 2), sites["noise"])
        if program.options.component_prior == "hierarchical":
            tril = gain[..., None] * sites["covariance_tril"]
            noise = program.layout.transform(tril, sites["noise"])
        found = part(joint, program.factors(sites)) - part(joint, program.bank.means())
        torch.testing.assert_close(found, noise * sizes(joint), rtol=1e-4, atol=1e-5)
        return
    for site in program.sites:
        inside = site in ("A", "AB") or latent == "B"
        rows = sizes(joint)[: program.bank.layout(site).total]
        if not inside:
            rows = sizes(joint)[-program.bank.layout(site).total :]
        scale = program.param("scale" if name == "lowrank" else f"{site}_scale").detach()
        variance = scale.square()
        if name == "lowrank":
            variance = variance * (1 + program.param("directions").detach().square().sum(-1))
        torch.testing.assert_close(program.law(site).stddev, variance.sqrt() * rows)
        torch.testing.assert_close(program.prior_scale(site), 0.5 * rows)


@every_guide
@pytest.mark.parametrize("latent", ["B", "AB"])
def test_a_b_of_zeros_has_no_noise_and_the_kl_of_every_other(name: str, latent: str) -> None:
    """The KL is one of ratios; B starts at zero in every fit."""
    joint = named(name, latent, 5, 4, 3)
    bank = joint.program.bank
    move(joint)
    kl, _ = divergence(joint)
    bank.assign("B_loc", torch.zeros_like(bank.means().B))
    found, gradient = divergence(joint)
    assert kl > 0.01
    assert found == pytest.approx(kl, rel=1e-3)
    assert gradient.isfinite().all()
    assert gradient.ne(0).any()
    assert joint.program.factors(joint.program.draw(20)).B.abs().max() < 1e-9
    settle(joint)  # an optimum there is one of positive numbers
    assert not joint.program.outside()


@every_guide
@every_factor
@pytest.mark.parametrize("start", ["pissa", "lora-ga"])
def test_a_start_that_is_taken_off_is_no_signal(name: str, latent: str, start: str) -> None:
    """There is no noise before the first step, and then that of what was learnt."""
    joint = named(name, latent, 5, 4, 3, start=start)
    bank = joint.program.bank
    move(joint)
    drawn = joint.program.factors(joint.program.draw(20))
    for factor in "AB":
        origin = getattr(bank.origin, factor)
        torch.testing.assert_close(getattr(drawn, factor).expand(20, -1), origin.expand(20, -1))
    kl, gradient = divergence(joint)
    assert gradient.isfinite().all()
    steps = {f: 0.01 * torch.randn_like(getattr(bank.origin, f)) for f in "AB"}
    for factor, step in steps.items():
        bank.assign(f"{factor}_loc", getattr(bank.origin, factor) + step)
    assert divergence(joint)[0] == pytest.approx(kl, rel=1e-3)
    joint = named(name, latent, 5, 4, 3, start=start)
    for factor, step in steps.items():
        joint.program.bank.assign(
            f"{factor}_loc", getattr(joint.program.bank.origin, factor) + step
        )
    settle(joint)
    torch.manual_seed(1)
    noise = part(joint, joint.program.factors(joint.program.draw(4000))).std(0)
    for factor, step in steps.items():
        joint.program.bank.assign(f"{factor}_loc", step)
    torch.testing.assert_close(noise, 0.5 * sizes(joint), rtol=0.15, atol=0)


@every_factor
@pytest.mark.parametrize("start", ["pissa", "lora-ga"])
@pytest.mark.parametrize("units", ["row", "one"])
def test_the_ratio_of_signal_to_noise_is_that_of_what_was_learnt(
    latent: str, start: str, units: str
) -> None:
    guide = MonteCLoRA(sample_scale=0.5, units=units, latent=latent)
    joint = joint_of(guide, 5, 4, 3, start=start)
    program, bank = joint.program, joint.program.bank
    steps = [0.01 * torch.randn_like(getattr(bank.origin, factor)) for factor in "AB"]
    for factor, step in zip("AB", steps, strict=True):
        bank.assign(f"{factor}_loc", getattr(bank.origin, factor) + step)
    sites = program.draw(3)
    found, _ = program.quantities(sites)["signal_to_noise"]
    diagonal = sites["covariance_tril"].square().sum(-1).sqrt()
    expected = 1 / (0.5 * sites["mixture_weights"].norm(dim=-1)[..., None] * diagonal)
    if units == "one":
        learnt = bank.latent_part(latent, FlatFactors(*steps))
        expected = expected * program.layout.row_sizes(learnt)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", BY_CURVATURE)
@every_factor
def test_the_law_of_the_update_is_one_for_every_size_of_a_and_b(name: str, latent: str) -> None:
    """A times 3 and B over 3: the curvature of A is a ninth, the update's deviations stay."""
    joint = named(name, latent, 5, 4)
    bank = joint.program.bank
    layout, root = bank.layout(latent), torch.randn(2, 6)
    entries, ranks = torch.rand(layout.total) * 300, (200 * root @ root.mT)[None]
    found = []
    for times in (1.0, 3.0):
        bank.assign("A_loc", times * bank.means().A.detach())
        bank.assign("B_loc", bank.means().B.detach() / times)
        squared = torch.tensor([times**2 if b.factor == "A" else times**-2 for b in layout.blocks])
        settle(joint, Curvature(layout.scale(1 / squared, entries), ranks / squared[:, None, None]))
        found.append(deviations(joint))
    torch.testing.assert_close(*found)
    assert float(found[0].mean()) < 0.4  # the data say something


@every_guide
@every_factor
def test_the_noise_follows_the_means_with_a_gradient(name: str, latent: str) -> None:
    """d draw / d mean is that of m + rms(row) ε z, z held."""
    joint = named(name, latent, 3, 4)
    settle(joint)
    program, bank = joint.program, joint.program.bank
    torch.manual_seed(2)
    if isinstance(program.options, MonteCLoRA):
        drawn = program.factors({k: v[0] for k, v in program.draw(1).items()})
    else:
        drawn = program.factors({site: program.law(site).rsample() for site in program.sites})
    drawn = bank.latent_part(latent, drawn)
    means = part(joint, bank.means())
    noise, rows = (drawn.detach() - means) / sizes(joint), bank.layout(latent).groups
    weights = torch.randn(len(means))
    (drawn * weights).sum().backward()
    means.requires_grad_()
    by_hand = [
        matrix + matrix.square().mean(-1, keepdim=True).sqrt() * z.view_as(matrix)
        for matrix, z in (
            (m.view(group.rank, group.columns), z)
            for group, m, z in zip(
                rows,
                means.split([g.total for g in rows]),
                noise.split([g.total for g in rows]),
                strict=True,
            )
        )
    ]
    flat = torch.cat([matrix.flatten() for matrix in by_hand])
    (wanted,) = torch.autograd.grad((flat * weights).sum(), means)
    gradients = [bank.get_parameter(f"{factor}_loc").grad for factor in latent]
    torch.testing.assert_close(torch.cat(gradients), wanted)


@every_guide
@every_factor
def test_ranks_that_move_have_finite_gradients(name: str, latent: str) -> None:
    """Idle ranks have zeros in A, whose size has no derivative."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    posterior = pyrolora.fit(
        network,
        (torch.randn(24, 6), torch.randint(0, 3, (24,))),
        replace(GUIDES[name], latent=latent),
        task="classification",
        adapter=AdapterConfig(r=2, target_modules=["0", "2"], rank_allocation="snr"),
        epochs=4,
        batch_size=4,
    )
    assert all(torch.isfinite(p).all() for p in posterior.model.parameters())
    assert not posterior.bank.mask().all()  # there are idle ranks


@pytest.mark.parametrize("guide", [MonteCLoRA, MeanField, LowRank])
@pytest.mark.parametrize("prior_mean", ["zero", "start"])
def test_means_with_a_price_have_no_such_unit(guide: type, prior_mean: str) -> None:
    with pytest.raises(ConfigError, match=r"units='row'.*prior_mean=.*units='fan_in'"):
        guide(units="row", prior_mean=prior_mean)
    assert guide(prior_mean=prior_mean).unit == "fan_in"
