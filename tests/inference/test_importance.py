"""Importance of a rank: ablation against single evaluations, signal-to-noise by its formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import absolute, batch_of, bert, llama, mlp, tokens

from pyrolora import AdapterConfig
from pyrolora.adapters import attach
from pyrolora.guides import MAP, NUTS, TFB, Flat, LowRank, MeanField, MonteCLoRA
from pyrolora.inference import ablation, signal_to_noise
from pyrolora.model import build
from pyrolora.tasks import task_for


def joint_of(network, guide=None, task=None, **config):
    """A joint model with B away from zero and, where ranks move, not the leading ones active."""
    options = AdapterConfig(**{"r": 2, "target_modules": "all-linear", **config})
    law = task_for(network, task)
    joint = build(network, attach(network, options), options, guide or MAP(), law, 10)
    bank = joint.program.bank
    if bank.active is not None:
        mask = bank.mask().clone()
        mask[0] = bank.slots()[0] & (torch.arange(mask.shape[1]) % 2 == 1)
        bank.activate(mask)
    bank.assign("B_loc", bank.kept("B", torch.randn_like(bank.B_loc)))
    return joint


def plain(n=7):
    return {"inputs": torch.randn(n, 4), "labels": torch.arange(n) % 3}


def one_by_one(joint, batch):
    """The definition: one setting of the factors, and one evaluation, after the other."""
    bank = joint.program.bank
    means = bank.means()
    active = bank.mask()

    def score(mask):
        factors = replace(means, B=bank.kept("B", means.B, mask))
        with torch.no_grad():
            output = joint.network(batch, factors)
        found = joint.task.log_prob(output, batch).double()
        return float(found.sum()) / joint.task.count(batch["labels"])

    expected = torch.full(active.shape, torch.nan, dtype=torch.double)
    for i, k in active.nonzero().tolist():
        alone = torch.zeros_like(active)
        alone[i, k] = True
        expected[i, k] = score(active) - score(active & ~alone) + score(alone)
    return expected


@pytest.mark.parametrize("rows", [1, 20, 10_000])
@pytest.mark.parametrize("allocation", ["uniform", "alora"])
def test_ablation_is_that_of_one_evaluation_after_the_other(rows, allocation):
    joint = joint_of(mlp(), task="classification", rank_allocation=allocation)
    batch = plain()
    found = ablation(joint, batch, rows)
    expected = one_by_one(joint, batch)
    torch.testing.assert_close(found, expected, equal_nan=True, atol=2e-6, rtol=1e-4)
    assert torch.equal(found.isfinite(), joint.program.bank.mask())
    assert found[found.isfinite()].std() > 1e-3


@pytest.mark.parametrize(
    ("network", "data"),
    [(bert, tokens(5)), (llama, tokens(4).remove_columns("labels"))],
    ids=["bert", "llama"],
)
def test_ablation_of_transformers(network, data):
    batch = batch_of(data)
    batch.setdefault("labels", batch["input_ids"].clone())
    joint = joint_of(network(), target_modules="auto", rank_allocation="snr").train()
    found = ablation(joint, batch)
    assert joint.training, "the mode is given back"
    expected = one_by_one(joint.eval(), batch)
    torch.testing.assert_close(found, expected, equal_nan=True, atol=2e-6, rtol=1e-4)


def test_a_rank_that_does_nothing_is_worth_what_the_network_is_without_adapters():
    joint = joint_of(mlp(), task="classification")
    bank, batch = joint.program.bank, plain()
    mask = bank.slots()
    mask[0, 1] = False
    bank.assign("B_loc", bank.kept("B", bank.B_loc.detach(), mask))
    nothing = replace(bank.means(), B=torch.zeros_like(bank.B_loc))
    with torch.no_grad():
        score = joint.task.log_prob(joint.network(batch, nothing), batch).mean()
    torch.testing.assert_close(ablation(joint, batch)[0, 1].float(), score)


@pytest.mark.parametrize("allocation", ["uniform", "snr"])
def test_signal_to_noise_of_mean_field_is_the_ratio_of_its_means_and_scales(allocation):
    """Given B: ‖m_k‖² / Σ_j σ_kj²."""
    options = {"task": "classification", "rank_allocation": allocation}
    joint = joint_of(mlp(inputs=12), absolute(MeanField), **options)
    program = joint.program
    bank = program.bank
    program.assign("A_scale", 0.05 + 0.2 * torch.rand_like(program.A_scale))
    found = signal_to_noise(program, 20_000)
    means = bank.layouts["A"].matrices(bank.means().A)
    scales = bank.layouts["A"].matrices(program.param("A_scale"))
    for i, name in enumerate(bank.specs):
        for k in range(len(means[name])):
            if bank.mask()[i, k]:
                expected = means[name][k].square().sum() / scales[name][k].square().sum()
                assert found[i, k] == pytest.approx(expected.item(), rel=0.05)
            else:
                assert found[i, k].isnan()


def test_signal_to_noise_with_both_factors_latent_is_that_of_the_product():
    """‖m_a‖² ‖m_b‖² / ((‖m_a‖² + Σσ²) (‖m_b‖² + Σσ²) − ‖m_a‖² ‖m_b‖²)."""
    guide = absolute(MeanField, latent="AB", init_scale=0.1)
    joint = joint_of(mlp(inputs=12), guide, task="classification")
    bank = joint.program.bank
    found = signal_to_noise(joint.program, 20_000)
    for i, (name, (A, B)) in enumerate(bank.matrices(bank.means()).items()):
        spec = bank.specs[name]
        a, b = A.square().sum(-1), B.square().sum(-2)
        whole = (a + 0.01 * spec.in_features) * (b + 0.01 * spec.out_features)
        torch.testing.assert_close(found[i].float(), a * b / (whole - a * b), rtol=0.05, atol=1e-3)


def test_a_rank_whose_b_is_zero_has_no_signal():
    joint = joint_of(mlp(), MonteCLoRA(), task="classification")
    bank = joint.program.bank
    bank.assign("B_loc", torch.zeros_like(bank.B_loc))
    assert (signal_to_noise(joint.program) == 0).all()


def test_montecs_ratio_falls_with_its_covariance():
    guide = Flat(inner=MonteCLoRA(init_covariance=1.0))
    joint = joint_of(mlp(), guide, task="classification", rank_allocation="snr")
    wide = signal_to_noise(joint.program, 64)
    joint.program.inner.assign("scale_diag", 0.1 * joint.program.inner.param("scale_diag"))
    narrow = signal_to_noise(joint.program, 64)
    active = joint.program.bank.mask()
    assert (narrow[active] > 10 * wide[active]).all()
    assert torch.equal(wide.isnan(), ~active)


def test_a_rank_whose_mean_is_zero_has_no_signal_however_few_the_draws():
    joint = joint_of(mlp(inputs=12), MeanField(init_scale=0.5), task="classification")
    bank = joint.program.bank
    mask = bank.slots()
    mask[0, 1] = False
    bank.assign("A_loc", bank.kept("A", bank.A_loc.detach(), mask))
    found = signal_to_noise(joint.program, 4)
    assert found[0, 1] == 0
    assert (found[mask] > 0).all()


@pytest.mark.parametrize(
    "guide",
    [
        MeanField(latent="AB"),
        LowRank(latent="AB"),
        LowRank(latent="B", rank=2),
        MonteCLoRA(),
        MonteCLoRA(covariance="full", latent="AB", concentration=0.5),
        MonteCLoRA(component_prior="hierarchical", covariance="full"),
        MonteCLoRA(sparse=True, num_components=2),
        absolute(MonteCLoRA, learn_sample_scale=True, units="fan_in"),
        Flat(inner=MonteCLoRA(learn_sample_scale=True)),
    ],
    ids=str,
)
def test_stated_variances_are_those_of_draws(guide):
    joint = joint_of(mlp(inputs=6), guide, task="classification", rank_allocation="snr")
    program = joint.program
    with torch.no_grad():
        for name in program.scale_parameters():
            parameter = program.get_parameter(name)
            parameter += 0.3 * torch.randn_like(parameter)
        stated, drawn = program.variances(), program.factors(program.draw(40_000))
    for factor in "AB":
        layout, bank = program.bank.layouts[factor], program.bank
        found = getattr(drawn, factor).expand(40_000, -1).var(0)
        pairs = (layout.matrices(t) for t in (getattr(stated, factor), found))
        for i, (one, other) in enumerate(zip(*(p.values() for p in pairs), strict=True)):
            active = bank.mask()[i, : len(one)]
            torch.testing.assert_close(one[active], other[active], rtol=0.06, atol=1e-6)


@pytest.mark.parametrize("guide", [MeanField(), LowRank(), MonteCLoRA()], ids=str)
def test_what_little_the_data_say_of_a_rank_tells_it_from_the_others(guide):
    """Noise in units of the rows has one ratio for all ranks of which the data say nothing."""
    joint = joint_of(mlp(inputs=12), guide, task="classification")
    program = joint.program
    program.assign("concentration", torch.ones(2, 4)) if guide.name == "montec" else None
    name = {"montec": "scale_diag", "meanfield": "A_scale", "lowrank": "scale"}[guide.name]
    if guide.name == "lowrank":
        program.assign("directions", torch.zeros_like(program.param("directions")))
    alike = signal_to_noise(program)
    torch.testing.assert_close(alike, alike[0, 0].expand_as(alike))
    scale = program.param(name).detach().clone()
    narrower = torch.tensor([[0, 0], [0, 1]], dtype=torch.bool)
    rows = narrower if guide.name == "montec" else program.bank.spread("A", narrower)
    program.assign(name, torch.where(rows, 0.999 * scale, scale))
    found = signal_to_noise(program)
    assert found.argmax() == 3
    torch.testing.assert_close(found[1, 1], alike[1, 1] / 0.999**2)


@pytest.mark.parametrize("guide", [TFB(), NUTS(), MAP()], ids=str)
def test_no_variances_are_stated_where_the_sites_have_other_ones(guide):
    """TFB's is that of its standard noise; NUTS has draws, and its inner guide the prior's."""
    joint = joint_of(mlp(), guide, task="classification")
    assert joint.program.variances() is None
