"""The defaults of guides: noise relative to what is learnt, of a width that data decide."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import bert, reviews, tokenizer
from torch import Tensor, nn
from transformers import TrainerCallback

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.errors import ConfigError
from pyrolora.fitting import Request, StoredPosterior, fit_request
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


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What fits have logged."""
    return [r.getMessage() for r in caplog.records if r.name == "pyrolora.fitting.fit"]


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
def test_scales_of_embeddings_are_trained(name: str, caplog: pytest.LogCaptureFixture) -> None:
    posterior = on_texts(GUIDES[name], target_modules=["word_embeddings", "query"])
    program = posterior.model.program
    assert not program.settles
    assert posterior.options.scale_updates == (None if name == "lowrank" else "gradient")
    assert len(told(caplog)) == (name != "lowrank")
    assert posterior.options.held_back == 0.1
    fresh = posterior.options.build(program.bank)
    for scale in program.scale_parameters():
        assert program.get_parameter(scale).requires_grad
        assert not torch.equal(program.get_parameter(scale), fresh.get_parameter(scale)), scale


def numbered(n: int = 24) -> tuple[Tensor, Tensor]:
    """Words by their numbers, with a real-valued label."""
    words = torch.randint(10, (n, 3), generator=torch.Generator().manual_seed(n))
    return words, words.sum(-1) / 10


def embedding() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 1))


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("name", ["montec", "meanfield"])
def test_scales_around_adapted_embeddings_that_are_given_are_trained(
    name: str, stored: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are asked for steps, examples held back and a learned noise, as trained ones are."""
    given: Any = pyrolora.fit(
        embedding(), numbered(), "map", task="regression", epochs=2,
        adapter=AdapterConfig(r=2, target_modules=["0"], modules_to_save=["2"]),
    )  # fmt: skip
    model = given.base
    assert not told(caplog)
    if stored:
        given.save(tmp_path)
        given, model = StoredPosterior(tmp_path), embedding()
    guide = replace(GUIDES[name], hold_back=0.25)
    request = Request(
        model=model, given=given, data=numbered(), guide=guide, epochs=3, batch_size=4
    )
    posterior = fit_request(request)
    (message,) = told(caplog)
    assert f"the scales of {name!r} are trained" in message
    assert message.endswith("'0'")
    assert posterior.options == replace(guide, scale_updates="gradient")
    assert posterior.held_back == 6
    assert any("elbo" in entry for entry in posterior.history)
    trained = {name for name, p in posterior.model.named_parameters() if p.requires_grad}
    assert trained == {
        "task.noise_scale",
        *(f"program.{name}" for name in posterior.model.program.scale_parameters()),
    }


@pytest.mark.parametrize("stored", [False, True])
def test_what_is_trained_in_vain_around_a_given_adapter_is_refused(
    stored: bool, tmp_path: Path
) -> None:
    given: Any = on_texts("map")
    if stored:
        given.save(tmp_path)
        given = StoredPosterior(tmp_path)
    network = bert(initializer_range=0.3)
    request = Request(model=network, given=given, data=reviews(24), guide="montec", epochs=3)
    with pytest.raises(ConfigError, match=r"'montec' trains nothing .* leave epochs out"):
        fit_request(request)


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
