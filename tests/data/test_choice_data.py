"""Questions with choices become batches (b, choices, T) with a mask of the choices that exist."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from problems import Rows, bert, bert_choice, questions, tokenizer
from torch import Tensor

from pyrolora.columns import CHOICE_MASK
from pyrolora.data import Prepared, prepare
from pyrolora.errors import DataError
from pyrolora.tasks import Classification, MultipleChoice

RAGGED = [
    {"question": "the film", "choices": ["good", "very bad"], "label": 0},
    {"question": "was", "choices": ["fine book", "dull", "not a book", "bad"], "label": 3},
]


def prepared(data: Any, tokens: Any = True, **options: Any) -> Prepared:
    made = tokenizer() if tokens is True else tokens
    return prepare(data, bert_choice(), MultipleChoice(), made, **options)


def batch_of_all(data: Any, **options: Any) -> dict[str, Tensor]:
    made = prepared(data, **options)
    (batch,) = made.loader(len(made))
    return dict(batch)


def tokenised(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By hand: each choice after its question."""
    return [
        {
            **tokenizer()([row["question"]] * len(row["choices"]), row["choices"]),
            "labels": row["label"],
        }
        for row in rows
    ]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_each_choice_stands_after_its_question() -> None:
    batch = batch_of_all(RAGGED)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 4, 7)
    assert batch[CHOICE_MASK].tolist() == [[True, True, False, False], [True] * 4]
    assert batch["labels"].tolist() == [0, 3]
    for i, row in enumerate(RAGGED):
        for j, choice in enumerate(row["choices"]):
            kept = batch["attention_mask"][i, j].bool()
            expected = tokenizer()(row["question"], choice)["input_ids"]
            assert batch["input_ids"][i, j][kept].tolist() == expected


def test_choices_that_do_not_exist_attend_to_something() -> None:
    batch = batch_of_all(RAGGED)
    assert batch["attention_mask"].sum(-1).min() > 0


def test_padding_is_to_the_most_choices_of_a_batch_only() -> None:
    data = questions(30)
    made = prepared(data)
    for i, batch in enumerate(made.loader(5)):
        sizes = [len(row["choices"]) for row in data.select(range(5 * i, 5 * i + 5))]
        assert batch[CHOICE_MASK].sum(-1).tolist() == sizes
        assert batch["input_ids"].shape[1] == max(sizes)


FORMS = {
    "data set": datasets.Dataset.from_list,
    "labels": lambda rows: datasets.Dataset.from_list(rows).rename_column("label", "labels"),
    "dictionary of splits": lambda rows: datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(rows)}
    ),
    "text in place of question": lambda rows: datasets.Dataset.from_list(rows).rename_column(
        "question", "text"
    ),
    "unknown name of the only text": lambda rows: datasets.Dataset.from_list(rows).rename_column(
        "question", "stem"
    ),
    "more columns": lambda rows: [
        {**row, "id": "x", "answerKey": "A", "row_id": len(row["choices"])} for row in rows
    ],
    "ARC": lambda rows: [
        {
            "question": row["question"],
            "choices": {"text": row["choices"], "label": list("ABCDE")[: len(row["choices"])]},
            "label": "ABCDE"[row["label"]],
        }
        for row in rows
    ],
    "ARC with numbers": lambda rows: [
        {**row, "choices": {"text": row["choices"]}, "label": row["label"]} for row in rows
    ],
    "tokens": tokenised,
    "data set of tokens": lambda rows: datasets.Dataset.from_list(tokenised(rows)),
    "tokens in torch format": lambda rows: datasets.Dataset.from_list(tokenised(rows)).with_format(
        "torch"
    ),
    "torch data set of tokens": lambda rows: Rows(tokenised(rows)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_makes_the_same_batch(form: str) -> None:
    assert_same(batch_of_all(FORMS[form](RAGGED)), batch_of_all(RAGGED))


def test_a_context_stands_before_the_question() -> None:
    rows = [{**row, "context": "a good book"} for row in RAGGED]
    joined = [{**row, "question": f"a good book {row['question']}"} for row in RAGGED]
    assert_same(batch_of_all(rows), batch_of_all(joined))


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(lambda ids, labels: (ids, labels), id="tuple"),
        pytest.param(
            lambda ids, labels: [
                {"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)
            ],
            id="list of dicts",
        ),
        pytest.param(
            lambda ids, labels: Rows(
                [{"input_ids": a, "label": b} for a, b in zip(ids, labels, strict=True)]
            ),
            id="torch data set",
        ),
    ],
)
def test_tensors_need_no_tokenizer(form: Any) -> None:
    ids, labels = torch.randint(4, 16, (6, 3, 5)), torch.arange(6) % 3
    batch = batch_of_all(form(ids, labels), tokens=None)
    mask = torch.ones(6, 3, dtype=torch.bool)
    assert_same(batch, {"input_ids": ids, CHOICE_MASK: mask, "labels": labels})


