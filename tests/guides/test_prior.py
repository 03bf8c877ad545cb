"""An earlier posterior as the prior: two halves in turn against the whole at once."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pyro
import pytest
import torch
from linear import Layer, layer, svi
from problems import absolute, bert, mlp, reviews, tokenizer
from pyro import poutine
from torch import Tensor, nn

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.distributions.column_normal import whiten
from pyrolora.errors import CheckpointError, ConfigError, DataError
from pyrolora.guides import MAP, Flat, Guide, LowRank, MeanField, MonteCLoRA
from pyrolora.inference import NamedELBO
from pyrolora.model import JointGuide
from pyrolora.posterior import Posterior

PRIOR_SCALE = 0.8
TEXTS: dict[str, Any] = {"tokenizer": tokenizer(), "adapter": AdapterConfig(r=2)}
EARLIER: dict[str, Any] = {"epochs": 3, "batch_size": 6, "seed": 0, "learning_rate": 1e-2}


def after(problem: Layer, prior: Posterior, half: slice, steps: int) -> Posterior:
    """Fit that half of the data after ``prior``, and train on."""
    inputs, labels = problem.inputs[half], problem.labels[half]
    found = pyrolora.fit(problem.joint.base, (inputs, labels), prior=prior, epochs=1)
    svi(Layer(found.model, inputs, labels), steps=steps, rate=0.2)
    return found


def orthogonal(problem: Layer) -> Layer:
    """The same layer with inputs and means whose curvature is diagonal, in each half, too."""
    halves = [math.sqrt(6) * nn.init.orthogonal_(torch.empty(6, 3)) * s for s in (1.0, 0.6)]
    bank = problem.joint.program.bank
    B = nn.init.orthogonal_(torch.empty(2, 4)) * torch.tensor([[1.0], [0.5]])
    bank.assign("B_loc", B.flatten())
    return dataclasses.replace(problem, inputs=torch.cat(halves))


@pytest.mark.parametrize(
    ("guide", "design", "steps"),
    [
        (absolute(LowRank, kl_weight=1.0, prior_scale=PRIOR_SCALE, rank=8), "any", 600),
        (absolute(MeanField, kl_weight=1.0, prior_scale=PRIOR_SCALE), "orthogonal", 300),
    ],
    ids=["lowrank", "meanfield"],
)
def test_two_halves_in_turn_are_the_whole_at_once(guide, design, steps):
    """The posterior of A given B in closed form; that of either half is far from it."""
    problem = layer(MAP())
    if design == "orthogonal":
        problem = orthogonal(problem)
    exact = problem.posterior("A", problem.prior("A", PRIOR_SCALE))
    start = posterior_of(problem, guide)
    first = after(problem, start, slice(0, 6), steps)
    both = after(problem, first, slice(6, 12), steps)
    sd = exact.covariance.diagonal().sqrt()

    def distance(posterior: Posterior) -> tuple[Tensor, Tensor]:
        law = posterior.model.program.law("A")
        mean = (law.mean.double() - exact.mean).abs() / sd
        covariance = getattr(law, "covariance_matrix", law.variance.diag()).double()
        return mean.max(), ((covariance - exact.covariance) / torch.outer(sd, sd)).abs().max()

    mean, covariance = distance(both)
    assert mean < 0.1
    assert covariance < 0.1
    assert max(distance(first)) > 0.5
    assert max(distance(after(problem, start, slice(6, 12), 300))) > 0.5
    # What has no prior stays.
    bank, given = both.bank, problem.joint.program.bank
    assert torch.equal(bank.B_loc, given.B_loc)


def posterior_of(problem: Layer, guide: Guide) -> Posterior:
    """A posterior that is the guide's own prior, N(0, σ₀²), with the layer's B: to begin with."""
    options: Any = dataclasses.replace(guide, init_scale=PRIOR_SCALE)
    joint = problem.fit(options).model
    program = joint.program
    program.bank.assign("A_loc", torch.zeros_like(program.bank.get_parameter("A_loc")))
    if isinstance(guide, LowRank):
        program.assign("scale", torch.full_like(program.get_parameter("scale"), PRIOR_SCALE))
        program.assign("directions", 0.01 * torch.randn_like(program.get_parameter("directions")))
    else:
        program.assign("A_scale", torch.full_like(program.get_parameter("A_scale"), PRIOR_SCALE))
    return Posterior(joint, options)


# MonteCLoRA --------------------------------------------------------------------------------------

MONTEC = [
    absolute(
        MonteCLoRA, component_prior=prior, covariance=covariance, learn_sample_scale=learned,
        latent=latent, prior_mean=mean, kl_weight=1.0, sample_scale=0.4, df_per_rank=8,
        num_components=3,
    )
    for prior, covariance, learned, latent, mean in [
        ("isotropic", "diagonal", False, "A", "zero"),
        ("isotropic", "full", True, "AB", "learned"),
        ("hierarchical", "full", False, "A", "zero"),
        ("hierarchical", "diagonal", True, "B", "learned"),
    ]
]  # fmt: skip
MONTEC += [dataclasses.replace(MONTEC[1], latent=latent, units="row") for latent in ("A", "AB")]


def changed(problem: Layer) -> None:
    """Other parameters, at random."""
    program = problem.joint.program
    for parameter in [*program.parameters(recurse=False), *program.bank.parameters()]:
        parameter.data.add_(0.3 * torch.randn_like(parameter))


@pytest.mark.parametrize(
    "options", MONTEC, ids=lambda o: f"{o.component_prior}-{o.latent}-{o.units}"
)
def test_montecs_prior_is_the_earlier_guide(options):
    """log p(θ) of the model, at draws of the new guide, is log q_earlier of the same factors; and
    its expected difference is the closed-form KL of the bound."""
    earlier, later = layer(options), layer(options)
    changed(earlier)
    program, previous = later.joint.program, earlier.joint.program
    program.bank.load_state_dict(previous.bank.state_dict())
    program.succeed(previous)
    for name, parameter in previous.named_parameters(recurse=False):
        assert torch.equal(program.get_parameter(name), parameter)
    elbo = NamedELBO()

    def divergence() -> list[float]:
        with torch.no_grad():
            values = []
            for _ in range(200):
                elbo.differentiable_loss(later.joint, JointGuide(program), later.batch)
                values.append(sum(v.item() for n, v in elbo.terms.items() if n.startswith("kl/")))
        return values

    assert max(divergence()) == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        for parameter in [*program.parameters(recurse=False), *program.bank.parameters()]:
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    found = torch.tensor(divergence())
    ratios = log_ratio(program, previous, 4000)
    error = (found.var() / len(found) + ratios.var() / len(ratios)).sqrt()
    assert found.mean() > 1
    assert abs(found.mean() - ratios.mean()) < 5 * error


def log_ratio(program: Any, previous: Any, count: int) -> Tensor:
    """log q(θ) − log q_earlier(θ) of draws, both from the guides' own traces: the earlier guide is
    asked for the value of z that gives the same factors around its own means."""

    def density(one: Any, sites: dict[str, Tensor]) -> Tensor:
        with poutine.block(), pyro.plate("draws", count, dim=-2):
            trace = poutine.trace(poutine.condition(one.guide, data=sites)).get_trace()
        trace.compute_log_prob()
        return sum(trace.nodes[name]["log_prob"].flatten(1).sum(1) for name in sites)

    latent = program.options.latent
    with torch.no_grad():
        sites = program.draw(count)
        own = program.bank.latent_part(latent, program.bank.means())
        old = previous.bank.latent_part(latent, previous.bank.means())
        gain = program._gain(sites["mixture_weights"])
        if program.options.component_prior == "hierarchical":
            tril = gain[..., None] * sites["covariance_tril"]
            shift = whiten(tril, (own - old).expand(count, -1), program.layout.groups)
        else:
            shift = program.layout.scale_rows(1 / gain, own - old)
        there = {**sites, "noise": sites["noise"] + shift}
        torch.testing.assert_close(previous.factors(there).A, program.factors(sites).A)
        placed = [
            {n: v.unsqueeze(1) if n == "noise" else v for n, v in s.items()} for s in (sites, there)
        ]
        return density(program, placed[0]) - density(previous, placed[1])


def test_the_cooperation_of_the_earlier_fit_does_not_count_again():
    options = MonteCLoRA(cooperation=2.0, df_per_rank=8)
    problem = layer(options)
    program = problem.joint.program
    assert "cooperation" in poutine.trace(program.model).get_trace().nodes
    program.succeed(layer(options).joint.program)
    assert "cooperation" not in poutine.trace(program.model).get_trace().nodes


# On a network ------------------------------------------------------------------------------------

GUIDES = {
    "montec": MonteCLoRA(latent="AB"),
    "montec hierarchical": MonteCLoRA(component_prior="hierarchical", covariance="full"),
    "montec of absolute noise": absolute(MonteCLoRA, df_per_rank=8),
    "meanfield": MeanField(latent="AB"),
    "lowrank": LowRank(latent="B", rank=2),
    "flat+meanfield": Flat(inner=MeanField()),
    "flat+meanfield of absolute noise": Flat(inner=absolute(MeanField)),
}


@pytest.mark.parametrize("guide", GUIDES.values(), ids=GUIDES)
def test_a_chain_of_three_fits_is_saved_and_loaded(guide, tmp_path):
    network = bert(initializer_range=0.3)
    first = pyrolora.fit(network, reviews(24), guide, **TEXTS, **EARLIER)
    before = {name: t.clone() for name, t in first.model.own_state().items()}
    second = pyrolora.fit(network, reviews(24, 1), prior=first, **EARLIER)
    third = pyrolora.fit(network, reviews(12, 2), prior=second, **EARLIER)
    assert third.options == guide
    assert all(torch.equal(before[n], t) for n, t in first.model.own_state().items())
    previous = third.model.program.previous
    assert previous.previous is None
    for name, tensor in second.bank.state_dict().items():
        assert torch.equal(previous.bank.state_dict()[name], tensor)
    for name, head in second.model.heads.state_dict().items():
        assert torch.equal(third.model.heads.state_dict()[name], head)
    inner = getattr(guide, "inner", guide)
    for factor in "AB":
        moved = not torch.equal(
            getattr(third.bank, f"{factor}_loc"), getattr(second.bank, f"{factor}_loc")
        )
        assert moved == (factor in inner.latent)
    third.save(tmp_path)
    loaded = pyrolora.load(tmp_path, bert(initializer_range=0.3))
    expected = third.predict(reviews(6, 3), 3, seed=0).draws
    assert torch.equal(loaded.predict(reviews(6, 3), 3, seed=0).draws, expected)
    fourth = pyrolora.fit(loaded.base, reviews(12, 4), prior=loaded, **EARLIER)
    assert torch.isfinite(fourth.predict(reviews(6, 3), 2).draws).all()


def test_the_network_may_be_another_copy_and_no_other_network():
    network = bert(initializer_range=0.3)
    first = pyrolora.fit(network, reviews(24), MeanField(), **TEXTS, **EARLIER)
    again = pyrolora.fit(bert(initializer_range=0.3), reviews(24, 1), prior=first, **EARLIER)
    same = pyrolora.fit(network, reviews(24, 1), prior=first, **EARLIER)
    for name, tensor in same.model.own_state().items():
        torch.testing.assert_close(again.model.own_state()[name], tensor)
    with pytest.raises(CheckpointError, match="not the one that was adapted"):
        pyrolora.fit(bert(seed=1, initializer_range=0.3), reviews(24), prior=first)


def named(*names: str) -> list[dict[str, str]]:
    """Texts with these labels in turn."""
    return [
        {"text": f"the {w} film", "label": names[i % len(names)]} for i, w in enumerate("abcdef")
    ]


def test_the_classes_are_those_of_the_earlier_data(tmp_path):
    folder = str(tmp_path / "network")
    bert().bert.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    first = pyrolora.fit(
        folder, named("apple", "pear", "plum"), "meanfield", adapter=TEXTS["adapter"]
    )
    second = pyrolora.fit(folder, named("plum", "pear"), prior=first, epochs=1)
    assert second.base.config.id2label == {0: "apple", 1: "pear", 2: "plum"}
    assert second.predict(named("plum", "pear"), 0).targets.tolist() == [2, 1] * 3
    first.tokenizer = None  # of tokens that were made elsewhere: then it is that of the folder
    third = pyrolora.fit(folder, named("plum", "pear"), prior=first, epochs=1)
    assert third.predict(named("plum", "pear"), 0).targets.tolist() == [2, 1] * 3
    with pytest.raises(DataError, match=r"'quince' is none of the network's classes.*apple"):
        pyrolora.fit(folder, named("pear", "quince"), prior=first)
    other = bert(3, id2label={0: "pear", 1: "plum", 2: "quince"})
    other.load_state_dict(first.base.state_dict(), strict=False)
    with pytest.raises(ConfigError, match=r"classes are \['pear', 'plum', 'quince'\].*'apple'"):
        pyrolora.fit(other, named("pear", "plum"), prior=first, tokenizer=tokenizer())


def test_a_strong_prior_holds_the_earlier_posterior():
    """At a large weight of the KL the new data change nothing, at a small one they do."""
    network = bert(initializer_range=0.3)
    first = pyrolora.fit(network, reviews(24), MeanField(), **TEXTS, **EARLIER)

    def moved(weight: float) -> float:
        guide = MeanField(kl_weight=weight)
        later = pyrolora.fit(network, reviews(24, 1), guide, prior=first, epochs=20, seed=0)
        scale = first.model.program.param("A_scale")
        return ((later.bank.A_loc - first.bank.A_loc) / scale).detach().abs().mean().item()

    assert moved(1000.0) < 0.3 * moved(0.01)


def test_what_cannot_be_a_prior_is_refused():
    network, more = bert(), {"epochs": 1}
    plain = pyrolora.fit(network, reviews(12), "map", **TEXTS, **more)
    field = pyrolora.fit(network, reviews(12), "meanfield", **TEXTS, **more)
    for prior, options, words in [
        (plain, {}, "meanfield, lowrank"),
        (field, {"guide": "montec"}, "same one"),
        (field, {"guide": MeanField(latent="AB")}, "latent='AB', and in the prior it is 'A'"),
        (field, {"adapter": AdapterConfig(r=2)}, "adapter= comes with the prior"),
        (field, {"task": "classification"}, "task= comes with the prior"),
        (0.2, {}, "MeanField"),
    ]:
        with pytest.raises(ConfigError, match=words):
            pyrolora.fit(network, reviews(12), prior=prior, **options, **more)
    with pytest.raises(ConfigError, match=r"posterior\.base"):
        pyrolora.fit(field, reviews(12), prior=field, **more)
    low = pyrolora.fit(network, reviews(12), MonteCLoRA(df_per_rank=1), **TEXTS, **more)
    with pytest.raises(ConfigError, match="after an earlier posterior"):
        pyrolora.fit(network, reviews(12), prior=low, **more)


@pytest.mark.parametrize("kind", [MeanField, LowRank, MonteCLoRA])
def test_units_are_the_same_by_what_they_come_to(kind):
    network = bert()
    for spelled, same, other in [
        ({}, {"units": "row"}, {"units": "fan_in"}),
        ({"prior_mean": "zero"}, {"units": "fan_in"}, {"units": "one"}),
    ]:
        first = pyrolora.fit(network, reviews(12), kind(**spelled), **TEXTS, epochs=1)
        guide = kind(**{**spelled, **same})
        later = pyrolora.fit(network, reviews(12), guide, prior=first, epochs=1)
        assert later.options == guide
        found = rf"units='{other['units']}', and in the prior it is '{same['units']}'"
        with pytest.raises(ConfigError, match=found):
            pyrolora.fit(network, reviews(12), kind(**{**spelled, **other}), prior=first)
        first.detach()
        later.detach()


def test_a_name_means_the_options_of_the_prior():
    network = bert()
    first = pyrolora.fit(network, reviews(12), MeanField(latent="AB"), **TEXTS, epochs=1)
    later = pyrolora.fit(network, reviews(12), "meanfield", prior=first, epochs=1)
    assert later.options == first.options


def test_the_noise_of_a_regression_stays():
    x = torch.randn(24, 4)
    options: dict[str, Any] = {"task": "regression", "adapter": AdapterConfig(r=1)}
    network = mlp(outputs=1)
    first = pyrolora.fit(network, (x, x[:, 0]), "meanfield", epochs=2, **options)
    later = pyrolora.fit(network, (x, x[:, 1]), prior=first, epochs=2)
    for a, b in zip(first.task.parameters(), later.task.parameters(), strict=True):
        assert torch.equal(a, b)
