"""What users pass as data becomes the same batches, whatever its form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from problems import (
    WORDS,
    Rows,
    bert,
    bert_choice,
    gpt2,
    llama,
    mlp,
    reviews,
    tokenizer,
    tokens,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import RobertaConfig, RobertaForSequenceClassification

from pyrolora.data import Prepared, prepare
from pyrolora.data.examples import mapped, unformatted
from pyrolora.errors import DataError
from pyrolora.tasks import (
    CausalLM,
    Classification,
    MultipleChoice,
    Regression,
    Task,
    TokenTask,
)

PAIRS = [
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text", "text_pair"),
]


def batches(prepared: Prepared, size: int = 5) -> list[dict[str, Tensor]]:
    return [dict(batch) for batch in prepared.loader(size)]


def assert_same(got: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert set(one) == set(other)
        for name in one:
            assert one[name].dtype == other[name].dtype, name
            assert torch.equal(one[name], other[name]), name


def tokenised(data: datasets.Dataset) -> datasets.Dataset:
    """Tokenised by hand, with every column of the raw data dropped but the labels."""
    encoded = [{**tokenizer()(row["text"]), "labels": row["label"]} for row in data]
    return datasets.Dataset.from_list(encoded)


def as_tensors(data: datasets.Dataset) -> list[dict[str, Tensor]]:
    return [{name: torch.tensor(value) for name, value in row.items()} for row in data]


def by_hand(data: datasets.Dataset, size: int = 5) -> list[dict[str, Tensor]]:
    """The batches that the tokenizer itself makes of raw text."""
    made = []
    for start in range(0, len(data), size):
        rows = data[start : start + size]
        encoded = tokenizer()(rows["text"], padding=True, return_tensors="pt")
        made.append({**encoded, "labels": torch.tensor(rows["label"])})
    return made


SEQUENCE_FORMS = {
    "raw text": lambda raw: raw,
    "raw text, label column called labels": lambda raw: raw.rename_column("label", "labels"),
    "dictionary of splits": lambda raw: datasets.DatasetDict(
        {"test": raw.select([3]), "train": raw}
    ),
    "list of raw dicts": lambda raw: list(raw),
    "tokenised": tokenised,
    "tokenised, label column called label": lambda raw: tokenised(raw).rename_column(
        "labels", "label"
    ),
    "tokenised, in torch format": lambda raw: tokenised(raw).with_format("torch"),
    "list of tokenised dicts": lambda raw: list(tokenised(raw)),
    "list of dicts of tensors": lambda raw: as_tensors(tokenised(raw)),
    "torch data set of dicts": lambda raw: Rows(as_tensors(tokenised(raw))),
    "torch data set of dicts of lists": lambda raw: Rows(list(tokenised(raw))),
    "torch data set with a column label": lambda raw: Rows(
        list(tokenised(raw).rename_column("labels", "label"))
    ),
    "loader of a tokenised data set": lambda raw: DataLoader(tokenised(raw), batch_size=2),
    "loader of a raw data set": lambda raw: DataLoader(raw, batch_size=2),
    "loader of a torch data set": lambda raw: DataLoader(Rows(list(tokenised(raw)))),
}


@pytest.mark.parametrize("form", SEQUENCE_FORMS)
def test_sequences_of_every_form_make_the_tokenizers_own_batches(form: str) -> None:
    raw = reviews(12)
    prepared = prepare(SEQUENCE_FORMS[form](raw), bert(), Classification(), tokenizer())
    assert_same(batches(prepared), by_hand(raw))
    assert len(prepared) == 12
    assert prepared.labels is not None
    assert prepared.labels.tolist() == raw["label"][:]


PLAIN_FORMS = {
    "tuple of tensors": lambda x, y: (x, y),
    "tuple of arrays": lambda x, y: (x.numpy(), y.numpy()),
    "tensor data set": TensorDataset,
    "loader of a tensor data set": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=2),
    "torch data set of pairs": lambda x, y: Rows(list(zip(x, y, strict=True))),
    "torch data set of list pairs": lambda x, y: Rows([[a, b] for a, b in zip(x, y, strict=True)]),
    "torch data set of dicts": lambda x, y: Rows(
        [{"inputs": a, "label": b} for a, b in zip(x, y, strict=True)]
    ),
    "list of dicts": lambda x, y: [
        {"inputs": a.tolist(), "labels": b.item()} for a, b in zip(x, y, strict=True)
    ],
    "data set": lambda x, y: datasets.Dataset.from_dict(
        {"inputs": x.tolist(), "label": y.tolist()}
    ),
}


@pytest.mark.parametrize("form", PLAIN_FORMS)
@pytest.mark.parametrize("kind", [Classification, Regression])
def test_plain_features_of_every_form_make_the_same_batches(form: str, kind: type) -> None:
    x = torch.randn(12, 4)
    y = torch.arange(12) % 3 if kind is Classification else torch.randn(12)
    network = mlp(outputs=3 if kind is Classification else 1)
    prepared = prepare(PLAIN_FORMS[form](x, y), network, kind())
    expected = [{"inputs": x[i : i + 5], "labels": y[i : i + 5]} for i in (0, 5, 10)]
    assert_same(batches(prepared), expected)
    assert prepared.labels is not None
    torch.testing.assert_close(prepared.labels, y)


def test_a_tuple_of_tensors_feeds_the_main_input_of_a_transformers_model() -> None:
    ids, labels = torch.randint(4, 16, (6, 5)), torch.arange(6) % 2
    prepared = prepare((ids, labels), bert(), Classification())
    assert_same(batches(prepared, 6), [{"input_ids": ids, "labels": labels}])


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda x: (x,), id="tuple of one"),
        pytest.param(lambda x: x, id="tensor"),
        pytest.param(TensorDataset, id="tensor data set"),
        pytest.param(lambda x: [{"inputs": row.tolist()} for row in x], id="list of dicts"),
    ],
)
def test_features_without_labels_are_accepted_for_prediction(data: Any) -> None:
    x = torch.randn(7, 4)
    prepared = prepare(data(x), mlp(), Classification(), need_labels=False)
    assert prepared.labels is None
    assert_same(batches(prepared, 7), [{"inputs": x}])


def test_a_list_of_texts_makes_the_batches_of_a_text_column() -> None:
    raw = reviews(9)
    options = {"tokenizer": tokenizer(), "need_labels": False}
    from_list = prepare(list(raw["text"]), bert(), Classification(), **options)
    from_column = prepare(raw.select_columns(["text"]), bert(), Classification(), **options)
    assert from_list.labels is None
    assert_same(batches(from_list), batches(from_column))


# Splits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (("train",), 4),
        (("test", "validation"), 3),
        (("validation", "test"), 2),
        (("dev", "test"), 3),
    ],
)
def test_the_first_split_that_exists_is_taken(splits: tuple[str, ...], expected: int) -> None:
    data = datasets.DatasetDict({"train": tokens(4), "validation": tokens(2), "test": tokens(3)})
    assert len(prepare(data, bert(), Classification(), splits=splits)) == expected


def test_a_dictionary_without_the_split_names_the_splits_that_it_has() -> None:
    data = datasets.DatasetDict({"dev": tokens(4), "holdout": tokens(2)})
    with pytest.raises(DataError, match=r"'train'.*\['dev', 'holdout'\].*data\['dev'\]"):
        prepare(data, bert(), Classification())


# Text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_sentence_pairs_are_tokenised_together(names: tuple[str, str]) -> None:
    first, second = ["a good film", "dull"], ["the book", "was very bad"]
    data = datasets.Dataset.from_dict({"idx": [0, 1], names[1]: second, names[0]: first})
    prepared = prepare(data, bert(), Classification(), tokenizer(), need_labels=False)
    expected = tokenizer()(first, second, padding=True, return_tensors="pt")
    assert_same(batches(prepared), [dict(expected)])
    separator = tokenizer().sep_token_id
    assert expected["input_ids"].eq(separator).sum(1).tolist() == [2, 2]


def test_columns_that_are_no_input_are_dropped() -> None:
    raw = reviews(6)
    names = [("negative", "positive")[label] for label in raw["label"]]
    data = raw.add_column("idx", list(range(6))).add_column("label_name", names)
    prepared = prepare(data, bert(), Classification(), tokenizer())
    assert_same(batches(prepared), by_hand(raw))


def test_columns_that_are_no_input_are_dropped_from_tokenised_data() -> None:
    raw = reviews(6)
    data = tokenised(raw).add_column("idx", list(range(6))).add_column("text", list(raw["text"]))
    with pytest.warns(UserWarning, match=r"the columns \['text'\] are not read"):
        prepared = prepare(data, bert(), Classification(), tokenizer())
    assert_same(batches(prepared), by_hand(raw))


@pytest.mark.parametrize("form", [list, Rows], ids=["list", "torch data set"])
def test_keys_that_are_no_input_are_dropped_from_dicts(form: Any) -> None:
    rows = [{**row, "idx": i} for i, row in enumerate(tokenised(reviews(6)))]
    prepared = prepare(form(rows), bert(), Classification(), tokenizer())
    assert_same(batches(prepared), by_hand(reviews(6)))


@pytest.mark.parametrize("form", [list, Rows, lambda data: data])
def test_two_labels_have_to_be_the_same(form: Any) -> None:
    data = tokens(6).add_column("label", tokens(6)["labels"][:])
    prepared = prepare(form(data), bert(), Classification())
    assert prepared.labels is not None
    assert prepared.labels.tolist() == tokens(6)["labels"][:]
    assert set(batches(prepared)[0]) == {"input_ids", "attention_mask", "labels"}
    other = tokens(6).add_column("label", [7] * 6)
    with pytest.raises(DataError, match="two labels, 'label' and 'labels'"):
        prepare(form(other), bert(), Classification())


def test_more_than_two_unknown_text_columns_are_ambiguous() -> None:
    data = datasets.Dataset.from_dict(
        {"title": ["a"], "body": ["b"], "author": ["c"], "label": [0]}
    )
    with pytest.raises(DataError, match=r"title.*body.*author.*select_columns"):
        prepare(data, bert(), Classification(), tokenizer())


def test_the_users_data_set_is_not_changed() -> None:
    raw = reviews(6)
    before = raw.to_dict()
    prepare(raw, bert(), Classification(), tokenizer())
    assert raw.column_names == ["text", "label"]
    assert raw.to_dict() == before


# Padding ------------------------------------------------------------------------------------------


def test_sequences_are_padded_to_the_longest_of_their_batch_only() -> None:
    lengths = [3, 5, 4, 9, 2, 6]
    rows = [{"input_ids": [4] * n, "attention_mask": [1] * n, "labels": 0} for n in lengths]
    prepared = prepare(rows, bert(), Classification(), tokenizer())
    made = batches(prepared, 2)
    assert [batch["input_ids"].shape for batch in made] == [(2, 5), (2, 9), (2, 6)]
    assert [batch["attention_mask"].sum(1).tolist() for batch in made] == [[3, 5], [4, 9], [2, 6]]
    pad = tokenizer().pad_token_id
    assert all((b["input_ids"][b["attention_mask"] == 0] == pad).all() for b in made)


def test_sequences_of_one_length_need_no_tokenizer() -> None:
    prepared = prepare(tokens(4, length=6), bert(), Classification())
    assert batches(prepared)[0]["input_ids"].shape == (4, 6)


# Causal language models ---------------------------------------------------------------------------


def ragged(lengths: tuple[int, ...] = (4, 7, 5)) -> list[dict[str, Any]]:
    made = []
    for n in lengths:
        ids = [4 + i % (len(WORDS) - 4) for i in range(n)]
        made.append({"input_ids": ids, "attention_mask": [1] * n})
    return made


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(datasets.Dataset.from_list, id="data set"),
        pytest.param(lambda rows: rows, id="list of dicts"),
        pytest.param(Rows, id="torch data set of dicts"),
        pytest.param(lambda rows: DataLoader(Rows(rows)), id="loader"),
    ],
)
def test_labels_of_a_language_model_are_its_tokens_and_padding_does_not_count(form: Any) -> None:
    prepared = prepare(form(ragged()), llama(), CausalLM(), tokenizer())
    (batch,) = batches(prepared)
    kept = batch["attention_mask"].bool()
    assert (~kept).sum() == 5
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
    assert (batch["labels"][~kept] == -100).all()
    assert prepared.labels is not None
    assert CausalLM().count(prepared.labels) == sum((4, 7, 5)) - 3


def test_a_tensor_of_token_ids_is_its_own_label() -> None:
    ids = torch.randint(4, 16, (3, 6))
    (batch,) = batches(prepare((ids,), llama(), CausalLM()))
    assert torch.equal(batch["labels"], ids)


def test_padding_that_the_user_made_does_not_count() -> None:
    """Tokenised with padding="max_length": the labels follow the attention mask."""
    texts = ["a good film", "dull"]
    data = datasets.Dataset.from_dict(
        dict(tokenizer()(texts, padding="max_length", max_length=8, return_token_type_ids=False))
    )
    prepared = prepare(data, llama(), CausalLM(), tokenizer())
    (batch,) = batches(prepared)
    kept = batch["attention_mask"].bool()
    assert (~kept).any()
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
    assert (batch["labels"][~kept] == -100).all()


def test_a_class_label_that_a_language_model_does_not_read_is_named() -> None:
    raw = reviews(5)
    with pytest.warns(UserWarning, match=r"the columns \['label'\] are not read"):
        prepared = prepare(raw, llama(), CausalLM(), tokenizer())
    (batch,) = batches(prepared)
    assert batch["labels"].shape == batch["input_ids"].shape
    assert torch.equal(batch["input_ids"], by_hand(raw)[0]["input_ids"])


def test_a_users_token_labels_are_kept() -> None:
    rows = [{**row, "labels": [-100, -100, *row["input_ids"][2:]]} for row in ragged()]
    (batch,) = batches(prepare(rows, llama(), CausalLM(), tokenizer()))
    assert (batch["labels"][:, :2] == -100).all()
    assert batch["labels"].ne(-100).sum() == sum((4, 7, 5)) - 6


# The user's own transform -------------------------------------------------------------------------


def shifted(rows: dict[str, list[Any]]) -> dict[str, Any]:
    """An own transform: word lengths as tokens, every sequence six long."""
    ids = [([4 + len(word) for word in text.split()] * 6)[:6] for text in rows["text"]]
    return {"input_ids": ids, "labels": [1 - label for label in rows["label"]]}


def test_a_transform_of_the_user_makes_the_examples() -> None:
    raw = reviews(5)
    prepared = prepare(raw.with_transform(shifted), bert(), Classification(), tokenizer())
    expected = {name: torch.tensor(value) for name, value in shifted(raw[:]).items()}
    assert_same(batches(prepared), [expected])
    assert prepared.labels is not None
    assert torch.equal(prepared.labels, expected["labels"])


def test_a_transform_that_passes_label_on_makes_labels() -> None:
    def features(rows: dict[str, list[Any]]) -> dict[str, Any]:
        return {"input_ids": shifted(rows)["input_ids"], "label": rows["label"]}

    raw = reviews(5)
    prepared = prepare(raw.with_transform(features), bert(), Classification(), tokenizer())
    (batch,) = batches(prepared)
    assert batch["labels"].tolist() == raw["label"][:]
    assert prepared.labels is not None
    assert prepared.labels.tolist() == raw["label"][:]


def test_a_tuple_of_texts_and_labels_is_raw_text() -> None:
    prepared = prepare((["a good film", "dull"], [1, 0]), bert(), Classification(), tokenizer())
    rows = prepare(
        [{"text": "a good film", "label": 1}, {"text": "dull", "label": 0}],
        bert(),
        Classification(),
        tokenizer(),
    )
    found, expected = next(iter(prepared.loader(2))), next(iter(rows.loader(2)))
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


LONG = " ".join(["the good film"] * 20)


def unlimited() -> Any:
    """The tokenizer with the limit that one without a limit has."""
    made = tokenizer()
    made.model_max_length = int(1e30)
    return made


def roberta() -> RobertaForSequenceClassification:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(
        **sizes, intermediate_size=16, vocab_size=len(WORDS), max_position_embeddings=14,
        pad_token_id=1, num_labels=2,
    )  # fmt: skip
    return RobertaForSequenceClassification(config).eval()


@pytest.mark.parametrize(
    ("network", "law", "longest"),
    [
        (bert(max_position_embeddings=12), Classification(), 12),
        (gpt2(n_positions=12), CausalLM(), 12),
        (roberta(), Classification(), 12),  # which counts from the padding's number, 1, on
        (llama(max_position_embeddings=12), CausalLM(), 12),  # no table: what it was made for
    ],
    ids=["bert", "gpt2", "roberta", "llama"],
)
def test_texts_are_cut_where_the_networks_table_of_positions_ends(
    network: nn.Module, law: Task, longest: int
) -> None:
    rows: list[dict[str, Any]] = [{"text": LONG, "label": 0}, {"text": "dull", "label": 1}]
    if isinstance(law, TokenTask):
        rows = [{"text": row["text"]} for row in rows]
    with pytest.warns(UserWarning, match=f"1 of 2 texts have more than {longest} tokens"):
        prepared = prepare(rows, network, law, unlimited())
    (batch,) = prepared.loader(2)
    assert batch["input_ids"].shape == (2, longest)
    inputs = {n: t for n, t in batch.items() if n in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.isfinite(network(**inputs).logits).all()


def test_tokens_beyond_the_table_of_positions_are_refused() -> None:
    rows = [{**unlimited()(LONG), "label": 0}]
    network = bert(max_position_embeddings=12)
    with pytest.raises(DataError, match=r"62 tokens, .* has 12 positions.*max_length=12"):
        prepare(rows, network, Classification(), tokenizer())
    choices = [{"input_ids": [[2, 3], unlimited()(LONG)["input_ids"]], "label": 0}]
    network = bert_choice(max_position_embeddings=12)
    with pytest.raises(DataError, match="62 tokens"):
        prepare(choices, network, MultipleChoice(), tokenizer())


@pytest.mark.parametrize("form", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_features_come_in_the_networks_precision(form: torch.dtype, own: torch.dtype) -> None:
    x, y = torch.randn(6, 4).to(form), torch.arange(6) % 3
    rows = [(x[i], int(y[i])) for i in range(6)]
    for data in ((x, y), Rows(rows), TensorDataset(x, y)):
        for batch in prepare(data, mlp().to(own), Classification()).loader(4):
            (features,) = (t for n, t in batch.items() if n != "labels")
            assert features.dtype == own
            assert batch["labels"].dtype == torch.long


def test_real_labels_keep_their_precision() -> None:
    data = (torch.randn(6, 4), torch.randn(6))
    (batch,) = prepare(data, mlp(outputs=1).to(torch.bfloat16), Regression()).loader(6)
    assert torch.equal(batch["labels"], data[1])


def test_features_that_the_networks_precision_does_not_hold_are_refused() -> None:
    x = torch.ones(6, 4).double()
    x[3, 1] = 1e300
    for data in ((x, torch.arange(6) % 3), Rows([(x[i], i % 3) for i in range(6)])):
        with pytest.raises(DataError, match="example 3 is not finite"):
            prepare(data, mlp(), Classification())


@pytest.mark.parametrize("form", ["pandas", "arrow", "numpy", "torch"])
def test_rows_that_come_as_tables_are_read_as_rows(form: str) -> None:
    plain = reviews(7)
    for data in (plain.with_format(form), datasets.DatasetDict(train=plain.with_format(form))):
        prepared = prepare(data, bert(), Classification(), tokenizer())
        assert_same(batches(prepared), by_hand(plain))


@pytest.mark.parametrize("rows", [["good", {"text": "bad"}], [{"text": "good"}, "bad"]])
def test_a_list_of_this_and_that_is_refused(rows: list[Any]) -> None:
    with pytest.raises(DataError, match="got dict and str"):
        prepare(rows, llama(), CausalLM(), tokenizer())


class Plus:
    """A function that counts how often it is pickled."""

    pickled = 0

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"b": row["a"] + 1}

    def __reduce__(self) -> Any:
        Plus.pickled += 1
        return Plus, ()


def test_a_fingerprint_is_taken_where_a_result_is_kept(tmp_path: Path) -> None:
    """Of a function with a tokenizer it takes longer than the tokenising of many texts."""
    Plus.pickled = 0
    here = datasets.Dataset.from_list([{"a": 1}, {"a": 2}])
    assert mapped(here, Plus())["b"][:] == [2, 3]
    assert Plus.pickled == 0
    here.save_to_disk(tmp_path)
    stored = datasets.load_from_disk(tmp_path)
    first, second = (mapped(stored, Plus()) for _ in range(2))
    assert Plus.pickled
    assert first.cache_files == second.cache_files != []


def test_what_has_no_format_is_not_copied() -> None:
    rows = datasets.Dataset.from_list([{"a": 1, "b": 2}])
    assert unformatted(rows) is rows
    for form in (rows.with_format("numpy"), rows.with_format(None, columns=["a"])):
        assert unformatted(form)[0] == {"a": 1, "b": 2}
