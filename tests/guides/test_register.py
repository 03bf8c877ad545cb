"""Guides from outside of the package: registered, fitted, saved, and loaded elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import outside
import pytest
import torch
from outside import Copied, CopiedProgram
from problems import mlp

import pyrolora
from pyrolora import AdapterConfig, guides
from pyrolora.adapters import AdapterBank, LayerSpec
from pyrolora.errors import ConfigError, UnknownNameError
from pyrolora.guides import Flat, Guide, MeanField, Supports, registry

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
SHORT: dict[str, Any] = {"epochs": 1, "batch_size": 4, "seed": 1}


@pytest.fixture(autouse=True)
def a_registry_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    known = dict(registry._REGISTRY)
    yield
    registry._REGISTRY.clear()
    registry._REGISTRY.update(known)


def fitted(guide: Any, **options: Any) -> pyrolora.Posterior:
    return pyrolora.fit(
        mlp(), (X, Y), guide=guide, task="classification", adapter=AdapterConfig(r=1, **options),
        **SHORT,
    )  # fmt: skip


def test_register_returns_the_class_and_its_name_is_known() -> None:
    assert guides.register(Copied) is Copied
    assert "copied" in guides.available()
    assert guides.as_guide("copied") == Copied()
    assert guides.as_guide("flat+copied") == Flat(inner=Copied())
    twin = fitted("copied").model.own_state()
    own = fitted(MeanField(scale_updates="gradient")).model.own_state()
    assert twin.keys() == own.keys()
    assert all(torch.equal(twin[name], own[name]) for name in own)


def test_a_name_that_is_not_registered_says_how_to_register_it() -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown guide 'copied'.*pyrolora\.guides\.register"
    ):
        pyrolora.fit(mlp(), (X, Y), guide="copied", task="classification")


def test_a_folder_of_a_guide_from_outside_loads_where_it_is_registered(tmp_path: Path) -> None:
    """In a fresh process, which refuses the folders before it has registered the guide."""
    kinds = {"alone": Copied(latent="AB"), "wrapped": Flat(inner=Copied(), rho=0.2)}
    posteriors = {name: fitted(guide) for name, guide in kinds.items()}
    words = []
    for name, posterior in posteriors.items():
        posterior.save(tmp_path / name)
        words += [str(tmp_path / name), str(tmp_path / f"{name}.pt")]
    path = os.pathsep.join([str(Path(outside.__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, outside.__file__, *words],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120,
        check=True,
    )  # fmt: skip
    before, after, _ = done.stdout.split("registered\n")
    assert before.count("was saved with the guide 'copied'") == 2
    assert before.count("pyrolora.guides.register") == 2
    assert "edited" not in before
    assert "incomplete" not in before
    assert after == ""
    for name, posterior in posteriors.items():
        expected = posterior.predict((torch.eye(4),), 3, seed=0).draws
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), expected)


def test_a_folder_of_a_task_from_outside_names_it(tmp_path: Path) -> None:
    posterior = fitted(MeanField())
    type(posterior.task).name = "sentiment"
    try:
        posterior.save(tmp_path)
    finally:
        type(posterior.task).name = "classification"
    with pytest.raises(pyrolora.errors.CheckpointError) as caught:
        pyrolora.load(tmp_path, mlp())
    assert "was saved with the task 'sentiment'" in str(caught.value)
    assert "pyrolora.tasks.register" in str(caught.value)
    assert "edited" not in str(caught.value)


def test_a_class_statement_that_runs_again_is_the_new_class() -> None:
    guides.register(Copied)
    again = type("Copied", (Copied,), {"__module__": Copied.__module__, "__doc__": "Again."})
    again = dataclass(frozen=True, kw_only=True)(again)
    again.__qualname__ = Copied.__qualname__
    guides.register(again)
    assert guides.guide_class("copied") is again


def test_a_name_is_registered_once() -> None:
    guides.register(Copied)

    @dataclass(frozen=True, kw_only=True)
    class Twin(Copied):
        pass

    with pytest.raises(ConfigError, match="there is a guide 'copied' already, Copied"):
        guides.register(Twin)

    @dataclass(frozen=True, kw_only=True)
    class Other(Copied):
        name = "meanfield"

    with pytest.raises(ConfigError, match="there is a guide 'meanfield' already, MeanField"):
        guides.register(Other)
    assert guides.guide_class("meanfield") is MeanField


def test_a_class_that_lacks_parts_is_refused() -> None:
    class NoGuide:
        name = "none"

    class Plain(Copied):
        name = "plain"

    @dataclass(frozen=True, kw_only=True)
    class Unnamed(Copied):
        name = "two names"

    @dataclass(frozen=True, kw_only=True)
    class Silent(Guide):
        name = "silent"

        def build(self, bank: AdapterBank) -> CopiedProgram:
            return CopiedProgram(bank, Copied())

    @dataclass(frozen=True, kw_only=True)
    class Needy(Copied):
        name = "needy"
        needed: float

    @dataclass(frozen=True, kw_only=True)
    class Vague(Copied):
        name = "vague"
        supports = {"prior"}  # type: ignore[assignment]  # noqa: RUF012

    for kind, message in {
        NoGuide: "must be a class on pyrolora.guides.Guide",
        Plain: "is no frozen dataclass",
        Unnamed: "needs a name of letters.*got 'two names'",
        Silent: "lacks supports",
        Needy: "has no default for needed",
        Vague: r"must state what it supports.*Supports\(",
    }.items():
        with pytest.raises(ConfigError, match=message):
            guides.register(kind)  # type: ignore[type-var]
    assert set(guides.available()) == set(registry._REGISTRY)
    assert not {"plain", "silent", "needy", "vague"} & set(guides.available())


class Forgetful(CopiedProgram):
    """A program that lets ranks move, and does not say which entries belong to them."""

    rank_entries = guides.Program.rank_entries


class Abstract(guides.FactorProgram):
    """A program without a law."""


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (Forgetful, "supports 'rank_allocation'.*Forgetful has no rank_entries"),
        (Abstract, "program of the guide.*cannot be made.*law"),
    ],
)
def test_a_program_that_forgets_a_method_is_refused(program: Any, message: str) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Wanting(Copied):
        name = "wanting"

        def build(self, bank: AdapterBank) -> Any:
            return program(bank, self)

    with pytest.raises(ConfigError, match=message):
        guides.register(Wanting)
    assert "wanting" not in guides.available()


@pytest.mark.parametrize("capability", ["closed_scales", "stored_draws"])
def test_a_program_without_the_methods_of_a_stated_capability_is_refused(capability: str) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Boastful(Copied):
        name = "boastful"

        @property
        def supports(self) -> Supports:
            return Supports(**{capability: True})

    with pytest.raises(ConfigError, match=f"supports '{capability}'.*has no"):
        guides.register(Boastful)


@pytest.mark.parametrize("name", guides.available())
def test_every_guide_of_the_package_could_be_registered(name: str) -> None:
    registry.check_class(guides.guide_class(name))


def program_of(guide: Guide) -> guides.Program:
    return guide.build(AdapterBank([LayerSpec("layer", 3, 2, 2, 1.0)], AdapterConfig(r=2)))


@pytest.mark.parametrize("name", [n for n in guides.available() if n != "full"])
def test_a_program_refuses_by_name_what_its_guide_does_not_state(name: str) -> None:
    program = program_of(guides.as_guide(name))
    asked = {
        "rank_allocation": lambda: program.rank_entries(torch.zeros(1, 2, dtype=torch.bool)),
        "prior": lambda: program.succeed(program),
        "closed_scales": lambda: program.settle(None, 1.0),  # type: ignore[arg-type]
        "stored_draws": lambda: program.pick(torch.zeros(1, dtype=torch.long)),
    }
    if program.settles_at_first:  # it sets the scales, too, though not to their optimum
        del asked["closed_scales"]
    for capability, ask in asked.items():
        if not getattr(program.supports, capability):
            with pytest.raises(ConfigError, match=f"does not support '{capability}'"):
                ask()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (frozenset({"query"}), r"saved as JSON, got layers=frozenset\(\{'query'\}\)"),
        (("query",), r"layers=\('query',\).* would come back .* as .*layers=\['query'\]"),
    ],
)
def test_an_option_that_would_not_come_back_from_a_folder_is_refused_before_the_fit(
    value: Any, words: str
) -> None:
    @guides.register
    @dataclass(frozen=True, kw_only=True)
    class Listed(Copied):
        name = "listed"
        layers: Any = ()

        def build(self, bank: AdapterBank) -> CopiedProgram:
            return CopiedProgram(bank, self)

    with pytest.raises(ConfigError, match=words):
        fitted(Listed(layers=value))
    assert fitted(Listed(layers=["query"])).options.layers == ["query"]
