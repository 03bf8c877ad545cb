"""Data without labels, in every form that data comes in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import Rows as Listed
from problems import bert, llama, mlp, reviews, tokenizer

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.data import prepare
from pyrolora.data.examples import without_labels
from pyrolora.errors import DataError
from pyrolora.tasks import Classification

TEXT = "the film is good"


class Rows(torch.utils.data.Dataset):
    """Rows that are made on access."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": torch.tensor([2, 3]), "labels": 9}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (reviews(3), reviews(3).select_columns("text").to_list()),
        ([{"text": TEXT, "labels": "other"}], [{"text": TEXT}]),
        (([TEXT], [7]), [{"text": TEXT}]),
        (Rows(), [{"input_ids": [2, 3]}]),
    ],
)
def test_labels_are_left_out(data: Any, expected: list[dict[str, Any]]) -> None:
    assert list(without_labels(data, "input_ids", ("test",))) == expected


def test_tensors_are_inputs_alone() -> None:
    (inputs,) = without_labels((torch.ones(3, 4), torch.zeros(3)), "inputs", ("test",))
    assert torch.equal(inputs, torch.ones(3, 4))


HALF = [{"text": "the film is good", "label": None}, {"text": "the book is dull", "label": 1}]


@pytest.mark.parametrize("rows", [HALF, HALF[::-1], [{**row, "label": -1} for row in HALF]])
def test_predictions_do_without_labels_that_are_not_all_there(rows: list[Any]) -> None:
    posterior = pyrolora.fit(
        bert(), reviews(8), "map", tokenizer=tokenizer(), epochs=1, adapter=AdapterConfig(r=1)
    )
    found = posterior.predict(rows, 0)
    assert found.targets is None
    texts = [row["text"] for row in rows]
    torch.testing.assert_close(found.probs, posterior.predict(texts, 0).probs)
    message = "must be >= 0, got -1" if rows[0]["label"] == -1 else "1 examples have no label, the"
    with pytest.raises(DataError, match=message):
        posterior.evaluate(rows, 0)


def test_labels_made_on_access_are_left_out_where_some_are_missing() -> None:
    x = torch.randn(6, 4)
    posterior = pyrolora.fit(
        mlp(), (x, torch.arange(6) % 3), "map", task="classification", epochs=1,
        adapter=AdapterConfig(r=1),
    )  # fmt: skip
    expected = posterior.predict((x,), 0).probs
    for labels in ([0, None, 1, None, 2, 1], [None, 0, 1, 2, 0, 1], [-1] * 6):
        rows = Listed([(x[i], labels[i]) for i in range(6)])
        found = posterior.predict(rows, 0, batch_size=4)
        assert found.targets is None
        torch.testing.assert_close(found.probs, expected)
    data = reviews(6).map(lambda row: {"label": -1})
    network = pyrolora.fit(
        bert(), reviews(8), "map", tokenizer=tokenizer(), epochs=1, adapter=AdapterConfig(r=1)
    )
    lazy = data.with_transform(
        lambda rows: {**tokenizer()(rows["text"], padding=True), "labels": rows["label"]}
    )
    for rows in (data, lazy):
        assert network.predict(rows, 0).targets is None


def language_model() -> pyrolora.Posterior:
    return pyrolora.fit(
        llama(),
        reviews(8).remove_columns("label"),
        "map",
        tokenizer=tokenizer(),
        epochs=1,
        adapter=AdapterConfig(r=1),
    )


def test_labels_that_say_which_tokens_count_are_all_there_or_none() -> None:
    posterior = language_model()
    ids = [2, 4, 5, 6, 3]
    rows = [{"input_ids": ids, "labels": [-100] * 4 + [3]}, {"input_ids": ids, "labels": None}]
    with pytest.raises(DataError, match="1 examples have no label, the first is example 1"):
        posterior.predict(rows, 0)


def test_choices_do_without_labels_that_are_not_all_there() -> None:
    posterior = language_model()
    rows = [{"question": "the film is", "choices": ["good", "dull"], "label": n} for n in (None, 1)]
    assert posterior.predict(rows, 0).targets is None
    with pytest.raises(DataError, match="1 examples have no label, the first is example 0"):
        posterior.evaluate(rows, 0)


def test_columns_that_hold_no_text_are_named() -> None:
    for value, words in (
        (None, "'text' has missing values"),
        (["good", "film"], "holds lists.*'tokens' and 'tags'"),
    ):
        with pytest.raises(DataError, match=words):
            prepare([{"text": value, "label": 1}] * 2, bert(), Classification(), tokenizer())
