"""Texts to tokens: one opening, one end, at least one token, at most what the network reads."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from problems import bert, gpt2, llama, tokenizer
from tokenizers import processors

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.data import prepare
from pyrolora.data.encoding import Encoder, added
from pyrolora.data.inputs import context_length
from pyrolora.errors import DataError
from pyrolora.predictive.generate import _as_ids
from pyrolora.tasks import CausalLM, Classification

EOS, BOS = 3, 2


def decoder_tokenizer(single: str = "[CLS] $A", **changes: Any) -> Any:
    """A tokenizer with BOS and EOS, which it puts where ``single`` says."""
    made = tokenizer()
    made.bos_token, made.eos_token = "[CLS]", "[SEP]"
    made.sep_token = made.cls_token = None
    made._tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} $B:1", special_tokens=[("[CLS]", BOS), ("[SEP]", EOS)]
    )
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def ids(text: str, single: str = "[CLS] $A", **changes: Any) -> list[int]:
    made = decoder_tokenizer(single, **changes)
    prepared = prepare([{"text": text}], llama(), CausalLM(), made)
    (batch,) = prepared.loader(1)
    assert batch["labels"].tolist() == batch["input_ids"].tolist()
    assert batch["attention_mask"].tolist() == [[1] * batch["input_ids"].shape[1]]
    return [*batch["input_ids"][0].tolist()]


@pytest.mark.parametrize("single", ["[CLS] $A", "$A", "[CLS] $A [SEP]", "$A [SEP]"])
@pytest.mark.parametrize("before", ["", "[CLS] "])
@pytest.mark.parametrize("after", ["", " [SEP]"])
def test_a_text_begins_once_and_ends_once(single: str, before: str, after: str) -> None:
    first = [BOS] if "CLS" in single + before else []
    assert ids(f"{before}good film{after}", single) == [*first, 4, 6, EOS]


def test_a_prompt_begins_once_and_goes_on() -> None:
    joint = pyrolora.fit(
        llama(), [{"text": "good film"}] * 2, "map", tokenizer=decoder_tokenizer(), epochs=1,
        adapter=AdapterConfig(r=1),
    ).model  # fmt: skip
    for single in ("[CLS] $A", "$A", "[CLS] $A [SEP]"):
        made = decoder_tokenizer(single)
        (found,) = _as_ids(["[CLS] good film"], made, joint)
        assert found.tolist() == [BOS, 4, 6]
        (found,) = _as_ids(["good [SEP]"], made, joint)  # of a dialogue
        assert found.tolist()[-2:] == [4, EOS]


def test_what_a_text_has_twice_by_itself_stays() -> None:
    assert ids("[CLS] [CLS] good", "$A") == [BOS, BOS, 4, EOS]
    assert ids("[CLS] [CLS] good") == [BOS, BOS, 4, EOS]


def test_classifiers_and_tokenizers_without_an_end_are_as_they_were() -> None:
    (batch,) = prepare(
        [{"text": "good film", "label": 1}], bert(), Classification(), decoder_tokenizer()
    ).loader(1)
    assert batch["input_ids"].tolist() == [[BOS, 4, 6]]
    (batch,) = prepare([{"text": "good film"}], llama(), CausalLM(), tokenizer()).loader(1)
    assert batch["input_ids"].tolist() == [[2, 4, 6, 3]]


def test_added_is_what_a_tokenizer_puts_around_a_text() -> None:
    assert added(decoder_tokenizer("[CLS] $A [SEP]")) == ([BOS], [EOS])
    assert added(decoder_tokenizer("$A")) == ([], [])


def test_scores_are_of_the_text_as_it_is() -> None:
    """EOS is added to what is learnt; in what is scored it counts where the user wrote it."""
    posterior = pyrolora.fit(
        llama(), [{"text": "good film"}] * 2, "map", tokenizer=decoder_tokenizer(), epochs=1,
        adapter=AdapterConfig(r=1),
    )  # fmt: skip
    found = posterior.predict(["good film", "good film [SEP]", "[CLS] good film"], 0)
    assert found.num_tokens.tolist() == [2, 3, 2]
    assert found.targets[1, -1] == EOS


@pytest.mark.parametrize(("words", "cut", "size"), [(4, 0, 6), (5, 0, 6), (6, 1, 6)])
def test_a_text_that_is_cut_is_counted_and_not_ended(words: int, cut: int, size: int) -> None:
    """Five words and BOS fill six places: there is no room for an end."""
    encoder = Encoder(decoder_tokenizer(), 6, ends=True)
    made = encoder(["good " * words, "bad"])
    assert [len(row) for row in made["input_ids"]] == [size, 3]
    assert made["cut"] == [bool(cut), False]
    assert (made["input_ids"][0][-1] == EOS) == (words < 5)


def test_the_configuration_says_how_much_is_read_where_no_table_does() -> None:
    network = torch.nn.Linear(1, 1)
    for config, expected in (
        (SimpleNamespace(max_position_embeddings=7), 7),
        (SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=5)), 5),
        (SimpleNamespace(max_position_embeddings=-1), math.inf),  # of XLNet
        (None, math.inf),
    ):
        network.config = config
        assert context_length(network) == expected


def test_longer_tokens_are_told_where_a_network_can_go_on() -> None:
    rows = [{"input_ids": [4] * n, "attention_mask": [1] * n} for n in (3, 9)]
    with pytest.warns(UserWarning, match=r"1 examples have more than 8 tokens.*was not made"):
        prepare(rows, llama(max_position_embeddings=8), CausalLM(), tokenizer())


# Without a token ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "  "])
@pytest.mark.parametrize(("network", "law"), [(llama, CausalLM()), (bert, Classification())])
def test_texts_without_a_token_are_numbered(text: str, network: Any, law: Any) -> None:
    rows = [{"text": value, "label": 1} for value in ("good film", text, "bad film", text)]
    with pytest.raises(DataError, match=r"2 examples have no token, such as example 1, 3; leave"):
        prepare(rows, network(), law, decoder_tokenizer("$A"))


def test_texts_with_nothing_to_predict_are_numbered() -> None:
    made = decoder_tokenizer("$A", eos_token=None)
    with pytest.raises(DataError, match=r"1 examples have no token to predict.*example 1"):
        prepare(["good film", "good"], gpt2(), CausalLM(), made)
    rows = datasets.Dataset.from_list([{"input_ids": [4, 5]}, {"input_ids": [4]}])
    with pytest.raises(DataError, match=r"1 examples have no token to predict.*example 1"):
        prepare(rows, gpt2(), CausalLM(), tokenizer())


def test_an_empty_row_of_tokens_is_told() -> None:
    rows = [{"input_ids": [4, 5], "labels": 0}, {"input_ids": [], "labels": 1}]
    with pytest.raises(DataError, match=r"has no token"):
        prepare(rows, bert(), Classification(), tokenizer())
