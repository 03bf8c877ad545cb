"""Columns of texts to read and texts to write, as people have them."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
from problems import bart, t5, writer_tokenizer

from pyrolora.columns import LABELS
from pyrolora.data import prepare
from pyrolora.data.columns import WRITTEN_PAIRS
from pyrolora.data.pairs import joined_texts, pair_of, source_of
from pyrolora.errors import DataError
from pyrolora.tasks import Seq2Seq


def rows(**columns: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict({name: [value] * 2 for name, value in columns.items()})


@pytest.mark.parametrize("pair", WRITTEN_PAIRS)
def test_well_known_pairs(pair: tuple[tuple[str, ...], str]) -> None:
    texts = {name: f"the {name} film" for name in (*pair[0], pair[1])}
    data = rows(id="7", **texts, url="x.org")
    assert pair_of(data) == pair
    prepared = prepare(data.remove_columns("url"), t5(), Seq2Seq(), writer_tokenizer())
    assert prepared.labels is not None
    assert prepared.labels.shape == (2, 4)


def test_single_words_may_be_what_is_read() -> None:
    assert pair_of(rows(source="film", target="book")) == (("source",), "target")


def test_texts_as_labels_and_pairs_of_lists() -> None:
    for name in ("label", "labels"):
        assert pair_of(rows(title="the film", **{name: "good"})) == (("title",), name)
    made = prepare((["the film", "bad"], ["good", "book is"]), t5(), Seq2Seq(), writer_tokenizer())
    assert made.labels is not None
    assert made.labels.tolist() == [[4, 3, -100], [7, 13, 3]]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"text": "a", "summary": "b", "title": "c"},
         r"\['title'\] beside 'text' with 'summary'.*remove_columns"),
        ({"article": "a", "summary": "b", "highlights": "c"},
         r"'article' with 'summary' or 'article' with 'highlights'"),
        ({"question": "a", "context": "b", "answer": "c"}, r"\['context'\] beside"),
        ({"english": "a", "german": "b"}, r"which is written; rename them 'source' and 'target'"),
        ({"text": "a"}, r"one of texts to write.*generate\(\) writes"),
        ({"text": "a", "label": 1}, r"one of texts to write.*'int64'"),
        ({"premise": "a", "hypothesis": "b", "label": "c"}, r"'label', and one column of text"),
        ({"translation": {"en": "a", "de": "b"}},
         r"'translation.en': 'source', 'translation.de': 'target'.*--text translation.en"),
        ({"question": "a", "answer": {"text": "b"}}, "hold dicts"),
        ({"messages": [{"role": "user", "content": "a"}]}, "hold dicts"),
        ({"text": "a", "summary": None}, "one of texts to write"),
        ({"question": "a", "choices": ["b", "c"]}, "choices"),
    ],
)  # fmt: skip
def test_what_has_two_readings_or_none_is_an_error(columns: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        prepare(rows(**columns), t5(), Seq2Seq(), writer_tokenizer())


def test_both_directions_of_a_translation_are_what_the_error_says() -> None:
    data = rows(translation={"en": "good film", "de": "bad book"})
    with pytest.raises(DataError) as error:
        pair_of(data)
    found = []
    for part in str(error.value).split("one of ")[1].split(" (--text")[0].split(" and "):
        made = eval(part, {"data": data})
        found.append((made["source"][0], made["target"][0]))
    assert found == [("good film", "bad book"), ("bad book", "good film")]


def test_an_instruction_may_have_no_input() -> None:
    data = datasets.Dataset.from_list(
        [
            {"instruction": "the film", "input": "", "output": "good"},
            {"instruction": "the film", "input": "is dull", "output": "bad"},
            {"instruction": "the film", "input": None, "output": "good"},
        ]
    )
    source, target = pair_of(data)
    assert (source, target) == (("instruction", "input"), "output")
    assert joined_texts(data, source) == ["the film", "the film\nis dull", "the film"]
    assert source_of(data.remove_columns("output")) == source
    assert source_of(data) == source
    gone = [data[0], {**data[1], "output": None}]
    with pytest.raises(DataError, match="'output' has missing values"):
        prepare(gone, t5(), Seq2Seq(), writer_tokenizer())


def test_what_is_cut_is_counted_and_ends_as_the_tokenizer_ends_it() -> None:
    data = rows(text="the film " * 30, summary="good book " * 30)
    with pytest.warns(UserWarning, match="2 of 2") as told:
        prepared = prepare(data, bart(), Seq2Seq(), writer_tokenizer())
    texts = [str(warning.message) for warning in told]
    assert any("texts have more than 24 tokens" in text for text in texts)
    assert any("targets have more than 24 tokens" in text for text in texts)
    batch = prepared.collate([prepared.examples[0]])
    assert batch["input_ids"].shape == batch[LABELS].shape == (1, 24)
    assert batch[LABELS][0, -1] == batch["input_ids"][0, -1] == 3


def test_a_target_ends_with_eos_once_whatever_the_tokenizer_does() -> None:
    from tokenizers import processors

    bare = writer_tokenizer()
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    for read, summary in ((bare, "good"), (bare, "good [SEP]"), (writer_tokenizer(), "good [SEP]")):
        made = prepare(rows(text="the film", summary=summary), t5(), Seq2Seq(), read)
        assert made.labels is not None
        assert made.labels.tolist() == [[4, 3]] * 2
