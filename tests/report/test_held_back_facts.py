"""What a posterior says of the training examples that its fit held back, wherever it says it."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import absolute, mlp

import pyrolora
from pyrolora import AdapterConfig, Posterior
from pyrolora.arviz import as_chains
from pyrolora.data import prepare
from pyrolora.diagnostics import loo
from pyrolora.errors import CheckpointError, ConfigError, DataError
from pyrolora.guides import Flat, Guide, LowRank, MeanField, MonteCLoRA
from pyrolora.inference.widths import chosen_width
from pyrolora.report import report_on
from pyrolora.storage.description import described, digest_of

HELD_BACK, N = 10, 100
MODEST = "ignore:Estimated shape parameter"


def data(n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, 4, generator=generator)
    return X, X[:, :3].argmax(-1)


@cache
def fitted(guide: Guide | None = None, n: int = N, seed: int = 1, **options: Any) -> Posterior:
    return pyrolora.fit(
        mlp(), data(n), MonteCLoRA() if guide is None else guide, task="classification",
        adapter=AdapterConfig(r=2), epochs=4, batch_size=16, learning_rate=0.05, seed=seed,
        **options,
    )  # fmt: skip


def learnt() -> tuple[torch.Tensor, torch.Tensor]:
    """The examples that the fits of seed 1 have learnt from."""
    posterior = fitted()
    prepared = prepare(data(), posterior.base, posterior.task)
    kept, _ = prepared.parted(HELD_BACK, seed=1)
    return kept.examples.columns["inputs"], kept.labels


# The numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", [MonteCLoRA(), MeanField(), Flat(inner=MonteCLoRA())])
def test_a_posterior_knows_how_many_were_held_back(guide: Guide, tmp_path: Path) -> None:
    posterior = fitted(guide)
    assert (posterior.held_back, posterior.model.num_examples) == (HELD_BACK, N - HELD_BACK)
    assert posterior.history[-1] == {
        "held_back": HELD_BACK,
        "width": chosen_width(posterior.model),
        "temperature": posterior.temperature,
    }
    assert "num_examples=90, held_back=10, temperature=" in repr(posterior)
    posterior.save(tmp_path)
    loaded = pyrolora.load(tmp_path, mlp())
    assert repr(loaded) == repr(posterior)
    assert loaded.history == posterior.history
    assert loaded.options == posterior.options
    inner = getattr(loaded.options, "inner", loaded.options)
    assert (inner.units, inner.scale_updates, inner.hold_back) == (None, None, None)
    assert chosen_width(loaded.model) == chosen_width(posterior.model) != 1


@pytest.mark.parametrize("guide", [MonteCLoRA(hold_back=0), absolute(MonteCLoRA), "map"])
def test_where_none_are_held_back_nothing_says_so(guide: Any) -> None:
    posterior = fitted(guide)
    assert (posterior.held_back, posterior.model.num_examples) == (0, N)
    assert "held_back" not in repr(posterior) + str(posterior.settings)
    assert "held back" not in str(posterior.card())


def test_the_digest_is_that_of_all_training_data() -> None:
    digests = {fitted(g).settings["data_digest"] for g in (MonteCLoRA(), MonteCLoRA(hold_back=0))}
    assert len(digests) == 1


# Where it is read ---------------------------------------------------------------------------------


def test_card_and_report_name_what_they_chose() -> None:
    posterior = fitted()
    card = str(posterior.card())
    width, temperature = chosen_width(posterior.model), posterior.temperature
    assert "| training examples | 90 |" in card
    assert "| examples held back | 10, for the width and the temperature |" in card
    assert f"| width of the noise | {width:.4g} |" in card
    assert f"| temperature | {temperature:.4g} |" in card
    made = report_on(posterior, data(30), num_samples=2, seed=0)
    assert "<dt>examples held back</dt><dd>10, for the width and the temperature</dd>" in made.html
    assert f"<dt>width of the noise</dt><dd>{width:.4g}</dd>" in made.html
    assert "held back chose one number that multiplies the widths" in made.html


@pytest.mark.filterwarnings("ignore:the posterior that this fit starts from has the temperature")
def test_after_an_earlier_posterior_they_have_chosen_the_temperature_alone() -> None:
    earlier = fitted()
    later = pyrolora.fit(earlier.base, data(), prior=earlier, epochs=1, seed=1)
    assert chosen_width(later.model) == chosen_width(earlier.model)
    card = str(later.card())
    assert "| examples held back | 10, for the temperature |" in card
    made = report_on(later, data(30), num_samples=2, seed=0)
    assert "held back chose one number" not in made.html


def test_a_fit_that_ends_before_the_first_choice_has_chosen_the_temperature_alone() -> None:
    card = str(fitted(MonteCLoRA(hold_back=0.5), 20).card())
    assert "| examples held back | 10, for the temperature |" in card


def test_trained_widths_are_multiplied_by_what_was_chosen_too() -> None:
    made = report_on(fitted(LowRank(scale_updates="gradient")), data(30), num_samples=2, seed=0)
    assert "The widths come from the training steps" in made.html
    assert "held back chose one number that multiplies the widths" in made.html


def test_a_width_that_data_chose_is_not_put_down_to_the_prior() -> None:
    """Scales at the prior's are, where nothing was held back."""
    start = MonteCLoRA(scale_updates="gradient", scale_learning_rate=1e-9)
    fixed = MonteCLoRA(scale_updates="gradient", scale_learning_rate=1e-9, hold_back=0)
    for guide, expected in ((start, False), (fixed, True)):
        found = {one.name for one in report_on(fitted(guide), data(30), num_samples=2).findings}
        assert ("prior_dominated" in found) == expected
        assert ("is the prior's, not the data's" in str(fitted(guide).card())) == expected


