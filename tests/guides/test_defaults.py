"""The defaults of guides: noise relative to what is learnt, of a width that data decide."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import bert, reviews, tokenizer
from torch import Tensor, nn
from transformers import TrainerCallback

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.errors import ConfigError
from pyrolora.guides import MAP, NUTS, Flat, Guide, LowRank, MeanField, MonteCLoRA

GUIDES: dict[str, Guide] = {
    "montec": MonteCLoRA(),
    "meanfield": MeanField(),
    "lowrank": LowRank(),
    "flat+montec": Flat(inner=MonteCLoRA()),
}
every_guide = pytest.mark.parametrize("name", GUIDES)


class Norms(TrainerCallback):
    """‖A‖ before every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        self.seen.append(float(model.joint.program.bank.get_parameter("A_loc").detach().norm()))


def labelled(n: int = 400) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(n, 6)
    network = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
    return network, (x, (x[:, 0] > 0).long())


def on_texts(guide: Any, n: int = 24, **adapter: Any) -> pyrolora.Posterior:
    return pyrolora.fit(
        bert(initializer_range=0.3), reviews(n), guide, tokenizer=tokenizer(),
        adapter=AdapterConfig(r=2, **adapter), epochs=2, batch_size=8,
    )  # fmt: skip


# What they say -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settles"), [(MonteCLoRA, True), (MeanField, True), (LowRank, False)]
)
def test_noise_is_relative_to_rows_settles_and_has_a_width_by_data(
    kind: Any, settles: bool
) -> None:
    guide = kind()
    assert (guide.unit, guide.settles, guide.held_back) == ("row", settles, 0.1)
    around = Flat(inner=guide)
    assert (around.settles, around.held_back) == (settles, 0.1)
    priced = kind(prior_mean="zero")
    assert (priced.unit, priced.settles, priced.held_back) == ("fan_in", settles, 0)
    assert not kind(scale_updates="gradient").settles
    assert kind(hold_back=0.0).held_back == 0


def test_scales_without_a_closed_optimum_are_trained() -> None:
    assert not MonteCLoRA(learn_sample_scale=True).settles
    assert MonteCLoRA(component_prior="hierarchical").settles
    assert not MonteCLoRA(component_prior="hierarchical", prior_mean="zero").settles


def test_a_point_has_neither() -> None:
    assert (MAP().unit, MAP().settles, MAP().held_back) == (None, False, 0)


def test_chains_have_a_prior_of_their_own() -> None:
    """Absolute, around zero: a prior around the means that are given would hold the chains."""
    inner = NUTS().inner
    assert isinstance(inner, MeanField)
    assert (inner.unit, inner.prior_scale, inner.prior_mean) == ("one", 0.2, "zero")
    assert NUTS().held_back == 0


# What data decide --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["montec", "meanfield", "lowrank"])
@pytest.mark.parametrize("latent", ["A", "AB"])
def test_noise_of_the_first_steps_does_not_shrink_a(name: str, latent: str) -> None:
    """Noise is a multiple of A, and nothing holds A until B has learnt."""
    norms = Norms()
    guide = replace(GUIDES[name], latent=latent)
    network, data = labelled()
    pyrolora.fit(
        network, data, guide, task="classification", adapter=AdapterConfig(r=2), epochs=4,
        batch_size=32, callbacks=[norms],
    )  # fmt: skip
    assert len(norms.seen) > 44
    assert min(norms.seen[:50]) > 0.9 * norms.seen[0]


# Adapters whose inputs are not known -------------------------------------------------------------


@pytest.mark.parametrize("name", ["montec", "meanfield", "lowrank"])
def test_scales_of_embeddings_are_trained(name: str) -> None:
    posterior = on_texts(GUIDES[name], target_modules=["word_embeddings", "query"])
    program = posterior.model.program
    assert not program.settles
    assert posterior.options.scale_updates == (None if name == "lowrank" else "gradient")
    assert posterior.options.held_back == 0.1
    fresh = posterior.options.build(program.bank)
    for scale in program.scale_parameters():
        assert program.get_parameter(scale).requires_grad
        assert not torch.equal(program.get_parameter(scale), fresh.get_parameter(scale)), scale


@pytest.mark.parametrize("name", ["montec", "meanfield"])
def test_curvature_of_embeddings_is_refused_where_somebody_asks_for_it(name: str) -> None:
    guide = replace(GUIDES[name], scale_updates="curvature")
    for asked in (guide, Flat(inner=guide)):
        with pytest.raises(ConfigError, match=r"embeddings have none .*word_embeddings'"):
            on_texts(asked, target_modules=["word_embeddings", "query"])


# One fit after another ---------------------------------------------------------------------------


@every_guide
def test_after_an_earlier_posterior_scales_are_trained(name: str) -> None:
    first = on_texts(GUIDES[name])
    second = pyrolora.fit(first.base, reviews(24, 1), prior=first, epochs=2, batch_size=8)
    assert second.options == first.options == GUIDES[name]
    program, before = second.model.program, first.model.program
    assert not program.settles
    for scale in program.scale_parameters():
        assert program.get_parameter(scale).requires_grad
        assert not torch.equal(program.get_parameter(scale), before.get_parameter(scale)), scale
    third = pyrolora.fit(first.base, reviews(24, 2), prior=second, epochs=1, batch_size=8)
    assert third.predict(reviews(4, 3), 3).probs.isfinite().all()


@pytest.mark.parametrize("name", ["montec", "meanfield"])
def test_curvature_after_an_earlier_posterior_is_refused(name: str) -> None:
    first = on_texts(GUIDES[name])
    guide = replace(GUIDES[name], scale_updates="curvature")
    with pytest.raises(ConfigError, match=r"scale_updates='curvature' .* after an earlier"):
        pyrolora.fit(first.base, reviews(24, 1), guide, prior=first, epochs=1)
