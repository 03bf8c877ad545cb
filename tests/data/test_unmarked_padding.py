"""Padding that no mask marks, masks of completions, and packed rows."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
from problems import Rows, bert, gpt2, llama, tokenizer
from torch.utils.data import TensorDataset

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.columns import PLACES
from pyrolora.data import prepare
from pyrolora.data.padding import Padding
from pyrolora.errors import DataError
from pyrolora.tasks import CausalLM, Classification

ROWS = [[5, 6, 7, 8, 9, 10], [5, 6, 7], [8, 9, 10, 11], [9, 5]]
LABELS = [0, 1, 1, 0]


def filled(side: str = "right", pad: int = 0) -> torch.Tensor:
    tensors = [torch.tensor(row) for row in ROWS]
    return torch.nn.utils.rnn.pad_sequence(tensors, True, pad, padding_side=side)


FORMS: dict[str, Any] = {
    "tuple": lambda x, y: (x, y),
    "tensor data set": TensorDataset,
    "list": lambda x, y: [
        {"input_ids": a.tolist(), "labels": b.tolist()} for a, b in zip(x, y, strict=True)
    ],
    "torch data set": lambda x, y: Rows(
        [{"input_ids": a, "labels": b} for a, b in zip(x, y, strict=True)]
    ),
    "data set": lambda x, y: datasets.Dataset.from_dict(
        {"input_ids": x.tolist(), "labels": y.tolist()}
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_classifier_does_not_look_at_padding(form: str, side: str) -> None:
    x, y = filled(side), torch.tensor(LABELS)
    (batch,) = prepare(FORMS[form](x, y), bert(), Classification()).loader(4)
    assert batch["attention_mask"].tolist() == x.ne(0).long().tolist()
    assert batch["labels"].tolist() == LABELS


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_language_model_neither_learns_nor_scores_padding(
    form: str, labelled: bool, side: str
) -> None:
    x = filled(side)
    data = FORMS[form](x, x) if labelled else (x,)
    prepared = prepare(data, llama(), CausalLM())
    (batch,) = prepared.loader(4)
    assert batch["attention_mask"].tolist() == x.ne(0).long().tolist()
    expected = x.masked_fill(x.eq(0), -100)
    if side == "right" or labelled:
        assert batch["labels"].tolist() == expected.tolist()
    assert prepared.labels is not None
    assert (prepared.labels == batch["labels"]).all()


def test_scores_of_a_padded_tensor_are_those_of_its_rows() -> None:
    data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ROWS]
    options = {"tokenizer": tokenizer(), "epochs": 1, "adapter": AdapterConfig(r=1)}
    posterior = pyrolora.fit(llama(initializer_range=0.3), data, "map", **options)
    found, expected = posterior.predict((filled(),), 0), posterior.predict(data, 0)
    assert found.num_tokens.tolist() == [5, 2, 3, 1]
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood)
    assert posterior.evaluate((filled(),), 0)["nll"] == pytest.approx(
        posterior.evaluate(data, 0)["nll"]
    )


def test_where_a_mask_is_given_nothing_changes() -> None:
    x = filled()
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * 6} for row in x]
    (batch,) = prepare(rows, llama(), CausalLM()).loader(4)
    assert batch["attention_mask"].all()
    assert torch.equal(batch["labels"], x)
    masks = x.ne(0).long().tolist()
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": ids}
        for ids, mask in zip(x.tolist(), masks, strict=True)
    ]
    (batch,) = prepare(rows, llama(), CausalLM()).loader(4)
    assert batch["attention_mask"].tolist() == masks
    assert torch.equal(batch["labels"], x)


@pytest.mark.parametrize("config", [{"pad_token_id": 2}, {"pad_token_id": None}])
def test_a_run_of_ends_may_be_padding_or_not(config: dict[str, Any]) -> None:
    x = filled(pad=2)  # LLaMA's end of text
    with pytest.raises(DataError, match=r"3 times the token 2.*padding.*or text.*attention_mask"):
        prepare((x[:2],), llama(**config), CausalLM())
    once = torch.cat([x[:1], torch.full((1, 1), 2)], 1)
    (batch,) = prepare((once,), llama(**config), CausalLM()).loader(1)
    assert batch["labels"].tolist() == once.tolist()


def test_padding_alone_is_no_example() -> None:
    with pytest.raises(DataError, match="padding alone"):
        prepare((torch.zeros(2, 4).long(), torch.tensor([0, 1])), bert(), Classification())


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([5, 0, 6], None),
        ([0, 5, 0, 0], [0, 1, 0, 0]),
        ([5, 6, 0], [1, 1, 0]),
        ([9, 5, 9], None),
        ([0, 5, 9], [0, 1, 1]),
    ],
)
def test_masks_by_hand(ids: list[int], expected: list[int] | None) -> None:
    assert Padding(frozenset([0]), frozenset([9])).mask(ids) == expected


# Masks of what counts -------------------------------------------------------------------------

MASKS = ["completion_mask", "assistant_masks", "assistant_tokens_mask"]


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("form", [list, Rows, datasets.Dataset.from_list])
def test_tokens_outside_of_the_mask_do_not_count(name: str, form: Any) -> None:
    rows = [{"input_ids": row, name: [0] + [1] * (len(row) - 1)} for row in ROWS[:3]]
    rows[0][name] = [0, 0, 0, 0, 1, 1]
    prepared = prepare(form(rows), llama(), CausalLM(), tokenizer())
    assert prepared.labels is not None
    assert prepared.labels.ne(-100).sum(1).tolist() == [2, 2, 3]
    posterior = pyrolora.fit(
        llama(), form(rows), "map", tokenizer=tokenizer(), epochs=1, adapter=AdapterConfig(r=1)
    )
    assert posterior.predict(form(rows), 0).num_tokens.tolist() == [2, 2, 3]


def test_masks_and_labels_have_to_agree() -> None:
    row = {"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]}
    good = {**row, "labels": [-100, -100, 7], "assistant_masks": [0, 0, 1]}
    (batch,) = prepare([good], llama(), CausalLM()).loader(1)
    assert batch["labels"].tolist() == [[-100, -100, 7]]
    assert {"input_ids", "labels"} <= set(batch) <= {"input_ids", "labels", PLACES}
    for wrong, words in (
        ({"labels": [-100, 6, 7]}, "'labels' and the mask"),
        ({"labels": [-100, -100, -100]}, "'labels' and the mask"),
        (
            {"assistant_masks": [0, 1, 1], "assistant_tokens_mask": [0, 0, 1]},
            "different things",
        ),
        ({"assistant_masks": [0, 1]}, "a number per token, 3"),
    ):
        with pytest.raises(DataError, match=words):
            prepare([{**row, **wrong}], llama(), CausalLM())


# Packed rows ----------------------------------------------------------------------------------

PACKED = [
    {"input_ids": [5, 6, 7, 8, 9], "position_ids": [0, 1, 0, 1, 2]},
    {"input_ids": [5, 6, 7], "position_ids": [0, 1, 2]},
]


@pytest.mark.parametrize("form", [list, Rows])
def test_packed_texts_score_what_they_score_alone(form: Any) -> None:
    network = llama(initializer_range=0.3)
    options = {"tokenizer": tokenizer(), "epochs": 1, "adapter": AdapterConfig(r=1)}
    posterior = pyrolora.fit(network, form(PACKED), "map", **options)
    alone = [{"input_ids": row} for row in ([5, 6], [7, 8, 9], [5, 6, 7])]
    one, two, three = posterior.predict(alone, 0).log_likelihood[0]
    for batch_size in (1, 2):
        found = posterior.predict(form(PACKED), 0, batch_size=batch_size)
        assert found.num_tokens.tolist() == [3, 2]
        torch.testing.assert_close(found.log_likelihood[0], torch.stack([one + two, three]))


def test_positions_are_padded_with_their_rows() -> None:
    rows = [{"input_ids": [5] * n, "position_ids": [*range(n)], "labels": 0} for n in (3, 5)]
    (batch,) = prepare(rows, bert(), Classification(), tokenizer()).loader(2)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 5]


def test_packed_texts_under_a_mask_would_see_each_other() -> None:
    rows = [{**PACKED[0], "attention_mask": [1] * 5}]
    with pytest.raises(DataError, match=r"packs several texts.*leave attention_mask out"):
        prepare(rows, gpt2(), CausalLM(), tokenizer())
