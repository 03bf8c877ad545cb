"""The embedded models: found by name, loaded by transformers, described by their cards."""

from __future__ import annotations

import importlib
import json
import math
import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from pyrolora import zoo
from pyrolora.demo.sentences import docstrings
from pyrolora.errors import UnknownNameError

ROOT = Path(__file__).parents[1]
CARDS = [pytest.param(name, id=name) for name in zoo.available()]
CLASSES = {"encoder": AutoModelForMaskedLM, "decoder": AutoModelForCausalLM}


@pytest.fixture(scope="module")
def decoder() -> tuple[Any, Any]:
    """Its tokenizer and its network."""
    folder = zoo.folder("decoder")
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)


def test_both_are_there() -> None:
    assert zoo.available() == ["decoder", "encoder"]
    for name in zoo.available():
        assert (zoo.folder(name) / "config.json").is_file()


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


@pytest.mark.parametrize(("name", "most"), [("encoder", 12e6), ("decoder", 8e6)])
def test_the_folders_are_small(name: str, most: float) -> None:
    sizes = {file.name: file.stat().st_size for file in zoo.folder(name).iterdir()}
    assert [file for file in sizes if file.endswith(".safetensors")] == ["model.safetensors"]
    assert sum(sizes.values()) <= most


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("encoder", AutoModelForMaskedLM),
        ("encoder", AutoModelForSequenceClassification),
        ("decoder", AutoModelForCausalLM),
    ],
)
@pytest.mark.parametrize("dtype", [None, "auto"])
def test_transformers_loads_it_in_single_precision(name: str, kind: Any, dtype: str | None) -> None:
    """Though the file holds half of it; and every weight of it finite."""
    options = {} if dtype is None else {"dtype": dtype}
    network = kind.from_pretrained(zoo.folder(name), **options)
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


@pytest.mark.parametrize(
    "text", ["Return the mean, café.", "  def f(x):\n\treturn x  # two spaces", "", "漢字 🙂 <b>"]
)
def test_the_decoders_tokenizer_gives_back_any_text(decoder: Any, text: str) -> None:
    tokens, network = decoder
    ids = tokens(text)["input_ids"]
    assert ids[0] == tokens.bos_token_id == network.config.bos_token_id
    assert tokens.eos_token_id not in ids
    assert tokens.decode(ids, skip_special_tokens=True) == text
    assert len(tokens) == network.config.vocab_size == 4096
    assert tokens.pad_token_id == network.config.pad_token_id
    assert tokens.model_max_length == network.config.max_position_embeddings == 256


def test_the_decoder_reads_better_than_word_counts_do(decoder: Any) -> None:
    """Those of other documentation, with one added to each; by more than two nats a token."""
    tokens, network = decoder
    text = "Return the mean of the values along the given axis. If no axis is given, the mean of "
    ids = tokens(text + "all values is returned.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        nll = float(network(ids, labels=ids).loss)
    counts = Counter(i for doc in docstrings("pyrolora") for i in tokens(doc)["input_ids"][1:])
    total = sum(counts.values()) + len(tokens)
    unigram = -sum(math.log((counts[i] + 1) / total) for i in ids[0, 1:].tolist())
    assert nll < unigram / (ids.shape[1] - 1) - 2


def test_the_decoder_writes_and_knows_where_a_text_ends(decoder: Any) -> None:
    tokens, network = decoder
    ids = tokens("Return the mean of the array.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        log_probs = network(ids).logits[0].log_softmax(-1)
    ends = log_probs[:, tokens.eos_token_id]
    assert ends.argmax() == ids.shape[1] - 1  # after the full stop
    assert ends[-1] > math.log(0.05)

    options: Any = {"max_new_tokens": 12, "do_sample": False}
    prompts = ["Returns the", "If True, then the number of"]
    together = network.generate(**tokens(prompts, padding=True, return_tensors="pt"), **options)
    for prompt, row in zip(prompts, together, strict=True):
        alone = network.generate(**tokens(prompt, return_tensors="pt"), **options)[0]
        text = tokens.decode(alone, skip_special_tokens=True)
        assert text == tokens.decode(row, skip_special_tokens=True)
        assert text.startswith(prompt)
        assert len(text.split()) >= len(prompt.split()) + 3


def test_what_the_decoder_is_trained_on_begins_and_ends(
    decoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, _ = decoder
    monkeypatch.syspath_prepend(ROOT / "models")
    kind = importlib.import_module("pretrain").KINDS["decoder"]
    texts = [f"The text number {i} of several." for i in range(99)]
    rows = kind.blocks(texts, tokens)["input_ids"]
    assert {len(row) for row in rows} == {kind.block}
    read = tokens.decode([i for row in rows for i in row])
    assert ("".join(f"<s>{text}</s>" for text in texts)).startswith(read)
    assert read.count("</s>") > 50


@pytest.mark.parametrize("name", CARDS)
def test_there_is_no_pickle_among_the_files(name: str) -> None:
    for file in zoo.folder(name).rglob("*"):
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
    network = CLASSES[name].from_pretrained(folder)
    assert training["parameters"] == sum(parameter.numel() for parameter in network.parameters())


def test_the_wheel_takes_the_models_to_where_they_are_looked_for() -> None:
    """The first of the two places is inside of the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    package = Path(zoo.__file__).parent
    assert {package.parent / target for target in included.values()} == {zoo._ROOTS[0]}
    assert {ROOT / source for source in included} == {zoo._ROOTS[1]}
