"""Real data, random labels and no data are told apart, and nothing else is taken for learning."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from problems import absolute, llama, mlp, texts, tokenizer

import pyrolora
from pyrolora import AdapterConfig, Posterior
from pyrolora.diagnostics.chance import without_adapters
from pyrolora.diagnostics.contraction import (
    contractions,
    has_trained_widths,
    update_norms,
)
from pyrolora.guides import MAP, SWAG, Flat, Guide, Laplace, LowRank, MeanField, MonteCLoRA
from pyrolora.predictive import ClassPrediction, RegressionPrediction
from pyrolora.report import report_on
from pyrolora.report.findings import no_better_than_chance, no_update, prior_dominated
from pyrolora.report.widths import about_widths, contraction_table, prior_finding

COMMON = {"units": "fan_in", "prior_mean": "start", "kl_weight": 1.0}
GUIDES = {
    "meanfield": MeanField(prior_scale=1.0, init_scale=0.02, **COMMON),
    "montec": MonteCLoRA(sample_scale=1.6, init_covariance=0.01, **COMMON),
}
KINDS = ("real", "random", "none")


def data(kind: str, n: int, seed: int):
    """Which of three numbers is the largest; with labels of other examples; or inputs of zero."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 4, generator=generator)
    labels = inputs[:, :3].argmax(-1)
    if kind == "random":
        labels = labels[torch.randperm(n, generator=generator)]
    return (inputs * (kind != "none"), labels)


@cache
def fitted(guide: Guide, kind: str) -> Posterior:
    return pyrolora.fit(
        mlp(), data(kind, 96, 0), guide, task="classification", epochs=8, batch_size=16,
        adapter=AdapterConfig(r=4, target_modules=["0"]), learning_rate=0.03, seed=0,
    )  # fmt: skip


def judged(guide: Guide, kind: str) -> tuple[bool, bool, bool]:
    """Whether chance, no update, and the prior are found, on labels that were held out."""
    posterior = fitted(guide, kind)
    program = posterior.model.program
    prediction = posterior.predict(data(kind, 200, 1), 16, seed=0)
    found = (
        no_better_than_chance(prediction, lambda: None),
        no_update(update_norms(program)),
        prior_dominated(contractions(program), trained=has_trained_widths(program)),
    )
    return tuple(one is not None for one in found)  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore:training has not moved the adapters")
@pytest.mark.parametrize("updates", ["curvature", "gradient"])
@pytest.mark.parametrize("name", GUIDES)
def test_real_data_random_labels_and_no_data_are_told_apart(name: str, updates: str) -> None:
    """By curvature the widths of no data are the prior's; trained ones are the schedule's, the
    same whatever the data, and the page says that they say nothing."""
    guide = replace(GUIDES[name], scale_updates=updates)
    found = {kind: judged(guide, kind) for kind in KINDS}
    settled = updates == "curvature"
    assert found["real"] == (False, False, False)
    assert found["random"][:2] == (True, False)
    assert found["none"] == (True, True, settled)

    blocks = {kind: contractions(fitted(guide, kind).model.program)[0] for kind in KINDS}
    widths = {kind: np.mean(blocks[kind].width_kl) for kind in KINDS}
    means = {kind: np.mean(blocks[kind].mean_kl) for kind in KINDS}
    program = fitted(guide, "real").model.program
    assert has_trained_widths(program) != settled
    assert means["real"] > 3 * means["random"] > 10 * means["none"], "around the start"
    assert means["none"] < 1e-3
    said = about_widths(program, [blocks["real"]])
    if settled:
        assert blocks["none"].scale == pytest.approx(1, abs=0.03)
        assert widths["real"] > 3 * widths["random"] > 3 * widths["none"]
        assert widths["none"] < 1e-3
        assert "the prior's where the data said nothing" in said
    else:
        assert widths["real"] == pytest.approx(widths["none"], rel=0.1)
        assert "no sign of learning" in said
        assert "not known" in said
        assert "scale_updates='curvature' finds out" in said


@pytest.mark.filterwarnings("ignore:training has not moved the adapters")
@pytest.mark.parametrize("n", [96, 300])
@pytest.mark.parametrize("guide", ["montec", "meanfield"])
def test_the_defaults_tell_them_apart(guide: str, n: int) -> None:
    """With and without examples that are held back, which move no width where nothing is learnt."""
    found = {}
    for kind in KINDS:
        posterior = pyrolora.fit(
            mlp(), data(kind, n, 0), guide, task="classification", epochs=8, batch_size=16,
            adapter=AdapterConfig(r=4, target_modules=["0"]), learning_rate=0.03, seed=0,
        )  # fmt: skip
        assert posterior.held_back == (30 if n == 300 else 0)
        report = report_on(posterior, data(kind, 200, 1), num_samples=16, seed=0)
        found[kind] = {finding.name for finding in report.findings}
    assert found["real"] == set()
    assert "no_better_than_chance" in found["random"]
    assert "no_update" not in found["random"]
    assert found["none"] == {"no_better_than_chance", "no_update", "prior_dominated"}


