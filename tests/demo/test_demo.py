"""``pyrolora demo`` on a tiny network: a fair comparison, and every file that it promises."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import arviz as az
import matplotlib.image
import pytest
import torch
from console import Result, done, pyrolora_, refused, saved
from problems import bert

import pyrolora
from pyrolora.demo import LIBRARIES, UNSEEN, sentences

TRAIN, TEST, DRAWS = 4, 3, 2


def demo(place: Path, *more: Any) -> list[Any]:
    return [
        *("demo", "--output-dir", place / "out", "--model", place / "encoder", "--train", TRAIN),
        *("--test", TEST, "--epochs", 1, "--num-samples", DRAWS, *more),
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    # Every word is unknown to the tiny tokenizer: texts differ by their length alone.
    saved(bert(initializer_range=0.3, max_position_embeddings=64).bert, place / "encoder")
    return place


@pytest.fixture(scope="module")
def result(place: Path) -> Result:
    return done(*demo(place))


@pytest.fixture(scope="module")
def printed(place: Path) -> Result:
    """The same demo in another folder, as JSON."""
    (place / "again").mkdir()
    (place / "again" / "encoder").symlink_to(place / "encoder")
    return done(*demo(place / "again", "--json"))


@pytest.fixture
def out(result: Result, place: Path) -> Path:
    return place / "out"


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_table_has_a_row_for_every_score(result: Result) -> None:
    heading = next(line for line in result.out.splitlines() if "map" in line)
    assert heading.index("map") < heading.index("montec")
    for name in (
        "accuracy",
        "nll",
        "ece",
        "brier",
        "error auroc",
        "ood entropy",
        "ood mi",
        "fit seconds",
        "predict seconds",
    ):
        (line,) = [line for line in result.out.splitlines() if re.match(rf"\W*{name}\b", line)]
        numbers = re.findall(r"(?<=\s)(?:\d+\.\d+|-)(?=\s)", line)
        assert len(numbers) >= 2, line
    (line,) = [line for line in result.out.splitlines() if "ood mi" in line]
    assert re.search(r"ood mi\W+-\W", line), "a point estimate's draws do not disagree"


def test_what_is_compared_is_said_on_the_way(result: Result) -> None:
    for number in (TRAIN * len(LIBRARIES), TEST * len(LIBRARIES), TEST * len(UNSEEN)):
        assert str(number) in result.err


def test_json_is_one_document_with_the_scores(printed: Result, place: Path) -> None:
    found = printed.json
    assert found["output_dir"] == str(place / "again" / "out")
    assert found["data"] == {"train": 32, "test": 24, "unseen": 12}
    assert set(found["scores"]) == {"map", "montec"}
    for guide, scores in found["scores"].items():
        posterior = pyrolora.load(place / "again" / "out" / guide)
        data = sentences(train=TRAIN, test=TEST, unseen=TEST)
        expected = posterior.evaluate(data["test"], DRAWS, seed=0)
        for name, value in expected.items():
            assert scores[name] == pytest.approx(None if math.isnan(value) else value), name
    assert found["scores"]["map"]["ood_mi"] is None
    assert 0 <= found["scores"]["montec"]["ood_mi"] <= 1
    assert all(0 <= scores["ood_entropy"] <= 1 for scores in found["scores"].values())


def test_both_had_the_same_network_data_and_steps(out: Path) -> None:
    plain, posterior = (pyrolora.load(out / guide) for guide in ("map", "montec"))
    assert plain.options.name == "map"
    assert posterior.options.name == "montec"
    assert plain.settings == posterior.settings
    assert plain.model.num_examples == posterior.model.num_examples == TRAIN * len(LIBRARIES)
    assert plain.bank.specs == posterior.bank.specs
    assert [entry["step"] for entry in plain.history] == [
        entry["step"] for entry in posterior.history
    ]
    networks = (plain.base.state_dict(), posterior.base.state_dict())
    shared = {name for name in networks[0] if name.startswith("bert.embeddings")}
    assert shared
    assert all(torch.equal(networks[0][name], networks[1][name]) for name in shared)
    assert plain.base.config.id2label == dict(enumerate(LIBRARIES))


def test_the_picture_is_one(out: Path) -> None:
    picture = matplotlib.image.imread(out / "picture.png")
    assert picture.shape[0] > 300
    assert picture.shape[1] > 900
    assert picture[..., :3].std() > 0.01, "a blank page"


def test_the_draws_open_in_arviz(out: Path) -> None:
    posterior = az.from_netcdf(str(out / "posterior.nc")).posterior
    assert posterior.sizes["draw"] == 200
    assert posterior.attrs["guide"] == "montec"
    assert float(posterior["adapter_norm"].std("draw").min()) > 0


def test_the_data_that_was_scored_is_written(out: Path) -> None:
    data = sentences(train=TRAIN, test=TEST, unseen=TEST)
    names = data["test"].features["label"].names
    assert rows(out / "test.jsonl") == [
        {"text": row["text"], "label": names[row["label"]]} for row in data["test"]
    ]
    assert rows(out / "unseen.jsonl") == list(data["unseen"])


def test_the_commands_that_it_proposes_work(
    result: Result, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^ +\S*pyrolora (.*)$", result.out, flags=re.MULTILINE)
    ready = [shlex.split(command) for command in commands if "YOUR_" not in command]
    assert [words[0] for words in ready] == ["evaluate", "predict"]
    for words in ready:
        done(*words)
    assert (tmp_path / "predictions.csv").stat().st_size > 0
    code = re.search(r"az\.summary\(az\.from_netcdf\(.*?\)\)", result.out)
    assert code is not None
    assert str(out / "posterior.nc") in code[0]


def test_the_same_seed_gives_the_same_scores(result: Result, printed: Result, place: Path) -> None:
    for guide in ("map", "montec"):
        one, other = (pyrolora.load(place / name / guide) for name in ("out", "again/out"))
        first, second = one.model.own_state(), other.model.own_state()
        assert all(torch.equal(first[name], second[name]) for name in first)
        for name in ("nll", "brier", "ood_entropy"):
            assert f"{printed.json['scores'][guide][name]:.3f}" in result.out


def test_another_seed_gives_another_posterior(printed: Result, place: Path, tmp_path: Path) -> None:
    (tmp_path / "encoder").symlink_to(place / "encoder")
    found = done(*demo(tmp_path, "--json", "--seed", 1)).json["scores"]
    for guide in ("map", "montec"):
        assert found[guide]["nll"] != printed.json["scores"][guide]["nll"]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--train", 0), ("--test", 0), ("--test", -1), ("--num-samples", -1), ("--epochs", 0),
     ("--learning-rate", -1), ("--seed", -1), ("--model", "gone")],
)  # fmt: skip
def test_what_no_demo_can_have_is_refused(
    option: str, value: Any, place: Path, tmp_path: Path
) -> None:
    (tmp_path / "encoder").symlink_to(place / "encoder")
    refused(pyrolora_(*demo(tmp_path, option, value)))
