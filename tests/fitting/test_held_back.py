"""The training examples that a fit holds back where nobody asked for it, and where somebody did."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from guides.outside import CopiedProgram
from problems import arguments, bert_spans, llama, mlp, squad, texts, tokenizer

import pyrolora
from pyrolora import AdapterConfig, TextOptions
from pyrolora.adapters import AdapterBank
from pyrolora.errors import ConfigError
from pyrolora.guides import Flat, Guide, LowRank, MeanField, MonteCLoRA, Supports

ASKED = MeanField(hold_back=0.25, scale_updates="gradient")
GUIDES = {
    "montec": MonteCLoRA(),
    "meanfield": MeanField(),
    "lowrank": LowRank(),
    "flat+montec": Flat(inner=MonteCLoRA()),
}


def rows(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] > 0).long()


def fitted(guide: Guide | str | None, n: int, model: Any = None, **more: Any) -> pyrolora.Posterior:
    if model is None and "prior" not in more:
        more = {"task": "classification", "adapter": AdapterConfig(r=1), "epochs": 1, **more}
    return pyrolora.fit(mlp() if model is None else model, rows(n), guide, **more)


def held_back(posterior: pyrolora.Posterior) -> int:
    """How many examples the last entry of the history says; what it says is the posterior's."""
    last = posterior.history[-1] if posterior.history else {}
    if "held_back" not in last:
        assert posterior.temperature == 1
        return 0
    assert last.keys() == {"held_back", "width", "temperature"}
    assert last["temperature"] == posterior.temperature
    return last["held_back"]