# The KL -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "guide",
    [
        MeanField(prior_scale=0.5, init_scale=0.2, latent="AB", prior_mean="zero"),
        Flat(inner=MeanField(prior_scale=0.5, init_scale=0.2, prior_mean="start")),
    ],
)
def test_the_kl_of_mean_field_is_the_fits_own(guide: Guide) -> None:
    """Its entries are independent: their sum is the KL of the sites."""
    program = fitted(guide, "real").model.program
    core = getattr(program, "inner", program)
    expected = sum(
        float(torch.distributions.kl_divergence(core.law(site), core.prior(site)).detach())
        for site in core.sites
    )
    layouts = {f"{b.layer}.{f}": b for f in "AB" for b in program.bank.layouts[f].blocks}
    found = sum(
        layouts[one.block].columns * (sum(one.width_kl) + sum(one.mean_kl))
        for one in contractions(program)
    )
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_kl_of_montec_is_that_of_its_moments() -> None:
    """var a = ε² E‖π‖² V_kk, with E‖π‖² of the Dirichlet in closed form, against α₀ and I."""
    program = fitted(absolute(MonteCLoRA, sample_scale=0.5), "real").model.program

    def squared(alpha: torch.Tensor) -> torch.Tensor:
        total = alpha.sum(-1)
        return (alpha * (alpha + 1)).sum(-1) / (total * (total + 1))

    alpha = program.param("concentration")[0].detach()
    V = program.param("scale_diag")[0].detach().square()
    ratio = V * squared(alpha) / squared(torch.ones(4))
    (found,) = contractions(program)
    assert found.scale == pytest.approx(float(ratio.mean().sqrt()), rel=0.15)
    expected = 0.5 * (ratio - 1 - ratio.log())
    np.testing.assert_allclose(found.width_kl, expected, rtol=0.15)
    A = program.bank.matrices(program.mean())["0"][0].detach()
    prior = 0.25 * squared(torch.ones(4))
    np.testing.assert_allclose(
        found.mean_kl, 0.5 * A.square().mean(-1) / prior, rtol=0.25, atol=0.02
    )


@pytest.mark.parametrize(
    ("guide", "trained"),
    [
        (MonteCLoRA(scale_updates="gradient"), True),
        (MonteCLoRA(), False),
        (LowRank(rank=2), False),
        (LowRank(rank=2, scale_updates="gradient"), True),
        (SWAG(prior_scale=0.5, snapshots=4, rank=2), True),
        (Flat(inner=MeanField(scale_updates="gradient"), rho=0.1), True),
        (Laplace(prior_scale=0.5), False),
    ],
)
def test_every_width_is_put_down_to_what_made_it(guide: Guide, trained: bool) -> None:
    program = fitted(guide, "real").model.program
    assert has_trained_widths(program) == trained
    table = contraction_table(contractions(program))
    assert len(table) == len(contractions(program)) >= 1
    assert np.isfinite(table.drop(columns="block").to_numpy(float)).all()
    lowest, highest = table["KL, lowest rank"], table["KL, highest rank"]
    both = table["KL of the width"] + table["KL of the mean"]
    assert ((lowest <= both + 1e-9) & (both <= highest + 1e-9)).all()


@pytest.mark.parametrize(
    "guide",
    [LowRank(scale_updates="gradient"), MonteCLoRA(learn_sample_scale=True)],
    ids=["lowrank", "montec"],
)
def test_curvature_is_no_advice_where_nothing_is_set_by_it(guide: Guide) -> None:
    program = fitted(guide, "real").model.program
    said = about_widths(program, contractions(program))
    assert said.endswith("is not known.")
    said = about_widths(program, contractions(program), chosen=True)
    assert said.endswith("one number that multiplies the widths of both, posterior and prior.")


def test_widths_that_are_trained_from_the_curvatures_are_no_schedules() -> None:
    program = fitted(LowRank(), "real").model.program
    said = about_widths(program, contractions(program))
    assert "no sign of learning" not in said
    assert "three quarters of the steps" in said


@pytest.mark.filterwarnings("ignore:training has not moved the adapters")
def test_advice_names_the_examples_that_could_choose_the_width() -> None:
    few = fitted(LowRank(), "none")
    assert not few.held_back
    found = prior_finding(few, contractions(few.model.program))
    assert found is not None
    assert "hold_back" in found.advice
    absolute = fitted(LowRank(**COMMON), "none")
    found = prior_finding(absolute, contractions(absolute.model.program))
    assert found is not None
    assert "hold_back" not in found.advice


def test_curvature_is_no_advice_after_an_earlier_posterior_nor_for_embeddings() -> None:
    earlier = fitted(GUIDES["meanfield"], "real")
    data_ = data("real", 40, 2)
    later = pyrolora.fit(earlier.base, data_, prior=earlier, epochs=1).model.program
    assert about_widths(later, contractions(later)).endswith("is not known.")
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Embedding(5, 4), torch.nn.Flatten(), torch.nn.Linear(8, 2)
    )
    words = torch.randint(5, (20, 2))
    lookup = pyrolora.fit(
        network, (words, words[:, 0] % 2), "meanfield", task="classification", epochs=1,
        adapter=AdapterConfig(r=1, target_modules=["0"], modules_to_save=["2"]),
    ).model.program  # fmt: skip
    assert about_widths(lookup, contractions(lookup)).endswith("is not known.")


