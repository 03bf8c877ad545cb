"""Data without labels, in every form that data comes in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import reviews

from pyrolora.inference.examples import without_labels

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
