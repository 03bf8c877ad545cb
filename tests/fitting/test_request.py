"""A request says what was asked for, as JSON too, and contradicts itself before anything loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from problems import bert, reviews, tokenizer
from transformers import TrainerCallback, TrainingArguments

import pyrolora
from pyrolora import AdapterConfig, Posterior, defaults
from pyrolora.errors import ConfigError
from pyrolora.fitting import Request, StoredPosterior, fit_request
from pyrolora.guides import MAP, MeanField, MonteCLoRA


@pytest.fixture(scope="module")
def earlier() -> Posterior:
    return pyrolora.fit(
        bert(initializer_range=0.3), reviews(16), MeanField(latent="AB"), tokenizer=tokenizer(),
        adapter=AdapterConfig(r=2), epochs=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(earlier: Posterior, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The posterior as it saves itself, and as PEFT has it."""
    place = tmp_path_factory.mktemp("place")
    earlier.save(place / "saved")
    earlier.to_peft(place / "peft")
    return {"saved": place / "saved", "peft": place / "peft"}


def asked(**options: Any) -> Request:
    return Request(model="nowhere", data=reviews(4), **options)


def test_the_guide_is_a_name_an_object_or_that_of_the_prior(earlier: Posterior) -> None:
    assert asked().options == MonteCLoRA()
    assert asked(guide="map").options == MAP()
    assert asked(guide=MAP(prior_scale=0.5)).options == MAP(prior_scale=0.5)
    assert asked(prior=earlier).options == earlier.options
    assert asked(prior=earlier, guide="meanfield").options == earlier.options
    assert asked(prior=earlier, guide=MeanField()).options == MeanField()


@pytest.mark.parametrize("stored", [False, True])
def test_what_contradicts_itself_is_refused_before_anything_is_loaded(
    stored: bool, earlier: Posterior, folders: dict[str, Path]
) -> None:
    """The model is nowhere, and an error that says so would come of loading it."""
    source = StoredPosterior(folders["saved"]) if stored else earlier
    for options, words in [
        ({"prior": source, "guide": "montec"}, "same one"),
        ({"prior": source, "guide": MeanField()}, "latent='A', and in the prior it is 'AB'"),
        ({"prior": source, "adapter": AdapterConfig()}, "adapter= comes with the prior"),
        ({"prior": source, "task": "regression"}, "task= comes with the prior"),
        ({"prior": source, "given": source}, r"posterior\.base"),
        ({"given": source, "guide": "map"}, "nothing to infer.*montec"),
        ({"given": source, "adapter": AdapterConfig()}, "adapter= comes with the posterior"),
        ({"given": source, "task": "regression"}, "task= comes with the posterior"),
        ({"given": source, "guide": "laplace", "epochs": 2}, "trains nothing.*epochs"),
        (
            {"given": source, "guide": "laplace", "callbacks": TrainerCallback()},
            "trains nothing.*callbacks",
        ),
        (
            {"given": source, "guide": "tfb", "training_options": {"max_steps": 3}},
            r"trains nothing.*training\.max_steps",
        ),
        (
            {
                "given": source,
                "guide": "laplace",
                "training": TrainingArguments("out", num_train_epochs=7, report_to="none"),
            },
            r"trains nothing.*training=num_train_epochs=7",
        ),
        ({"guide": "full", "adapter": AdapterConfig()}, "has no adapters"),
    ]:
        with pytest.raises(ConfigError, match=words):
            fit_request(asked(**options))


def test_an_adapter_of_peft_takes_a_task_and_is_no_prior(folders: dict[str, Path]) -> None:
    given = StoredPosterior(folders["peft"])
    assert given.from_peft
    asked(given=given, guide="laplace", task="classification").check()
    with pytest.raises(ConfigError, match="'map' cannot be the prior"):
        asked(prior=given, guide="meanfield").check()


@pytest.mark.parametrize("kind", ["saved", "peft"])
def test_a_stored_posterior_is_loaded_on_the_model_of_the_request(
    kind: str, earlier: Posterior, folders: dict[str, Path]
) -> None:
    network = bert(initializer_range=0.3)
    request = Request(
        model=network, data=reviews(8), given=StoredPosterior(folders[kind]), guide="laplace"
    ).loaded()
    assert request.model is network
    assert isinstance(request.given, Posterior)
    assert request.given.ranks == earlier.ranks
    assert request.task is None


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no folder .*gone"):
        StoredPosterior(tmp_path / "gone")


def test_the_record_is_json_and_says_what_applies(
    earlier: Posterior, folders: dict[str, Path], tmp_path: Path
) -> None:
    request = Request(
        model=bert(), data=reviews(4), guide=MeanField(), adapter=AdapterConfig(r=3), epochs=2,
        output_dir=tmp_path, training_options={"weight_decay": 0.1},
    )  # fmt: skip
    record = request.record()
    assert json.loads(json.dumps(record)) == record
    assert record["model"] == "BertForSequenceClassification"
    assert record["data"] == "Dataset"
    assert (record["guide"]["name"], record["guide"]["latent"]) == ("meanfield", "A")
    assert record["adapter"]["r"] == 3
    assert (record["epochs"], record["seed"]) == (2, defaults.SEED)
    assert record["training"] == {"weight_decay": 0.1}
    assert "output_dir" not in record, "it is where the record lies"
    later = asked(prior=StoredPosterior(folders["saved"])).record()
    assert later["prior"] == str(folders["saved"])
    assert later["adapter"] is None, "that of the prior is used"
    arguments = TrainingArguments(output_dir=str(tmp_path), learning_rate=0.5, use_cpu=True)
    record = asked(training=arguments, given=earlier, guide="laplace").record()
    assert record["training"]["learning_rate"] == 0.5
    assert "epochs" not in record
    assert "meanfield" in record["given"]
    json.dumps(record)


def test_a_request_is_fitted_as_its_keywords_are(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "guide": "meanfield", "tokenizer": tokenizer(), "adapter": AdapterConfig(r=2), "seed": 3,
    }  # fmt: skip
    expected = pyrolora.fit(bert(), reviews(12), epochs=1, **options).model.own_state()
    found = fit_request(Request(model=bert(), data=reviews(12), epochs=1, **options))
    for name, tensor in found.model.own_state().items():
        assert tensor.equal(expected[name])
    unsaved = Request(
        model=bert(), data=reviews(12), epochs=1, output_dir=tmp_path, saves=False, **options
    )
    fit_request(unsaved)
    assert not (tmp_path / "posterior.json").exists()
    assert list(tmp_path.glob("checkpoint-*"))
