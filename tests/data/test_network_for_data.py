"""A model that is given by its folder is loaded as what data and likelihood call for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from console import saved
from problems import Rows, bert_choice, bert_mlm, llama, mask_tokenizer, questions, reviews, tokens
from transformers import ViTConfig, ViTForImageClassification

import pyrolora
from pyrolora.errors import ConfigError, DataError
from pyrolora.tasks import load_network


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, network in {"masked": bert_mlm(), "choice": bert_choice(), "causal": llama()}.items():
        made[name] = saved(network, tmp_path_factory.mktemp(name))
        mask_tokenizer().save_pretrained(made[name])
    return made


def token_labels() -> datasets.Dataset:
    data = tokens(4)
    return data.remove_columns("labels").add_column("labels", data["input_ids"][:])


def nested() -> Rows:
    return Rows([{"input_ids": [[4, 5], [6, 7]], "labels": 1}] * 3)


@pytest.mark.parametrize(
    ("folder", "data", "task", "expected"),
    [
        ("masked", questions(4), None, "BertForMultipleChoice"),
        ("masked", nested(), None, "BertForMultipleChoice"),
        ("choice", questions(4), "multiple-choice", "BertForMultipleChoice"),
        ("choice", nested(), None, "BertForMultipleChoice"),
        ("masked", reviews(6), None, "BertForSequenceClassification"),
        ("masked", (torch.ones(4, 3).long(), torch.arange(4) % 2), None, "BertForSequenceClass"),
        ("masked", Rows(list(tokens(4))), None, "BertForSequenceClassification"),
        ("masked", reviews(6), "fill-mask", "BertForMaskedLM"),
        ("masked", reviews(6).remove_columns("label"), None, "BertForMaskedLM"),
        ("masked", ["good", "bad"], None, "BertForMaskedLM"),
        ("masked", token_labels(), "fill-mask", "BertForMaskedLM"),
        ("masked", (torch.ones(4, 3).long(),), None, "BertForMaskedLM"),
        ("causal", reviews(6), "text-generation", "LlamaForCausalLM"),
        ("causal", reviews(6).remove_columns("label"), None, "LlamaForCausalLM"),
    ],
)
def test_the_class_follows_from_data_and_likelihood(
    folders: dict[str, Path], folder: str, data: Any, task: str | None, expected: str
) -> None:
    network, found = load_network(folders[folder], data, None, task)
    assert type(network).__name__.startswith(expected)
    assert found.mask_token == "[MASK]"


@pytest.mark.parametrize(
    "data",
    [reviews(6), (torch.ones(4, 3).long(), torch.arange(4) % 2)],
    ids=["data set", "tuple"],
)
def test_a_causal_model_and_classes_are_ambiguous(folders: dict[str, Path], data: Any) -> None:
    calls = r"task='classification'\) for .*task='text-generation'\) for the text alone"
    with pytest.raises(ConfigError, match=calls):
        load_network(folders["causal"], data)


@pytest.mark.parametrize(
    ("data", "task"), [(questions(4), "multiple-choice"), (reviews(4), "fill-mask")]
)
def test_a_model_without_such_a_class_is_refused(
    folders: dict[str, Path], data: Any, task: str
) -> None:
    with pytest.raises(ConfigError, match=r"task needs an AutoModelFor.*has none.*choices="):
        load_network(folders["causal"], data, None, task)


@pytest.mark.parametrize("form", [lambda data: data, lambda data: Rows(list(data))])
def test_a_label_per_token_may_be_a_tag_or_a_word(folders: dict[str, Path], form: Any) -> None:
    with pytest.raises(ConfigError, match=r"task='fill-mask'.*task='token-classification'"):
        load_network(folders["masked"], form(token_labels()))
    with pytest.raises(ConfigError, match=r"label per token.*head is trained for another task"):
        load_network(folders["choice"], form(token_labels()))


def test_a_network_for_images_by_its_name(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = ViTConfig(**sizes, num_attention_heads=2, image_size=8, patch_size=4, num_labels=3)
    ViTForImageClassification(config).save_pretrained(tmp_path)
    pixels = torch.randn(6, 3, 8, 8)
    data = Rows([{"pixel_values": pixels[i], "labels": i % 3} for i in range(6)])
    posterior = pyrolora.fit(tmp_path, data, "map", epochs=1, adapter=pyrolora.AdapterConfig(r=1))
    assert type(posterior.base).__name__ == "ViTForImageClassification"
    assert posterior.predict(data, 0).probs.shape == (6, 3)


def test_sound_for_a_network_of_texts_is_told_to_pass_another(folders: dict[str, Path]) -> None:
    data = Rows([{"input_values": torch.ones(4), "labels": i % 2} for i in range(4)])
    with pytest.raises(ConfigError, match="pass the network itself"):
        load_network(folders["masked"], data)


@pytest.mark.parametrize(
    ("labels", "head"),
    [
        ({"labels": [1.0, 0.0, 1.0]}, "SequenceClassification"),
        ({"start_positions": 1, "end_positions": 2}, "QuestionAnswering"),
    ],
)
def test_several_labels_and_places_of_answers_have_their_heads(
    folders: dict[str, Path], labels: Any, head: str
) -> None:
    rows = [{"input_ids": [4, 5, 6, 7], **labels}] * 4
    for data in (rows, Rows(rows)):
        assert type(load_network(folders["masked"], data)[0]).__name__ == f"BertFor{head}"


def test_numbers_beside_texts_that_are_learnt_alone_may_be_labels(folders: dict[str, Path]) -> None:
    rows = [{"text": "the film is good", "sentiment": 1, "idx": 3}] * 4
    with pytest.warns(
        UserWarning, match=r"task='fill-mask'\), without \['sentiment'\]; .*rename_c"
    ):
        assert type(load_network(folders["masked"], rows)[0]).__name__ == "BertForMaskedLM"


def test_texts_for_a_network_of_pictures_are_told(tmp_path: Path) -> None:
    config = ViTConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, image_size=8)
    config.save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"reads pixel_values.*\['labels', 'text'\].*'image'"):
        load_network(tmp_path, reviews(4))