def written(guide: Guide, folder: Path, data: Any = None, **options: Any) -> pyrolora.Posterior:
    """A language model after one step."""
    return pyrolora.fit(
        llama(), texts(120) if data is None else data, guide, tokenizer=tokenizer(),
        adapter=AdapterConfig(r=1), training=arguments(folder, max_steps=1), **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.parametrize(("n", "count"), [(99, 0), (100, 10), (234, 23)])
def test_a_tenth_is_held_back_where_it_comes_to_ten(name: str, n: int, count: int) -> None:
    posterior = fitted(GUIDES[name], n)
    assert held_back(posterior) == count
    assert posterior.model.num_examples == n - count


def test_no_more_are_held_back_than_choose_two_numbers_well() -> None:
    """Nor does anything that takes the whole data again think so; who asks for a share has it."""
    posterior = fitted(Flat(inner=MeanField()), 3000, batch_size=300)
    assert (held_back(posterior), posterior.model.num_examples) == (250, 2750)
    assert posterior.khat(rows(3000), 25, seed=0).dimensions
    drawn = posterior.to_arviz(4, data=rows(3000), log_likelihood=True)
    attrs = drawn["log_likelihood"].attrs
    assert (attrs["num_examples"], attrs["held_back"]) == (2750, 250)
    assert held_back(fitted(MeanField(hold_back=0.1), 3000, batch_size=300)) == 300


def test_few_examples_are_few_whatever_their_rows() -> None:
    """Windows of long contexts are no examples."""
    data = squad(12, 60)
    options = {"tokenizer": tokenizer(), "adapter": AdapterConfig(r=1)}
    posterior = pyrolora.fit(bert_spans(), data, MeanField(), epochs=1, **options)
    assert posterior.model.num_examples > 30
    assert held_back(posterior) == 0


def test_nothing_is_held_back_of_a_stream(tmp_path: Path) -> None:
    stream = texts(120).to_iterable_dataset()
    posterior = written(MeanField(), tmp_path, stream, num_examples=120)
    assert posterior.model.num_examples == 120
    assert held_back(posterior) == 0
    with pytest.raises(ConfigError, match=r"hold_back=0\.25 .*are a stream; choose hold_back=None"):
        written(ASKED, tmp_path, texts(120).to_iterable_dataset(), num_examples=120)


def test_nothing_is_held_back_of_packed_texts(tmp_path: Path) -> None:
    packed = TextOptions(packing=True, max_length=30)
    posterior = written(MeanField(), tmp_path, texts=packed)
    assert posterior.model.num_examples == 120
    assert held_back(posterior) == 0
    with pytest.raises(ConfigError, match=r"texts that share rows .*; choose hold_back=None or 0"):
        written(ASKED, tmp_path, texts=packed)


@pytest.mark.parametrize("name", GUIDES)
def test_nothing_is_held_back_around_a_given_adapter(name: str) -> None:
    """It may know them all."""
    given, guide = fitted("map", 20), GUIDES[name]
    if isinstance(guide, Flat):  # whose noise acts in training
        guide = Flat(inner=replace(guide.inner, scale_updates="gradient"))
    posterior = fitted(guide, 120, given)
    assert posterior.model.num_examples == 120
    assert held_back(posterior) == 0


def test_around_a_given_adapter_examples_are_held_back_where_somebody_asks() -> None:
    given = fitted("map", 20)
    assert held_back(fitted(ASKED, 24, given)) == 6
    with pytest.raises(ConfigError, match=r"trains nothing .*got hold_back=0\.25"):
        fitted(MeanField(hold_back=0.25), 24, given)


def test_a_share_that_somebody_asked_for_may_be_few_and_is_no_empty_one() -> None:
    assert held_back(fitted(MeanField(hold_back=0.25), 8)) == 2
    with pytest.raises(ConfigError, match=r"hold_back=0\.01 of 20 examples is 0"):
        fitted(MeanField(hold_back=0.01), 20)
    assert held_back(fitted(MeanField(hold_back=0.0), 120)) == 0


@pytest.mark.parametrize("named", [None, "meanfield"])
def test_a_share_of_the_earlier_data_is_no_share_of_few_later_ones(named: str | None) -> None:
    """It is one of many; and of few, where somebody asks for it."""
    earlier = fitted(MeanField(hold_back=0.2), 40)
    earlier.temperature = 1.0
    later = partial(fitted, model=earlier.base, prior=earlier, epochs=1)
    for n, count in [(2, 0), (49, 0), (60, 12)]:
        found = later(named, n)
        assert held_back(found) == count
        assert found.options == earlier.options
    for again in (MeanField(hold_back=0.25), earlier.options):
        assert held_back(later(again, 8)) == 2
    with pytest.raises(ConfigError, match=r"hold_back=0\.1 of 2 examples is 0"):
        later(MeanField(hold_back=0.1), 2)


@dataclass(frozen=True, kw_only=True)
class Outside(Guide):
    """A guide that is registered from outside, with a constant share of its own."""

    name = "outside"

    latent: str = "A"
    prior_scale: float = 1.0
    init_scale: float = 1.0
    prior_mean: str = "learned"
    units: str = "row"

    @property
    def unit(self) -> str:
        return self.units

    @property
    def held_back(self) -> float:
        return 0.25

    @property
    def supports(self) -> Supports:
        return Supports(distinct_prior=True, rank_allocation=True, prior=True)

    def build(self, bank: AdapterBank) -> CopiedProgram:
        return CopiedProgram(bank, self)  # type: ignore[arg-type]


@pytest.mark.parametrize("around", [lambda guide: guide, lambda guide: Flat(inner=guide)])
def test_a_guide_from_outside_may_hold_a_share_back(around: Any) -> None:
    guide = around(Outside())
    assert held_back(fitted(guide, 40)) == 10
    assert held_back(fitted(guide, 20)) == 0
    with pytest.raises(ConfigError, match=r"'outside' holds back 0\.25 .* CopiedProgram has none"):
        fitted(around(Outside(units="one")), 40)


def test_a_temperature_that_is_not_chosen_anew_is_warned_of() -> None:
    """By the number of the new examples, not by what they could have been."""
    earlier = fitted("meanfield", 120)
    earlier.temperature = 1.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        later = fitted("meanfield", 120, earlier.base, prior=earlier, epochs=1)
    assert held_back(later) == 12
    with pytest.warns(UserWarning, match=r"temperature 1\.5, and the new one has none"):
        few = fitted("meanfield", 40, earlier.base, prior=earlier, epochs=1)
    assert few.temperature == 1
    with pytest.warns(UserWarning, match=r"temperature 1\.5, and the new one has none"):
        fitted("meanfield", 120, earlier)
