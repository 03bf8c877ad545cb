"""A model that is given by its folder is loaded as what data and likelihood call for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from console import saved
from problems import Rows, bert_choice, bert_mlm, llama, mask_tokenizer, questions, reviews, tokens

from pyrolora.errors import ConfigError
from pyrolora.inference import load_network


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
    ("folder", "data", "likelihood", "expected"),
    [
        ("masked", questions(4), None, "BertForMultipleChoice"),
        ("masked", nested(), None, "BertForMultipleChoice"),
        ("choice", questions(4), "multiple_choice", "BertForMultipleChoice"),
        ("choice", nested(), None, "BertForMultipleChoice"),
        ("masked", reviews(6), None, "BertForSequenceClassification"),
        ("masked", (torch.ones(4, 3).long(), torch.arange(4) % 2), None, "BertForSequenceClass"),
        ("masked", Rows(list(tokens(4))), None, "BertForSequenceClassification"),
        ("masked", reviews(6), "masked_lm", "BertForMaskedLM"),
        ("masked", reviews(6).remove_columns("label"), None, "BertForMaskedLM"),
        ("masked", ["good", "bad"], None, "BertForMaskedLM"),
        ("masked", token_labels(), None, "BertForMaskedLM"),
        ("masked", (torch.ones(4, 3).long(),), None, "BertForMaskedLM"),
        ("causal", reviews(6), "causal_lm", "LlamaForCausalLM"),
        ("causal", reviews(6).remove_columns("label"), None, "LlamaForCausalLM"),
    ],
)
def test_the_class_follows_from_data_and_likelihood(
    folders: dict[str, Path], folder: str, data: Any, likelihood: str | None, expected: str
) -> None:
    network, found = load_network(folders[folder], data, None, likelihood)
    assert type(network).__name__.startswith(expected)
    assert found.mask_token == "[MASK]"


@pytest.mark.parametrize(
    "data",
    [reviews(6), (torch.ones(4, 3).long(), torch.arange(4) % 2)],
    ids=["data set", "tuple"],
)
def test_a_causal_model_and_classes_are_ambiguous(folders: dict[str, Path], data: Any) -> None:
    with pytest.raises(ConfigError, match="is a language model and the data has labels"):
        load_network(folders["causal"], data)


@pytest.mark.parametrize(("data", "likelihood"), [(questions(4), None), (reviews(4), "masked_lm")])
def test_a_model_without_such_a_class_is_refused(
    folders: dict[str, Path], data: Any, likelihood: str | None
) -> None:
    with pytest.raises(ConfigError, match=r"cannot load.*LlamaConfig.*AutoModelFor"):
        load_network(folders["causal"], data, None, likelihood)
