"""Columns are read, or named: as input, as a label, as names of rows, or as what is not read."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from problems import (
    Rows,
    bert,
    bert_choice,
    bert_mlm,
    llama,
    mask_tokenizer,
    reviews,
    tokenizer,
    tokens,
)

from pyrolora import fit
from pyrolora.data import Prepared, prepare
from pyrolora.data.columns import text_columns
from pyrolora.errors import DataError
from pyrolora.tasks import CausalLM, Classification, MaskedLM, MultipleChoice


def rows(**columns: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict({name: [value] * 3 for name, value in columns.items()})


def classified(data: Any) -> Prepared:
    return prepare(data, bert(), Classification(), tokenizer())


def modelled(data: Any) -> Prepared:
    return prepare(data, llama(), CausalLM(), tokenizer())


# Text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("question", "passage"),
        ("question", "context"),
        ("question", "answer"),
        ("query", "passage"),
        ("query", "document"),
        ("sentence_A", "sentence_B"),
    ],
)
def test_well_known_pairs_are_read_in_their_order(names: tuple[str, str]) -> None:
    data = rows(**{names[1]: "the book", "idx": 1, names[0]: "a good film", "label": 0})
    (batch,) = classified(data).loader(3)
    expected = tokenizer()("a good film", "the book")["input_ids"]
    assert batch["input_ids"][0].tolist() == expected


@pytest.mark.parametrize(
    "names",
    [
        ("premise", "choice1", "choice2", "question"),
        ("text", "target"),
        ("sentence", "aspect"),
        ("text", "text_b"),
        ("text", "title"),
        ("question", "passage", "answer"),
    ],
    ids="+".join,
)
def test_text_that_is_left_over_is_an_error_that_lists_the_readings(names: tuple[str, ...]) -> None:
    data = rows(**dict.fromkeys(names, "good"), label=0)
    with pytest.raises(DataError, match=r"one alone .*as a pair.*joined.*remove_columns") as caught:
        classified(data)
    assert all(repr(name) in str(caught.value) for name in names)
    chosen = data.rename_column(names[0], "x").select_columns(["x", "label"])
    assert len(classified(chosen)) == 3


@pytest.mark.parametrize(
    "name",
    [
        *("id", "idx", "guid", "uid", "pair_id", "label_text", "answerKey", "pairID", "id1"),
        *("Unnamed: 0", "__index_level_0__", "questionId", ""),
    ],
)
@pytest.mark.parametrize("value", ["x1", 7])
def test_names_of_rows_are_no_input(name: str, value: Any) -> None:
    assert text_columns(rows(text="good", **{name: value})) == ("text",)
    found = classified(rows(text="good", label=1, **{name: value})).examples
    assert "input_ids" in found.column_names
    assert name not in found.column_names


def test_columns_of_other_kinds_are_named_once() -> None:
    data = rows(text="good", label=1, score=0.5, tags=["a", "b"], idx=3)
    with pytest.warns(UserWarning, match=r"columns \['score', 'tags'\] are not read: Bert") as told:
        classified(data)
    assert len(told) == 1


@pytest.mark.parametrize("form", [lambda d: d, list, lambda d: Rows(list(d))])
def test_columns_beside_tokens_are_named(form: Any) -> None:
    data = tokens(4).add_column("tags", [[0] * 8] * 4).add_column("idx", [1] * 4)
    with pytest.warns(UserWarning, match=r"\['tags'\] are not read"):
        prepare(form(data), bert(), Classification())


@pytest.mark.parametrize("form", [lambda d: d, list, lambda d: Rows(list(d))])
def test_what_a_tokenizer_says_of_its_tokens_is_left_out(form: Any) -> None:
    data = tokens(4).add_column("special_tokens_mask", [[0] * 8] * 4)
    assert len(prepare(form(data), bert(), Classification())) == 4


def test_columns_that_a_format_leaves_out_are_not_named() -> None:
    data = tokens(4).add_column("score", [0.5] * 4)
    data.set_format("torch", columns=["input_ids", "labels"])
    assert len(prepare(data, bert(), Classification())) == 4


@pytest.mark.parametrize("name", ["url", "timestamp", "genre", "fine_label"])
def test_where_a_text_comes_from_is_no_input(name: str) -> None:
    assert text_columns(rows(**{name: "x", "sentence2": "b", "sentence1": "a"})) == (
        "sentence1",
        "sentence2",
    )
    assert text_columns(rows(**{name: "x"})) == (name,)
    with pytest.warns(UserWarning, match=rf"\['{name}'\] are not read"):
        modelled(rows(text="the film is good", **{name: "x"}))


def test_a_source_is_a_text_unless_it_is_a_code() -> None:
    data = rows(sentence="the film is good", source="gj04")
    assert text_columns(data) == ("sentence",)
    with pytest.raises(DataError, match="cannot tell which of the text columns"):
        text_columns(rows(text="the film is good", source="the film was good"))


@pytest.mark.parametrize("name", ["label_ids", "lm_labels", "target_ids"])
@pytest.mark.parametrize("form", [lambda d: d, lambda d: Rows(list(d))])
def test_labels_of_tokens_under_another_name_are_refused(name: str, form: Any) -> None:
    with pytest.raises(DataError, match=rf"rename_column\('{name}', 'labels'\)"):
        modelled(form(rows(input_ids=[4, 5, 6], **{name: [-100, 5, 6]})))


@pytest.mark.parametrize(
    "name", ["loss_mask", "weights", "sample_weight", "response_mask", "label_mask", "loss_weights"]
)
@pytest.mark.parametrize("form", [lambda d: d, lambda d: Rows(list(d))])
def test_weights_are_refused(name: str, form: Any) -> None:
    data = tokens(4).add_column(name, [[1] * 8] * 4)
    with pytest.raises(DataError, match=f"{name}.*not supported.*remove_columns"):
        prepare(form(data), bert(), Classification())


def test_named_parts_of_a_column_are_no_input() -> None:
    with pytest.raises(DataError, match=r"\['meta'\] hold dicts.*flatten"):
        classified(rows(text="good", meta={"author": "a", "title": "b"}, label=1))


def test_text_beside_what_stands_before_choices_is_refused() -> None:
    data = rows(question="good", passage="a film", choices=["a", "the"], label=1)
    with pytest.raises(DataError, match=r"\['passage'\] may belong to them or not"):
        prepare(data, bert_choice(), MultipleChoice(), tokenizer())


# Formats and tasks that are not read yet ------------------------------------------------------


@pytest.mark.parametrize(
    "columns",
    [
        {"premise": "the", "hypothesis": "film"},
        {"prompt": "the", "text": "film"},
        {"question": "the", "answer": "film", "context": "a book"},
        {"instruction": "the", "output": "film", "text": "the film"},
        {"prompt": "the", "completion": "film", "response": "book"},
        {"question": "the", "answers": ["film"]},
        {"prompt": "the", "chosen": "good", "rejected": "bad"},
        {
            "chosen": [{"role": "user", "content": "a"}],
            "rejected": [{"role": "user", "content": "b"}],
        },
        {"text": "good", "messages": [{"role": "user", "content": "good"}]},
    ],
    ids="+".join,
)
def test_a_language_model_learns_from_one_text_or_chat(columns: Any) -> None:
    with pytest.raises(DataError, match=r"'text'|preferences") as caught:
        modelled(rows(**columns))
    assert any(repr(name) in str(caught.value) for name in columns)


def test_one_text_under_any_name_is_the_text() -> None:
    for name in ("text", "content", "story", "question"):
        assert len(modelled(rows(**{name: "the film is good"}))) == 3


@pytest.mark.parametrize("form", [lambda d: d, lambda d: Rows(list(d))])
def test_spans_are_another_task(form: Any) -> None:
    data = rows(input_ids=[4, 5, 6], start_positions=1, end_positions=2)
    with pytest.raises(DataError, match="extractive question answering"):
        prepare(form(data), bert(), Classification())


@pytest.mark.parametrize("labels", [[1.0, 0.0], [1, 0]])
def test_several_labels_per_example_are_told(labels: Any) -> None:
    with pytest.raises(DataError, match="task='multi-label-classification'"):
        classified(rows(input_ids=[4, 5, 6], labels=labels))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([5, 6, 7, -100], "one place on"),
        ([1, 0, 0, 1], "tags"),
        ([4, 5, 6], "4 tokens and 3 labels"),
    ],
)
def test_labels_that_are_not_the_tokens_are_told(labels: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        modelled(rows(input_ids=[4, 5, 6, 7], labels=labels))


def test_tags_are_no_labels_of_a_masked_model() -> None:
    with pytest.raises(DataError, match="they are tags"):
        prepare(
            rows(input_ids=[4, 5, 6, 7], labels=[-100, 1, 0, -100]),
            bert_mlm(),
            MaskedLM(),
            mask_tokenizer(),
        )


def test_missing_labels_are_told_with_the_columns_that_were_passed() -> None:
    with pytest.raises(DataError, match=r"got \['answer', 'passage', 'question'\]"):
        classified(rows(question="good", passage="a film", answer=True))


# Rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "law"), [(bert, Classification()), (llama, CausalLM())], ids=["classes", "tokens"]
)
def test_rows_with_a_dimension_too_many_are_told(network: Any, law: Any) -> None:
    data = Rows([{"input_ids": torch.tensor([[4, 5, 6]]), "labels": 1}] * 3)
    with pytest.raises(DataError, match=r"are \(1, 3\).*return_tensors='pt'.*squeeze\(0\)"):
        prepare(data, network(), law, tokenizer())


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"input_ids": 5}, "the number 5"),
        ({"input_ids": torch.tensor(5)}, "the number"),
        ({"input_ids": [4.0, 5.0]}, "whole numbers"),
        ({"input_ids": [4, -1]}, r"in 0\.\.\d+, got -1\.\.4"),
        ({"input_ids": [4, 99]}, r"in 0\.\.\d+, got 4\.\.99"),
        ({"input_ids": [4, 5], "attention_mask": [1]}, r"2 tokens, .* attention_mask is \(1,\)"),
        ({"input_ids": [4, 5], "attention_mask": [0, 0]}, "zeros alone"),
    ],
)
@pytest.mark.parametrize(
    ("network", "law"), [(bert, Classification()), (llama, CausalLM())], ids=["classes", "tokens"]
)
def test_impossible_tokens_are_told(row: Any, said: str, network: Any, law: Any) -> None:
    row = row if network is llama else {**row, "labels": 1}
    with pytest.raises(DataError, match=said + "|token labels must be"):
        prepare(Rows([row] * 3), network(), law, tokenizer())


def test_texts_of_a_torch_data_set_are_told() -> None:
    with pytest.raises(DataError, match="is a text, 'good'"):
        classified(Rows([("good", 1)] * 3))


def test_rows_with_different_columns_are_told() -> None:
    data = Rows(
        [
            {"input_ids": [4, 5], "labels": 1, **({"token_type_ids": [0, 1]} if i else {})}
            for i in (0, 1)
        ]
    )
    with pytest.raises(DataError, match="different columns"):
        classified(data)


def test_ragged_lists_are_told() -> None:
    data = Rows([{"input_ids": [[4, 5], [6]], "labels": 1}] * 3)
    with pytest.raises(DataError, match=r"are lists of \[2, 1\]"):
        prepare(data, bert(), Classification(), tokenizer())
    data = Rows([{"input_ids": [4, 5], "position_ids": [0] * (i + 1), "labels": 1} for i in (0, 1)])
    with pytest.raises(DataError, match=r"do not make one batch.*position_ids"):
        prepare(data, bert(), Classification(), tokenizer())


class Wrapped(torch.nn.Module):
    """A network that passes on what it is given."""

    def __init__(self, positional: bool) -> None:
        super().__init__()
        self.encoder, self.positional = bert(), positional
        if positional:
            self.forward = self.passed  # type: ignore[method-assign]

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return self.encoder(input_ids, **kwargs).logits

    def passed(self, *args: Any, **kwargs: Any) -> Any:
        return self.encoder(*args, **kwargs).logits


@pytest.mark.parametrize("positional", [False, True])
def test_a_network_with_open_arguments_is_given_what_the_data_have(positional: bool) -> None:
    data = reviews(6)
    encoded = tokenizer()(data["text"][:], padding="max_length", max_length=12)
    rows_ = datasets.Dataset.from_dict({**encoded, "labels": data["label"][:], "idx": [0] * 6})
    prepared = prepare(rows_, Wrapped(positional), Classification(), tokenizer())
    (batch,) = prepared.loader(6)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert not batch["attention_mask"].all()


def test_columns_and_arrays_of_texts_are_texts() -> None:
    data = rows(text="good", label=1)
    for texts in (data["text"], np.array(data["text"][:]), pd.Series(data["text"][:], [5, 6, 7])):
        assert len(prepare(texts, bert(), Classification(), tokenizer(), need_labels=False)) == 3
        assert classified((texts, [1, 0, 1])).labels.tolist() == [1, 0, 1]  # type: ignore[union-attr]


def test_nested_tensors_and_numbers_are_told() -> None:
    pieces = [torch.tensor([4, 5]), torch.tensor([4])]
    nested = torch.nested.nested_tensor(pieces, layout=torch.jagged)
    with pytest.raises(DataError, match="no nested tensor"):
        classified((nested, torch.tensor([0, 1])))
    with pytest.raises(DataError, match="no single number"):
        classified(torch.tensor(5))


def test_what_a_network_cannot_read_is_told_with_its_shapes() -> None:
    data = tokens(4).add_column("token_type_ids", [[9] * 8] * 4)
    with pytest.raises(DataError, match=r"'token_type_ids': \(2, 8\).*IndexError"):
        fit(bert(), data, "map", epochs=1)
    posterior = fit(bert(), tokens(4), "map", epochs=1)
    with pytest.raises(DataError, match=r"'token_type_ids': \(4, 8\).*IndexError"):
        posterior.predict(data)