# Data of the fit ----------------------------------------------------------------------------------


def test_khat_of_all_training_data_is_that_of_those_that_were_learnt() -> None:
    found = fitted().khat(data(), 50, seed=0)
    assert found == fitted().khat(learnt(), 50, seed=0)
    with pytest.raises(DataError, match="training data, 90 examples, got 99"):
        fitted().khat(data(99), 50)


def test_nothing_is_taken_from_other_data_where_none_were_held_back() -> None:
    """22 examples without a tenth are 20, which is as many as were learnt."""
    with pytest.raises(DataError, match="training data, 20 examples, got 22"):
        fitted(n=20).khat(data(22), 50)


@pytest.mark.filterwarnings(MODEST)
def test_leave_one_out_of_all_training_data_is_that_of_those_that_were_learnt() -> None:
    draws = partial(fitted().to_arviz, 50, log_likelihood=True)
    found, expected = loo(draws(data=data())), loo(draws(data=learnt()))
    assert found["elpd_loo"] == pytest.approx(expected["elpd_loo"], rel=1e-6)
    assert found["loo_i"].sizes["example"] == N - HELD_BACK
    with pytest.raises(DataError, match="training data, 90 examples, got 99"):
        loo(draws(data=data(99)))


def test_fits_with_temperatures_of_their_own_are_chains() -> None:
    two = [fitted(seed=seed) for seed in (1, 2)]
    assert two[0].temperature != two[1].temperature
    joined = as_chains([fit.to_arviz(20, data=data(), log_likelihood=True) for fit in two])
    assert joined["posterior"].sizes["chain"] == 2
    with pytest.raises(ConfigError, match="held back different ones; call loo on each"):
        loo(joined)


# After it -----------------------------------------------------------------------------------------


def test_a_fit_from_a_posterior_says_where_its_temperature_is_lost() -> None:
    """Not where it chooses one of its own."""
    given = fitted()
    again = partial(pyrolora.fit, mlp(), prior=given, epochs=1, seed=0)
    assert again(data()).temperature not in (1.0, given.temperature)
    with pytest.warns(UserWarning, match="and the new one has none"):
        assert again(data(20)).temperature == 1
    with pytest.warns(UserWarning, match="and the new one has none"):
        assert pyrolora.fit(given, data(), "laplace").temperature == 1


# Folders ------------------------------------------------------------------------------------------


@pytest.fixture
def meta(tmp_path: Path) -> dict[str, Any]:
    fitted().save(tmp_path)
    return json.loads((tmp_path / "posterior.json").read_text())


def test_a_folder_of_a_fit_that_never_held_back_has_its_meaning(tmp_path: Path) -> None:
    """Its options state all but ``hold_back``, and none of them takes today's default."""
    guide = Flat(inner=absolute(MonteCLoRA))
    posterior = fitted(guide)
    posterior.save(tmp_path)
    saved = json.loads((tmp_path / "posterior.json").read_text())
    assert saved["guide"]["options"]["inner"].pop("hold_back") is None
    options = described(saved).guide.inner
    assert (options.hold_back, options.held_back, options.unit) == (0, 0, "one")
    assert not options.settles
    folder = tmp_path / "posterior.json"
    saved["digest"] = digest_of(saved)
    folder.write_text(json.dumps(saved))
    loaded = pyrolora.load(tmp_path, mlp())
    expected = posterior.predict(data(), draws=[0, 1]).draws
    assert torch.equal(loaded.predict(data(), draws=[0, 1]).draws, expected)


def test_options_that_a_folder_does_not_state_take_no_default(meta: dict[str, Any]) -> None:
    for name in ("units", "scale_updates", "kl_weight", "sample_scale", "prior_mean"):
        options = {n: v for n, v in meta["guide"]["options"].items() if n != name}
        with pytest.raises(CheckpointError, match=f"'{name}'"):
            described({**meta, "guide": {**meta["guide"], "options": options}})


@pytest.mark.parametrize("value", ["10", -1, 0, True, 2.5])
def test_a_folder_whose_count_is_none_is_refused(meta: dict[str, Any], value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"settings\.held_back"):
        described({**meta, "settings": {**meta["settings"], "held_back": value}})
    if type(value) is not int and type(value) is not float:
        with pytest.raises(CheckpointError, match=r"held_back.* a number"):
            described({**meta, "history": [{"held_back": value}]})
