"""Names of guides, and how their options travel through a file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import mlp

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.errors import ConfigError, UnknownNameError
from pyrolora.guides import (
    MAP,
    NUTS,
    SWAG,
    TFB,
    Dropout,
    Ensemble,
    Flat,
    Full,
    Guide,
    Laplace,
    LowRank,
    MeanField,
    MonteCLoRA,
    as_guide,
    available,
    from_options,
    full_name,
    guide_class,
)

X, Y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
SHORT = {"num_samples": 4, "warmup_steps": 2, "max_tree_depth": 2}

# No option of theirs is at its default.
CHANGED: dict[str, Guide] = {
    "map": MAP(
        prior_scale=0.5, latent="B", kl_weight=0.3, kl_weight_against="mean", kl_warmup=0.2,
        scale_learning_rate=0.03, head="gaussian", scale_updates="gradient", hold_back=0.0,
    ),
    "montec": MonteCLoRA(
        num_components=2, sample_scale=0.1, learn_sample_scale=True, component_prior="hierarchical",
        covariance="full", prior_mean="start", df_per_rank=2.5, concentration=2.0,
        init_covariance=0.5, cooperation=0.1, latent="AB", sparse=True, kl_weight=0.5,
        kl_weight_against="mean", kl_warmup=0.1, draws_per_batch=2, scale_learning_rate=0.02,
        units="fan_in", head="gaussian", scale_updates="gradient", hold_back=0.0,
    ),
    "meanfield": MeanField(
        prior_scale=0.3, init_scale=0.05, latent="AB", kl_weight=0.7, kl_weight_against="mean",
        kl_warmup=0.5, draws_per_batch=4, scale_learning_rate=0.1, scale_updates="curvature",
        units="fan_in", prior_mean="start", head="gaussian", hold_back=0.0,
    ),
    "flat+meanfield": Flat(
        inner=MeanField(units="row", prior_mean="learned", hold_back=0.25), rho=0.1
    ),
    "laplace": Laplace(prior_scale=0.4, linearised=False, latent="B", head="gaussian"),
    "ensemble": Ensemble(members=2, side_by_side=True),
    "flat+map": Flat(rho=0.2, at_prediction=True),
    "flat+montec": Flat(inner=MonteCLoRA(num_components=3, latent="B"), rho=0.01, head="gaussian"),
    "flat+ensemble": Flat(inner=Ensemble(members=3), rho=0.3),
    "flat+laplace": Flat(inner=Laplace(latent="A", tune="marginal_likelihood")),
    "nuts+meanfield": NUTS(
        inner=MeanField(prior_scale=0.5, kl_weight=0.9, latent="B"), chains=3,
        target_accept_prob=0.7, **SHORT,
    ),
    "lowrank": LowRank(
        rank=3, prior_scale=0.3, init_scale=0.01, latent="AB", kl_weight=0.5,
        kl_weight_against="mean", kl_warmup=0.1, draws_per_batch=2, scale_learning_rate=0.02,
        units="fan_in", prior_mean="zero", head="gaussian", scale_updates="gradient",
        hold_back=0.0,
    ),
    "swag": SWAG(start=0.2, snapshots=12, rank=4, prior_scale=0.4, latent="A", head="gaussian"),
    "tfb": TFB(tolerance=0.1, relative=False, draws=4, steps=3),
    "dropout": Dropout(p=0.2, unit="rank", draws_per_batch=3, head="gaussian"),
    "full": Full(),
    "nuts+montec": NUTS(inner=MonteCLoRA.paper(sample_scale=0.3), chains=1, **SHORT),
    "nuts+map": NUTS(inner=MAP(prior_scale=0.2), chains=1, **SHORT),
}  # fmt: skip


def test_the_registry_has_every_guide_by_its_name() -> None:
    assert set(available()) == {
        *("map", "montec", "flat", "meanfield", "lowrank", "laplace", "tfb", "swag"),
        *("ensemble", "dropout", "nuts", "full"),
    }
    for name in available():
        kind = guide_class(name)
        assert kind.name == name
        assert as_guide(name) == kind()
        assert type(as_guide(name)) is kind
    assert {name.split("+")[0] for name in CHANGED} == set(available())


@pytest.mark.parametrize(
    ("name", "guide"),
    [
        ("flat", Flat(inner=MAP())),
        ("flat+map", Flat(inner=MAP())),
        ("flat+montec", Flat(inner=MonteCLoRA())),
        ("flat+ensemble", Flat(inner=Ensemble())),
        ("nuts", NUTS(inner=MeanField(prior_scale=0.2, prior_mean="zero", units="one"))),
        ("nuts+meanfield", NUTS(inner=MeanField())),
        ("nuts+montec", NUTS(inner=MonteCLoRA())),
    ],
)
def test_a_name_may_join_a_guide_and_its_inner_one(name: str, guide: Guide) -> None:
    assert as_guide(name) == guide
    assert as_guide(guide) is guide


@pytest.mark.parametrize("name", CHANGED)
def test_every_option_survives_json(name: str) -> None:
    guide = CHANGED[name]
    assert full_name(guide) == name
    options = json.loads(json.dumps(dataclasses.asdict(guide)))
    again = from_options(name, options)
    assert again == guide
    assert full_name(again) == name


@pytest.mark.parametrize(
    "name", ["map", "montec", "meanfield", "lowrank", "swag", "ensemble", "dropout"]
)
def test_these_options_are_all_off_their_defaults(name: str) -> None:
    """Otherwise one that is lost would go unnoticed."""
    guide, fields = CHANGED[name], dataclasses.fields(CHANGED[name])
    same = {f.name for f in fields if getattr(guide, f.name) == f.default}
    only = {"map": {"draws_per_batch"}, "ensemble": {"head"}}  # a point has one draw
    assert same <= only.get(name, set())


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.filterwarnings("ignore:the chains of NUTS do not agree")
def test_options_come_back_with_a_posterior(name: str, tmp_path: Path) -> None:
    guide = CHANGED[name]
    posterior = pyrolora.fit(
        mlp(), (X, Y), guide=guide, task="classification",
        adapter=AdapterConfig(r=1, modules_to_save=["2"]) if guide.adapts else None,
        epochs=1, learning_rate=0.05, batch_size=4,
    )  # fmt: skip
    posterior.save(tmp_path)
    assert json.loads((tmp_path / "posterior.json").read_text())["guide"]["name"] == name
    again = pyrolora.load(tmp_path, mlp())
    assert again.options == guide
    assert type(getattr(again.options, "inner", None)) is type(getattr(guide, "inner", None))
    assert repr(again) == repr(posterior)
    assert f"guide={name!r}" in repr(again)
    state = again.model.own_state()
    for key, value in posterior.model.own_state().items():
        assert torch.equal(state[key], value)
    draws = again.sample(5, seed=2)
    for site, value in posterior.sample(5, seed=2).items():
        assert torch.equal(draws[site], value), site
    expected = posterior.predict((X,), 5, seed=1).draws
    assert torch.equal(again.predict((X,), 5, seed=1).draws, expected)
    again.save(tmp_path / "again")
    files = [folder / "posterior.json" for folder in (tmp_path, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("vae", UnknownNameError, "unknown guide 'vae'; choose one of map, montec"),
        ("", UnknownNameError, "unknown guide ''"),
        ("+map", UnknownNameError, "unknown guide ''"),
        ("flat+", UnknownNameError, "unknown guide ''"),
        ("flat+vae", UnknownNameError, "unknown guide 'vae'"),
        ("flat+nuts", ConfigError, "inner must be another guide"),
        ("Flat", UnknownNameError, "unknown guide 'Flat'"),
        ("montec+map", ConfigError, "'montec' is not a guide around another one.*'montec.map'"),
        ("flat+montec+map", ConfigError, "'montec' is not a guide around another one"),
        ("flat+flat", ConfigError, "inner must be another guide"),
        ("flat+flat+map", ConfigError, "inner must be another guide"),
        ("nuts+map", ConfigError, r"inner must be a guide whose model has a prior.*MAP\("),
        ("nuts+laplace", ConfigError, "inner must be a guide whose model has a prior.*Laplace"),
        ("nuts+ensemble", ConfigError, "inner must be a guide whose model has a prior.*Ensemble"),
        (None, ConfigError, r"guide must be one of map, montec.*got None"),
        (MAP, ConfigError, "guide must be one of map, montec.*got <class"),
    ],
)
def test_other_names_are_refused(name: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_guide(name)


@pytest.mark.parametrize("inner", ["montec", None, {}, MAP, Flat()])
def test_a_guide_around_another_one_takes_a_guide_object(inner: Any) -> None:
    with pytest.raises(ConfigError, match=r"inner must be another guide.*MonteCLoRA\(\)"):
        Flat(inner=inner)


def test_a_refused_fit_leaves_the_network_as_it_was() -> None:
    network = mlp()
    before = list(network.state_dict())
    for guide in ("montec+map", "flat+vae"):
        with pytest.raises(pyrolora.PyroLoraError):
            pyrolora.fit(network, (X, Y), guide=guide, task="classification")
    assert [type(module) for module in network.modules()] == [type(m) for m in mlp().modules()]
    assert list(network.state_dict()) == before
