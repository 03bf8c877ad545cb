"""The hub's conventions: the card of a posterior, its repository, and the mean for PEFT alone."""

from __future__ import annotations

import importlib
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
from hubs import Hub
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from problems import bert, mlp, reviews, tokenizer
from transformers import AutoModelForSequenceClassification

import pyrolora
from pyrolora import AdapterConfig, Posterior
from pyrolora.errors import CheckpointError, ConfigError, SaveError
from pyrolora.report.card import plain
from pyrolora.storage.card_file import is_untouched, marked, write_card

CARD = "README.md"
COMMIT = "c" * 40


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    bert().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fitted(network: Path) -> Posterior:
    return pyrolora.fit(
        AutoModelForSequenceClassification.from_pretrained(network),
        reviews(24),
        "meanfield",
        eval_data=reviews(8, 1),
        tokenizer=tokenizer(),
        adapter=AdapterConfig(r=2),
        epochs=2,
        learning_rate=0.05,
        seed=3,
    )


def card_in(folder: Path) -> ModelCard:
    return ModelCard.load(folder / CARD)


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", made)
    return made


def cached(folder: Path, cache: Path, repo_id: str, revision: str = "main") -> None:
    """Lay a folder into the hub's cache, as huggingface_hub lays out what it has fetched."""
    place = cache / ("models--" + repo_id.replace("/", "--"))
    shutil.copytree(folder, place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs" / revision).write_text(COMMIT)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


# The card -----------------------------------------------------------------------------------------


def test_a_saved_folder_has_a_card_of_the_facts_of_the_fit(fitted: Posterior, tmp_path: Path):
    fitted.save(tmp_path)
    card = card_in(tmp_path)
    assert card.data.library_name == "pyrolora"
    assert card.data.pipeline_tag == "text-classification"
    assert {"pyrolora", "meanfield", "lora"} <= set(card.data.tags)
    last = [entry for entry in fitted.history if "eval_nll" in entry][-1]
    scores = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert scores["nll"] == pytest.approx(last["eval_nll"], abs=1e-6)
    assert fitted.settings["data_digest"] in card.text
    assert "pyrolora.load(" in card.text
    assert "peft=True" in card.text, "how to have the mean is said where it is not"


def test_scores_from_before_the_temperature_say_so(
    fitted: Posterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "At the last evaluation of the fit, of the predictive" in fitted.card().text
    monkeypatch.setattr(fitted, "temperature", 2.0)
    assert "At the last evaluation of the fit, at temperature 1, of the" in fitted.card().text
    assert "temperature 1, of the" not in fitted.card(reviews(8, 1)).text


def test_the_digest_of_the_data_is_that_of_the_data(network: Path):
    def digest(data: Any) -> str:
        model = AutoModelForSequenceClassification.from_pretrained(network)
        made = pyrolora.fit(model, data, "map", tokenizer=tokenizer(), epochs=1)
        return made.settings["data_digest"]

    assert digest(reviews(6)) == digest(reviews(6)) != digest(reviews(6, 1))


def test_the_card_differs_in_nothing_between_saves(fitted: Posterior, tmp_path: Path):
    fitted.save(tmp_path / "one")
    fitted.save(tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_the_card_names_no_path_of_this_machine(fitted: Posterior, network: Path, tmp_path: Path):
    fitted.save(tmp_path, peft=True)
    assert str(network) not in card_in(tmp_path).content
    assert card_in(tmp_path).data.base_model is None


def test_a_network_of_the_hub_is_the_base_model(fitted: Posterior, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fitted.base.config, "_name_or_path", "google/bert_tiny")
    card = fitted.card()
    assert card.data.base_model == "google/bert_tiny"
    assert card.data.base_model_relation == "adapter"
    assert "from_pretrained('google/bert_tiny', num_labels=2)" in card.text
    monkeypatch.setattr(type(fitted.base), "main_input_name", "input_values")
    text = fitted.card().text
    assert (
        "AutoModelForAudioClassification.from_pretrained('google/bert_tiny', num_labels=2)" in text
    )


def test_the_card_of_data_has_the_scores_and_warnings_of_the_report(fitted: Posterior):
    data = reviews(12, 2)
    card = fitted.card(data, draws=[0, 1], license="mit", tags=["mine"], language="en")
    scores = {r.metric_type: r.metric_value for r in card.data.eval_results}
    expected = fitted.evaluate(data, draws=[0, 1])
    assert scores == pytest.approx(expected, abs=1e-6)
    assert card.data.license == "mit"
    assert card.data.tags[-1] == "mine"
    assert "There are few examples" in card.text
    assert "There are few draws" in card.text


def test_a_card_takes_no_pictures_and_no_bootstrap(
    fitted: Posterior, monkeypatch: pytest.MonkeyPatch
):
    from pyrolora.report import report

    for name in ("prediction_pictures", "posterior_pictures", "scores", "shaded_texts"):
        monkeypatch.delattr(report, name)
    monkeypatch.setattr(Posterior, "to_arviz", None)
    assert "There are few examples" in fitted.card(reviews(4), draws=[0]).text


def test_metadata_that_the_format_does_not_have_are_refused(fitted: Posterior):
    with pytest.raises(ConfigError, match="tags must be a list of texts"):
        fitted.card(tags=3)


def test_a_card_that_somebody_edited_stays(
    fitted: Posterior, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    fitted.save(tmp_path)
    mine = (tmp_path / CARD).read_text().replace("# meanfield", "# my")
    (tmp_path / CARD).write_text(mine)
    with caplog.at_level(logging.WARNING, "pyrolora"):
        fitted.save(tmp_path)
    assert (tmp_path / CARD).read_text() == mine
    assert "edited by somebody" in caplog.text


def test_a_card_is_known_by_its_last_line(tmp_path: Path):
    text = marked("# a\n\nb\n")
    assert is_untouched(text)
    assert is_untouched(text.replace("\n", "\r\n"))
    assert not is_untouched(text.replace("b", "c"))
    assert not is_untouched(text + "more\n")
    assert not is_untouched("# a\n")
    (tmp_path / CARD).write_bytes(b"\xff\xfe")
    write_card(tmp_path, "new")
    assert (tmp_path / CARD).read_bytes() == b"\xff\xfe"
    write_card(tmp_path, "new", replace=True)
    assert is_untouched((tmp_path / CARD).read_text())


def test_a_link_in_the_cards_place_is_replaced_and_not_followed(fitted: Posterior, tmp_path: Path):
    outside = tmp_path / "outside.md"
    outside.write_text(marked("old"))
    folder = tmp_path / "posterior"
    folder.mkdir()
    (folder / CARD).symlink_to(outside)
    fitted.save(folder)
    assert outside.read_text() == marked("old")
    assert not (folder / CARD).is_symlink()


@pytest.mark.parametrize(
    "text", ["<script>x</script>", "a|b", "[x](http://y)", "a\n# b", "`x`", "\x1b[31m", "![](z)"]
)
def test_text_of_others_brings_no_markup_into_a_card(text: str):
    shown = plain(text)
    assert "\n" not in shown
    assert "<" not in shown
    assert "\x1b" not in shown
    bare = shown.replace("\\\\", "").replace("\\|", "").replace("\\[", "").replace("\\`", "")
    assert not set(bare) & set("|[`")


# The mean for PEFT alone --------------------------------------------------------------------------


def test_the_mean_beside_the_posterior_loads_with_peft_alone(
    fitted: Posterior, network: Path, tmp_path: Path
):
    fitted.save(tmp_path, peft=True)
    plain_network = AutoModelForSequenceClassification.from_pretrained(network)
    mean = peft.PeftModel.from_pretrained(plain_network, tmp_path, subfolder="peft").eval()
    batch = tokenizer()(reviews(6)["text"][:], padding=True, return_tensors="pt")
    expected = fitted.merge()(**batch).logits
    torch.testing.assert_close(mean(**batch).logits, expected)
    assert "peft" in card_in(tmp_path).data.tags
    assert "subfolder='peft'" in card_in(tmp_path).text


def test_a_later_save_leaves_no_mean_of_an_older_posterior(fitted: Posterior, tmp_path: Path):
    fitted.save(tmp_path, peft=True)
    (tmp_path / "peft" / "notes.txt").write_text("mine")
    fitted.save(tmp_path)
    assert [f.name for f in (tmp_path / "peft").iterdir()] == ["notes.txt"]
    (tmp_path / "peft" / "notes.txt").unlink()
    fitted.save(tmp_path, peft=True)
    fitted.save(tmp_path)
    assert not (tmp_path / "peft").exists()


def test_folders_of_the_same_fit_are_equal_with_and_without_the_mean(
    fitted: Posterior, tmp_path: Path
):
    fitted.save(tmp_path / "one")
    fitted.save(tmp_path / "two", peft=True)
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert {n for n in two if two[n] != one.get(n)} == {
        CARD,
        "peft/adapter_config.json",
        "peft/adapter_model.safetensors",
    }


def test_a_mean_that_is_no_adapter_is_named(tmp_path: Path, hub: Hub):
    x = torch.randn(12, 4)
    whole = pyrolora.fit(mlp(), (x, torch.arange(12) % 3), "full", task="classification", epochs=1)
    with pytest.raises(ConfigError, match="peft=True cannot be had: 'full' has no adapter"):
        whole.save(tmp_path / "one", peft=True)
    assert not (tmp_path / "one").exists()
    whole.push_to_hub("me/whole")
    assert "no adapter" in card_in(hub.root / "me/whole").text


def test_the_card_says_what_the_mean_lacks(fitted: Posterior, tmp_path: Path):
    fitted.temperature = 2.0
    try:
        with pytest.warns(UserWarning, match="the mean does not hold the temperature 2"):
            fitted.save(tmp_path, peft=True)
    finally:
        fitted.temperature = 1.0
    assert "the temperature 2" in card_in(tmp_path).text


# The hub ------------------------------------------------------------------------------------------


def test_what_is_pushed_is_what_loads(fitted: Posterior, hub: Hub, tmp_path: Path):
    address = fitted.push_to_hub("me/posterior", private=True, token="hf_x", revision="first")
    assert address == "https://hub.example/me/posterior/commit/1"
    assert (hub.private, hub.token, hub.branches) == (True, "hf_x", ["first"])
    assert hub.options["revision"] == "first"
    repo = hub.root / "me/posterior"
    assert "pyrolora.load('me/posterior'" in card_in(repo).text
    again = pyrolora.load(repo)
    data = reviews(6, 4)
    assert torch.equal(
        again.predict(data, draws=[0, 1]).draws, fitted.predict(data, draws=[0, 1]).draws
    )
    assert (repo / "peft" / "adapter_config.json").is_file()


def test_a_second_push_leaves_no_file_of_the_first(fitted: Posterior, hub: Hub):
    repo = hub.root / "me/posterior"
    repo.mkdir(parents=True)
    (repo / "adapters-0123456789ab.safetensors").write_bytes(b"old")
    (repo / "tokenizer-0123456789ab").mkdir()
    (repo / "tokenizer-0123456789ab" / "tokenizer.json").write_bytes(b"old")
    (repo / "figure.png").write_bytes(b"mine")
    fitted.push_to_hub("me/posterior", peft=False)
    names = set(files(repo))
    assert "figure.png" in names
    assert not any("0123456789ab" in name for name in names)
    assert not any(name.startswith("peft") for name in names)


def test_a_card_that_was_edited_on_the_hub_stays_unless_one_is_passed(
    fitted: Posterior, hub: Hub, caplog: pytest.LogCaptureFixture
):
    fitted.push_to_hub("me/posterior")
    card = hub.root / "me/posterior" / CARD
    fitted.push_to_hub("me/posterior")
    assert is_untouched(card.read_text())
    card.write_text("mine")
    with caplog.at_level(logging.WARNING, "pyrolora"):
        fitted.push_to_hub("me/posterior")
    assert card.read_text() == "mine"
    assert "stays as it is" in caplog.text
    fitted.push_to_hub("me/posterior", card=fitted.card(license="mit"))
    assert ModelCard.load(card).data.license == "mit"


def test_a_pull_request_is_asked_for(fitted: Posterior, hub: Hub):
    address = fitted.push_to_hub("me/posterior", create_pr=True, commit_message="Better")
    assert address.endswith("/pr")
    assert (hub.options["create_pr"], hub.options["commit_message"]) == (True, "Better")


def test_a_push_that_fails_says_why(fitted: Posterior, hub: Hub):
    client = importlib.import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])
    response: Any = SimpleNamespace(headers={}, request=None)
    hub.error = HfHubHTTPError("403 Forbidden", response=response)
    with pytest.raises(SaveError, match="could not be uploaded to 'me/posterior': 403 Forbidden"):
        fitted.push_to_hub("me/posterior")
    hub.error = client.ConnectError("Connection refused")  # which is no OSError
    with pytest.raises(SaveError, match="uploaded to 'me/posterior': Connection refused"):
        fitted.push_to_hub("me/posterior")
    with pytest.raises(ConfigError, match="repo_id must be the name of a repository"):
        fitted.push_to_hub("me/too/many")
    with pytest.raises(ConfigError, match="card must be"):
        fitted.push_to_hub("me/posterior", card="text")


def test_a_repository_in_the_hubs_cache_is_loaded(fitted: Posterior, cache: Path, tmp_path: Path):
    fitted.save(tmp_path / "saved")
    cached(tmp_path / "saved", cache, "me/posterior")
    data = reviews(6, 4)
    expected = fitted.predict(data, draws=[0]).draws
    assert torch.equal(pyrolora.load("me/posterior").predict(data, draws=[0]).draws, expected)
    assert torch.equal(
        pyrolora.load("me/posterior", revision=COMMIT).predict(data, draws=[0]).draws, expected
    )


def test_nothing_is_fetched_but_what_the_description_names(
    fitted: Posterior, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    fitted.save(tmp_path / COMMIT, peft=True)
    asked: list[Any] = []

    def fetch(repo_id: str, *, revision: Any, token: Any, allow_patterns: list[str]) -> str:
        asked.append((repo_id, revision, token, allow_patterns))
        return str(tmp_path / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    pyrolora.load("me/posterior", revision="main", token="hf_x")
    named = json.loads((tmp_path / COMMIT / "posterior.json").read_text())
    inside = [f"{named['tokenizer']}/{name}" for name in named["tokenizer_files"]]
    assert asked == [
        ("me/posterior", "main", "hf_x", ["posterior.json"]),
        ("me/posterior", COMMIT, "hf_x", [named["state_file"], *inside]),
    ]


def test_a_folder_wins_over_a_repository_of_its_name(
    fitted: Posterior, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    fitted.save("me/posterior")
    pyrolora.load("me/posterior")  # the cache is empty
    with pytest.raises(
        ConfigError, match=r"revision= .*there is a folder of that name, which wins"
    ):
        pyrolora.load("me/posterior", revision="main")
    with pytest.raises(ConfigError, match=r"token= .*it names no repository"):
        pyrolora.load(tmp_path / "nowhere", token="hf_x")


def test_what_is_neither_a_folder_nor_a_repository_is_named_as_such(cache: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="there is no folder 'runs/fit' here, and no repos"):
        pyrolora.load("runs/fit")
    with pytest.raises(CheckpointError, match="is no saved posterior"):
        pyrolora.load(str(tmp_path / "nowhere"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    cached(tmp_path / "model", cache, "me/model")
    with pytest.raises(CheckpointError, match="'me/model' of the hub holds no posterior"):
        pyrolora.load("me/model")


def test_a_damaged_repository_is_refused(fitted: Posterior, cache: Path, tmp_path: Path):
    fitted.save(tmp_path / "saved")
    state = next((tmp_path / "saved").glob("adapters-*"))
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    cached(tmp_path / "saved", cache, "me/posterior")
    with pytest.raises(CheckpointError, match=r"edited or is incomplete|digest|damaged"):
        pyrolora.load("me/posterior")


def test_a_repository_that_was_fetched_in_part_is_named(
    fitted: Posterior, cache: Path, tmp_path: Path
):
    fitted.save(tmp_path / "saved")
    next((tmp_path / "saved").glob("adapters-*")).unlink()
    cached(tmp_path / "saved", cache, "me/posterior")
    with pytest.raises(CheckpointError, match=r"'me/posterior' the hub's cache has posterior.json"):
        pyrolora.load("me/posterior")


def test_what_is_no_name_is_refused():
    with pytest.raises(ConfigError, match=r"path must be a folder, .* got 3"):
        pyrolora.load(3)
    with pytest.raises(ConfigError, match=r"revision must be .* got 3"):
        pyrolora.load("me/posterior", revision=3)