def test_a_point_has_no_widths() -> None:
    program = fitted(MAP(prior_scale=0.5), "real").model.program
    assert about_widths(program, contractions(program)).startswith("The posterior is a point")


# Chance -------------------------------------------------------------------------------------------


def classes(probs: torch.Tensor, targets: torch.Tensor) -> ClassPrediction:
    scores = probs.gather(-1, targets[:, None])[None, :, 0].log()
    return ClassPrediction(targets, scores, probs[None])


def chance(prediction) -> bool:
    return no_better_than_chance(prediction, lambda: None) is not None


def test_chance_of_classes_is_their_frequency() -> None:
    """Two of three, one of three: the mean gain by hand."""
    targets = torch.tensor([0, 0, 1])
    found = no_better_than_chance(classes(torch.full((3, 2), 0.5), targets), lambda: None)
    assert found is not None
    assert f"{np.log(0.5) - np.log([2 / 3, 2 / 3, 1 / 3]).mean():+.3f} nats" in found.found


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9])
def test_no_constant_is_better_than_chance(share: float) -> None:
    targets = (torch.arange(10) < 3).long()
    assert chance(classes(torch.tensor([[1 - share, share]]).expand(10, 2), targets))


def test_an_overconfident_prediction_has_learnt() -> None:
    """Right in 80 of 100, at a price of −log 1e-6 in the others: worse than chance in nats."""
    targets = torch.arange(100) % 2
    said = torch.where(torch.arange(100) < 80, targets, 1 - targets)
    probs = torch.where(torch.nn.functional.one_hot(said, 2).bool(), 1 - 1e-6, 1e-6)
    assert not chance(classes(probs, targets))
    assert chance(classes(probs, targets[torch.randperm(100)]))


def test_knowing_probabilities_without_changing_the_answer_is_learning() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.where(torch.arange(400) % 2 == 0, 0.02, 0.4)
    targets = (torch.rand(400, generator=generator) < p).long()
    assert not chance(classes(torch.stack([1 - p, p], -1), targets))
    assert chance(classes(torch.tensor([[0.79, 0.21]]).expand(400, 2), targets))


def test_choices_that_are_not_there_are_no_chance() -> None:
    """Each of two choices has about a half, however long the longest list is."""
    probs = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).expand(60, 4)
    assert chance(classes(probs, torch.arange(60) % 2))


def test_chance_of_numbers_is_the_normal_law_of_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(200, generator=generator)

    def regression(mean: torch.Tensor, scale: float) -> RegressionPrediction:
        law = torch.distributions.Normal(mean, scale)
        return RegressionPrediction(y, law.log_prob(y)[None], mean[None], noise_scale=scale)

    for scale in (0.5, float(y.std(correction=0)), 2.0):
        assert chance(regression(y.mean().expand(200), scale))
    assert chance(regression(torch.randn(200, generator=generator), 1.0))
    assert not chance(regression(0.5 * y, 0.6))
    assert not chance(regression(0.5 * y, 1e-3)), "overconfident"
    constant = RegressionPrediction(torch.ones(9), torch.zeros(1, 9), torch.ones(1, 9), 1.0)
    assert not chance(constant), "there is nothing to learn"


@pytest.mark.filterwarnings("ignore:training has not moved the adapters")
def test_texts_are_compared_with_the_network_without_the_adapters() -> None:
    """A posterior whose update is zero has the same scores."""
    options = {"tokenizer": tokenizer(), "adapter": AdapterConfig(r=2), "epochs": 8}
    learnt = pyrolora.fit(llama(), texts(48), MAP(), learning_rate=0.02, batch_size=8, **options)
    held_out = texts(24, seed=1)
    plain = partial(without_adapters, learnt, held_out, 8)
    assert no_better_than_chance(learnt.predict(held_out, 0), plain) is None
    learnt.model.program.bank.assign("B_loc", torch.zeros_like(learnt.bank.get_parameter("B_loc")))
    made = report_on(learnt, held_out, num_samples=1, seed=0)
    found = {one.name: one for one in made.findings}
    assert {"no_better_than_chance", "no_update"} <= set(found)
    assert "+0.000 nats" in found["no_better_than_chance"].found
    assert "the network without the adapters" in found["no_better_than_chance"].found


def test_without_labels_the_page_says_what_is_not_known() -> None:
    posterior = fitted(replace(GUIDES["montec"], scale_updates="gradient"), "real")
    inputs, _ = data("real", 30, 1)
    without = report_on(posterior, (inputs,), num_samples=2, seed=0).html
    assert "is not known without labels" in without
    assert "Posterior against prior" in without
    assert "no sign of learning" in without
