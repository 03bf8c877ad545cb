"""A report shows the text of an example, wherever that is in the data."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from problems import Rows, bert, bert_choice, mlp, questions, reviews, tokenizer, tokens
from torch import nn

from pyrolora.report.examples import LONGEST, Examples

TEXT = "the film was fine"
ROW = {"text": TEXT, "label": 1}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (datasets.Dataset.from_list([ROW]), TEXT),
        ([ROW], TEXT),
        ([TEXT], TEXT),
        (([TEXT], [1]), TEXT),
        (Rows([ROW]), TEXT),
        (datasets.DatasetDict({"test": datasets.Dataset.from_list([ROW])}), TEXT),
        ([{"premise": "a film", "hypothesis": "a book", "label": 0}], "a film | a book"),
        ([{"text": "a", "text_pair": "b"}], "a | b"),
        ([{"sentence": TEXT, "id": "x7", "label": 0}], TEXT),
        ([{"id": "x7", "body": TEXT, "input_ids": [2, 6, 3], "labels": 1}], TEXT),
        ([{"input_ids": [2, 4, 6, 3, 0], "labels": 1}], "good film"),
        (({"input_ids": torch.tensor([2, 4, 6])},), "good film"),
    ],
)
def test_the_text_of_an_example(data: Any, expected: str) -> None:
    if isinstance(data, tuple) and isinstance(data[0], dict):
        data = Rows(list(data))
    examples = Examples(data, bert(), tokenizer())
    assert len(examples) == 1
    assert examples.text(0) == expected


@pytest.mark.parametrize(
    ("data", "network"),
    [((torch.ones(3, 4), torch.ones(3)), mlp()), (torch.ones(3, 4), mlp()), (tokens(3), bert())],
)
def test_an_example_that_cannot_be_read_has_its_number(data: Any, network: nn.Module) -> None:
    assert Examples(data, network).text(2) == "example 2"


def test_a_long_text_is_cut() -> None:
    shown = Examples(["word " * 1000], bert()).text(0)
    assert len(shown) <= LONGEST + 1
    assert shown.endswith("word…")


def test_classes_have_the_networks_names() -> None:
    named = bert(id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    assert Examples(reviews(2), named).label(0, 1) == "good"
    assert Examples(reviews(2), bert()).label(0, 1) == "1", "LABEL_1 says no more"
    assert Examples((torch.ones(2, 4),), mlp()).label(0, 2) == "2"


def test_choices_are_those_of_the_example() -> None:
    data = questions(6)
    examples = Examples(data, bert_choice(), tokenizer())
    for i, row in enumerate(data):
        assert examples.choices(i) == row["choices"]
        assert examples.text(i) == row["question"], "the choices are not the question"
        assert examples.label(i, row["label"]) == f"{row['label']}: {row['choices'][row['label']]}"
    assert examples.label(0, 9) == "9", "of another example, which has more choices"


def test_choices_are_read_from_tokens() -> None:
    data = [{"input_ids": [[2, 4, 3], [2, 5, 3]], "label": 0}]
    examples = Examples(data, bert_choice(), tokenizer())
    assert examples.choices(0) == ["good", "bad"]
    assert examples.text(0) == "example 0"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (["a film", "a very dull film"], ("words", [2, 4])),
        (tokens(2, length=8), ("tokens", [8, 8])),
        ([{"input_ids": [[2, 4, 3], [2, 5]], "label": 0}], ("tokens", [5])),
        ((torch.ones(2, 4, 3), torch.ones(2)), ("numbers", [12, 12])),
    ],
)
def test_lengths(data: Any, expected: tuple[str, list[int]]) -> None:
    network = mlp() if isinstance(data, tuple) else bert()
    assert Examples(data, network).lengths() == expected


def test_one_example_is_data_again() -> None:
    alone = Examples(reviews(5), bert()).only(3)
    assert alone.to_list() == [reviews(5)[3]]
    (row,) = Examples(Rows([{"input_ids": torch.tensor([2, 3])}]), bert()).only(0)
    assert row == {"input_ids": [2, 3]}
