"""The embedded models: found by name, loaded by transformers, described by their cards."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from pyrolora import zoo
from pyrolora.errors import UnknownNameError

ROOT = Path(__file__).parents[1]
CARDS = [pytest.param(name, id=name) for name in zoo.available()]


def test_the_encoder_is_there() -> None:
    assert "encoder" in zoo.available()
    assert zoo.available() == sorted(set(zoo.available()))
    assert (zoo.folder("encoder") / "config.json").is_file()


@pytest.mark.parametrize("name", ["gpt-5", "", "..", "encoder/", "Encoder"])
def test_an_unknown_name_is_told_what_there_is(name: str) -> None:
    with pytest.raises(UnknownNameError, match=r"there are: .*encoder") as caught:
        zoo.folder(name)
    assert repr(name) in str(caught.value)


def test_the_models_of_an_installed_package_come_before_those_of_a_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, beside = tmp_path / "inside", tmp_path / "beside"
    for root, name in ((inside, "one"), (beside, "one"), (beside, "two")):
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_text("{}")
    (beside / "notes").mkdir()
    monkeypatch.setattr(zoo, "_ROOTS", (inside, beside))
    assert zoo.available() == ["one", "two"]
    assert zoo.folder("one") == inside / "one"
    assert zoo.folder("two") == beside / "two"
    monkeypatch.setattr(zoo, "_ROOTS", (tmp_path / "gone",))
    with pytest.raises(UnknownNameError, match="there are: none"):
        zoo.folder("one")


def test_the_weights_are_small() -> None:
    sizes = [file.stat().st_size for file in zoo.folder("encoder").glob("*.safetensors")]
    assert len(sizes) == 1
    assert sizes[0] <= 12e6


@pytest.mark.parametrize("kind", [AutoModelForMaskedLM, AutoModelForSequenceClassification])
@pytest.mark.parametrize("dtype", [None, "auto"])
def test_transformers_loads_the_encoder_in_single_precision(kind: type, dtype: str | None) -> None:
    """Though the file holds half of it; and every weight of it finite."""
    options = {} if dtype is None else {"dtype": dtype}
    network = kind.from_pretrained(zoo.folder("encoder"), **options)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert all(torch.isfinite(parameter).all() for parameter in network.parameters())


def test_the_encoder_fills_in_a_masked_word() -> None:
    """The tokenizer's ids are the network's: one row of logits for every token."""
    folder = zoo.folder("encoder")
    tokens, network = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForMaskedLM.from_pretrained(folder),
    )
    assert len(tokens) <= network.config.vocab_size
    assert tokens.pad_token_id == network.config.pad_token_id
    text = "Return the mean of an array, café."
    assert tokens.decode(tokens(text)["input_ids"], skip_special_tokens=True).strip() == text
    batch = tokens(["a short one", f"the {tokens.mask_token} of a matrix " * 60],
                   padding=True, truncation=True, return_tensors="pt")  # fmt: skip
    with torch.no_grad():
        logits = network.eval()(**batch).logits
    assert logits.shape == (*batch["input_ids"].shape, network.config.vocab_size)
    assert batch["input_ids"].shape[1] == tokens.model_max_length <= 130
    assert torch.isfinite(logits).all()


def test_there_is_no_pickle_among_the_files() -> None:
    for file in zoo.folder("encoder").rglob("*"):
        assert file.suffix not in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}, file


@pytest.mark.parametrize("name", CARDS)
def test_the_card_repeats_the_figures_of_the_training(name: str) -> None:
    folder = zoo.folder(name)
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    card = (folder / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|\s*([^|]+?)\s*\|\s*([^|]+?)\s*\|", card, flags=re.MULTILINE)
    cells = {cell.lower(): value for cell, value in rows}
    for key in ("validation loss", "steps", "parameters"):
        assert key in cells, f"the card's table has no row {key!r}"
        number = re.search(r"\d[\d, _\u202f]*(?:\.\d+)?", cells[key])
        assert number is not None, cells[key]
        shown = re.sub(r"[, _\u202f]", "", number[0])
        decimals = len(shown.partition(".")[2])
        assert float(shown) == round(float(training[key.replace(" ", "_")]), decimals), key


@pytest.mark.parametrize("name", CARDS)
def test_the_recorded_parameters_are_those_of_the_network(name: str) -> None:
    folder = zoo.folder(name)
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    network = AutoModelForMaskedLM.from_pretrained(folder)
    assert training["parameters"] == sum(parameter.numel() for parameter in network.parameters())


def test_the_wheel_takes_the_models_to_where_they_are_looked_for() -> None:
    """The first of the two places is inside of the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    package = Path(zoo.__file__).parent
    assert {package.parent / target for target in included.values()} == {zoo._ROOTS[0]}
    assert {ROOT / source for source in included} == {zoo._ROOTS[1]}