def test_ragged_choices_of_one_length_need_no_tokenizer() -> None:
    ids = torch.randint(4, 16, (5, 4))
    rows = Rows([{"input_ids": ids[:2], "labels": 1}, {"input_ids": ids[2:], "labels": 2}])
    batch = batch_of_all(rows, tokens=None)
    assert batch["input_ids"].shape == (2, 3, 4)
    assert batch[CHOICE_MASK].tolist() == [[True, True, False], [True] * 3]


def test_a_mask_of_the_user_is_kept() -> None:
    """Data padded by the user, with a choice in the middle left out."""
    rows = tokenised(RAGGED)
    for row, mask in zip(rows, ([True, True], [True, False, True, True]), strict=True):
        row[CHOICE_MASK] = mask
    rows[1]["attention_mask"][1] = [0] * len(rows[1]["attention_mask"][1])
    batch = batch_of_all(rows)
    assert batch[CHOICE_MASK].tolist() == [[True, True, False, False], [True, False, True, True]]
    assert batch["attention_mask"].sum(-1).min() > 0
    rows[1]["labels"] = 1
    with pytest.raises(DataError, match=r"label of example 1 is 1.*\[0, 2, 3\]"):
        prepared(rows)


def test_labels_are_not_needed_for_prediction() -> None:
    rows = [{k: v for k, v in row.items() if k != "label"} for row in RAGGED]
    batch = batch_of_all(rows, need_labels=False)
    expected = batch_of_all(RAGGED)
    del expected["labels"]
    assert_same(batch, expected)
    with pytest.raises(DataError, match="no labels"):
        prepared(rows)


def changed(**values: Any) -> list[dict[str, Any]]:
    return [RAGGED[1], {**RAGGED[0], **values}]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (changed(label=2), r"label of example 1 is 2.*\[0, 1\].*from 0"),
        (changed(label=-1), "labels must be >= 0, got -1"),
        (changed(choices=[]), r"at least one text per example.*got \[\]"),
        (changed(choices=["good", None]), r"list of at least one text.*None"),
        (changed(question=None), "'question' has missing values"),
        ([{"text": "good", "label": 0}], r"a column 'choices'.*\['text', 'labels'\]"),
        (
            [{"a": "good", "b": "bad", "choices": ["film", "book"], "label": 0}],
            r"one of context.*question.*got \['a', 'b'\].*rename",
        ),
        ([{**RAGGED[0], "label": "D"}], r"label 'D' is none of.*called \['A', 'B'\].*number"),
        ([{**RAGGED[0], "choices": ["B", "A"], "label": "A"}], r"label 'A' is several, \[0, 1\]"),
        (
            [{**RAGGED[0], "choices": {"text": ["a", "the"], "label": ["A", "B"]}, "label": "C"}],
            r"label 'C' is none.*\['A', 'B'\]",
        ),
        ([{"input_ids": [4, 5, 6], "labels": 0}], r"\(choices, T\).*'input_ids': 0"),
        (
            [{"input_ids": [[4, 5], [6]], "attention_mask": [[1, 1]], "labels": 0}],
            r"'input_ids': 2, 'attention_mask': 1",
        ),
        (
            [{"input_ids": [[4], [6]], CHOICE_MASK: [False, False], "labels": 0}],
            "a choice to choose",
        ),
    ],
)
def test_data_that_cannot_be_used_is_refused(data: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        prepared(data)


def test_raw_text_needs_a_tokenizer() -> None:
    with pytest.raises(DataError, match=r"raw text \(question\) and there is no tokenizer"):
        prepared(RAGGED, tokens=None)


def test_a_plain_classifier_does_not_overlook_choices() -> None:
    with pytest.raises(DataError, match=r"'choices'.*AutoModelForMultipleChoice.*remove_columns"):
        prepare(datasets.Dataset.from_list(RAGGED), bert(), Classification(), tokenizer())
