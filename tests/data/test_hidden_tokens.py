"""Texts without labels for a masked language model: some of their tokens are hidden, once."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest
import torch
from problems import WORDS, Rows, bert_mlm, mask_tokenizer, reviews, tokenizer
from torch import Tensor

from pyrolora.data import Prepared, prepare
from pyrolora.errors import DataError
from pyrolora.tasks import MaskedLM

# The texts here are classified elsewhere.
pytestmark = pytest.mark.filterwarnings(r"ignore:the columns \['label'\] are not read")

MASK = len(WORDS)
NETWORK = bert_mlm()


def prepared(data: Any, tokens: Any = True, **options: Any) -> Prepared:
    made = mask_tokenizer() if tokens is True else tokens
    return prepare(data, NETWORK, MaskedLM(), made, **options)


def batch_of_all(data: Any, **options: Any) -> dict[str, Tensor]:
    made = prepared(data, **options)
    (batch,) = made.loader(len(made))
    return dict(batch)


def originals(texts: Any) -> Tensor:
    return mask_tokenizer()(list(texts), padding=True, return_tensors="pt")["input_ids"]


def long_texts(n: int = 60, length: int = 20) -> list[str]:
    ids = torch.randint(4, len(WORDS), (n, length), generator=torch.Generator().manual_seed(1))
    return [" ".join(WORDS[int(i)] for i in row) for row in ids]


def test_labels_are_the_tokens_that_were_hidden() -> None:
    texts = long_texts()
    batch, ids = batch_of_all(texts), originals(texts)
    hidden = batch["labels"].ne(-100)
    assert torch.equal(batch["labels"][hidden], ids[hidden])
    assert torch.equal(batch["input_ids"][~hidden], ids[~hidden])
    assert hidden.any(1).all()
    assert not (hidden & (ids < 4)).any()  # [CLS], [SEP] and padding
    # Of 1200 words 15 % are hidden and 80 % of these masked, each within four standard deviations.
    assert abs(hidden.sum() / 1200 - 0.15) < 4 * (0.15 * 0.85 / 1200) ** 0.5
    masked = batch["input_ids"][hidden] == MASK
    assert abs(masked.float().mean() - 0.8) < 4 * (0.16 / hidden.sum()) ** 0.5
    assert (batch["input_ids"] == MASK).sum() == masked.sum()


def test_every_text_hides_a_token_however_short() -> None:
    texts = ["good", "bad film"] * 10
    assert batch_of_all(texts)["labels"].ne(-100).any(1).all()


def test_the_same_texts_hide_the_same_tokens_and_random_numbers_stay() -> None:
    texts = long_texts(8)
    torch.manual_seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = batch_of_all(texts)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    torch.manual_seed(4)
    again = batch_of_all(texts)
    assert all(torch.equal(first[name], again[name]) for name in first)
    made = prepared(texts)
    for epoch in range(2):
        (batch,) = made.loader(8)
        assert torch.equal(batch["input_ids"], first["input_ids"]), epoch


FORMS = {
    "list of texts": lambda raw: list(raw["text"]),
    "data set": lambda raw: raw.remove_columns("label"),
    "data set with classes": lambda raw: raw,
    "tokens": lambda raw: [dict(mask_tokenizer()(text)) for text in raw["text"]],
    "torch data set of tokens": lambda raw: Rows(
        [dict(mask_tokenizer()(text)) for text in raw["text"]]
    ),
    "padded tokens": lambda raw: datasets.Dataset.from_dict(
        dict(mask_tokenizer()(list(raw["text"]), padding=True))
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_hides_tokens_but_no_padding(form: str) -> None:
    raw = reviews(12)
    batch, ids = batch_of_all(FORMS[form](raw)), originals(raw["text"])
    hidden = batch["labels"].ne(-100)
    assert hidden.any(1).all()
    assert torch.equal(torch.where(hidden, batch["labels"], batch["input_ids"]), ids)
    assert not (hidden & ~batch["attention_mask"].bool()).any()


def test_padding_with_a_word_of_the_user_is_not_hidden() -> None:
    rows = [{"input_ids": [4, 5, 6, 6], "attention_mask": [1, 1, 0, 0]}] * 30
    assert (batch_of_all(rows)["labels"][:, 2:] == -100).all()


def test_a_tensor_of_token_ids_is_hidden_too() -> None:
    ids = torch.randint(4, 16, (5, 6))
    batch = batch_of_all((ids,))
    hidden = batch["labels"].ne(-100)
    assert torch.equal(torch.where(hidden, batch["labels"], batch["input_ids"]), ids)


def test_labels_of_the_user_are_taken_as_they_are() -> None:
    rows = [
        {"input_ids": [2, MASK, 5, 3], "labels": [-100, 4, -100, -100]},
        {"input_ids": [2, 6, MASK, 5, 3], "labels": [-100, -100, 7, 5, -100]},
    ]
    batch = batch_of_all(rows)
    assert batch["input_ids"].tolist() == [[2, MASK, 5, 3, 0], [2, 6, MASK, 5, 3]]
    assert batch["labels"].tolist() == [[-100, 4, -100, -100, -100], [-100, -100, 7, 5, -100]]


@pytest.mark.parametrize(
    ("data", "tokens", "words"),
    [
        (["good"], tokenizer(), "a mask token, got .*TokenizersBackend; pass tokenizer="),
        ([{"input_ids": [4, 5]}], None, "a mask token, got none; pass tokenizer="),
        (["good", ""], True, "example 1 has no token that could be hidden"),
        (([[4, 5]], [1]), True, "one token id per position"),
    ],
)
def test_texts_that_cannot_be_hidden_are_refused(data: Any, tokens: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        prepared(data, tokens)
