"""Token classification: the law against transformers' loss, words against tokens."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from console import done, saved
from problems import Rows, bert, bert_mlm, bert_tags, llama, mask_tokenizer, tagged, tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import BertForTokenClassification, PreTrainedTokenizerFast

import pyrolora
from pyrolora import AdapterConfig, Posterior
from pyrolora.data import prepare
from pyrolora.errors import ConfigError, DataError
from pyrolora.predictive import ClassPrediction, TagPrediction
from pyrolora.tasks import TokenClassification, load_network, task_for
from pyrolora.tasks.token_classification import COUNTED

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "play", "##ing", "##s", "a", "film", "very"]
NAMES = ["O", "B-X", "I-X"]


def pieces() -> PreTrainedTokenizerFast:
    """A tokenizer that cuts words into pieces."""
    vocabulary = {piece: i for i, piece in enumerate(PIECES)}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, sep_token="[SEP]", **special)


def prepared(data: Any, tokenizer: Any = None, network: Any = None, **options: Any) -> Any:
    network = bert_tags() if network is None else network
    return prepare(data, network, TokenClassification(), tokenizer, **options)


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    options = {"tokenizer": tokenizer(), "adapter": AdapterConfig(r=2), "seed": 0}
    return pyrolora.fit(bert_tags(), tagged(12), "meanfield", epochs=2, **options)


# The law -----------------------------------------------------------------------------------------


def test_the_likelihood_is_transformers_own_loss() -> None:
    network, task = bert_tags(), TokenClassification()
    ready = prepared(tagged(6), tokenizer())
    batch = ready.collate([ready.examples[i] for i in range(6)])
    output = task.output(network(**{n: t for n, t in batch.items() if n != "labels"}))
    count = task.count(batch["labels"])
    assert count == sum(map(len, tagged(6)["tokens"]))
    expected = network(**batch).loss * count
    torch.testing.assert_close(-task.log_prob(output, batch).sum(), expected)
    torch.testing.assert_close(-task.row_log_prob(output, batch).sum(), expected)
    task.check_reading(output, batch, network)


def test_the_rows_of_several_draws_are_those_of_each() -> None:
    task = TokenClassification().at(2.0)
    output = torch.randn(3, 2, 4, 5)
    labels = torch.tensor([[-100, 1, 0, -100], [-100, 4, -100, -100]])
    rows = task.row_log_prob(output, {"labels": labels})
    logits = output / 2
    by_hand = [logits[:, 0, 1], logits[:, 0, 2], logits[:, 1, 1]]
    for row, own, label in zip(rows.T, by_hand, (1, 0, 4), strict=True):
        torch.testing.assert_close(row, own.log_softmax(-1)[:, label])
    torch.testing.assert_close(task.log_prob(output, {"labels": labels})[:, 0], rows[:, :2].sum(1))


def test_the_network_says_the_task() -> None:
    assert task_for(bert_tags()).name == "token-classification"
    assert task_for(bert_tags(), "TOKEN_CLS").name == "token-classification"
    assert task_for(bert(), "sentiment-analysis").name == "classification"


def test_whole_entities_are_scored_where_tags_are_named_by_iob() -> None:
    """Two entities, of which one is found and one cut; and one found that is none."""
    truth, said = [0, 1, 2, 1, 2, 0], [0, 1, 2, 1, 0, 1]
    made = TagPrediction(
        targets=torch.tensor(truth),
        log_likelihood=torch.zeros(1, 6),
        draws=torch.eye(3)[said][None] * 0.8 + 0.1,
        classes=("O", "B-PER", "I-PER"),
        example=torch.tensor([0, 0, 0, 0, 1, 1]),
        position=torch.arange(6),
    )
    # The example ends between the fourth and the fifth token, and with it the entity.
    assert made.metrics() == pytest.approx(
        {"entity_precision": 2 / 3, "entity_recall": 2 / 3, "entity_f1": 2 / 3}
    )
    assert replace(made, classes=None).metrics() == {}
    assert replace(made, classes=("O", "NOUN", "VERB")).metrics() == {}


# Words and tokens --------------------------------------------------------------------------------


def test_the_first_piece_of_a_word_has_its_tag() -> None:
    data = [
        {"tokens": ["a", "playings", "film"], "tags": [0, 2, 1]},
        {"tokens": ["plays"], "tags": [1]},
    ]
    ready = prepared(data, pieces())
    assert ready.examples["input_ids"][0] == [2, 7, 4, 5, 6, 8, 3]
    assert ready.examples["labels"][0] == [-100, 0, 2, -100, -100, 1, -100]
    assert ready.examples["labels"][1] == [-100, 1, -100, -100]


@pytest.mark.parametrize(
    ("data", "counted"),
    [
        ([{"words": ["a", "plays"]}], [0, 1, 1, 0, 0]),
        (["a plays"], [0, 1, 1, 0, 0]),
        ([{"input_ids": [2, 7, 4, 6, 3]}], [0, 1, 1, 1, 0]),
        (Rows([{"input_ids": [2, 7, 4, 6, 3, 0], "attention_mask": [1] * 5 + [0]}]), [0, 1, 1, 1]),
    ],
    ids=["words", "text", "tokens", "padding"],
)
def test_without_tags_the_first_pieces_of_words_count(data: Any, counted: list[int]) -> None:
    ready = prepared(data, pieces(), need_labels=False)
    batch = ready.collate([ready.examples[0]])
    assert ready.labels is None
    assert batch[COUNTED][0].tolist()[: len(counted)] == counted
    assert not batch[COUNTED][0, len(counted) :].any()


def test_words_beyond_the_limit_are_cut_with_their_tags() -> None:
    short = pieces()
    short.model_max_length = 4
    with pytest.warns(UserWarning, match="1 of 1 texts have more than 4 tokens"):
        ready = prepared([{"tokens": ["a", "plays", "film"], "tags": [0, 1, 2]}], short)
    assert ready.examples["labels"][0] == [-100, 0, 1, -100]


def test_tokens_with_labels_need_no_tokenizer() -> None:
    ids, labels = torch.tensor([[2, 5, 3]] * 2), torch.tensor([[-100, 1, -100]] * 2)
    for data in ((ids, labels), Rows([{"input_ids": [2, 5, 3], "labels": [-100, 1, -100]}] * 2)):
        assert prepared(data).labels.tolist() == labels.tolist()


@pytest.mark.parametrize("form", ["names", "numbers"])
def test_names_of_tags_are_numbered_as_the_networks_classes(form: str) -> None:
    network = bert_tags(
        id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)}
    )
    rows = [["I-X", "B-X"], ["O"]]
    data = datasets.Dataset.from_dict({"tokens": [["a", "film"], ["a"]], "ner_tags": rows})
    if form == "numbers":
        feature = datasets.List(datasets.ClassLabel(names=sorted(NAMES)))
        data = data.cast_column("ner_tags", feature)
    ready = prepared(data, tokenizer(), network)
    assert ready.labels[ready.labels != -100].tolist() == [2, 1, 0]


@pytest.mark.parametrize("named", [True, False], ids=["ClassLabel", "names"])
def test_a_model_by_name_gets_the_tags_of_the_data(named: bool, tmp_path: Path) -> None:
    folder = saved(bert_mlm(), tmp_path)
    tokenizer().save_pretrained(folder)
    names = [[NAMES[i] for i in row] for row in tagged(9)["ner_tags"]]
    data = tagged(9).remove_columns("ner_tags").add_column("ner_tags", names)
    if named:
        data = data.cast_column("ner_tags", datasets.List(datasets.ClassLabel(names=NAMES)))
    network, _ = load_network(folder, data)
    assert isinstance(network, BertForTokenClassification)
    order = NAMES if named else sorted(NAMES)
    assert network.config.id2label == dict(enumerate(order))
    network, _ = load_network(folder, tagged(9))
    assert network.config.num_labels == 3
    options = {"adapter": AdapterConfig(r=1), "epochs": 1, "seed": 0}
    table = pyrolora.fit(folder, data, "map", **options).predict(data, 0).to_pandas()
    assert {f"prob_{name}" for name in NAMES} <= {*table}
    assert {*table["target"]} <= {*NAMES}


def test_labels_per_token_of_a_language_model_are_ambiguous(tmp_path: Path) -> None:
    folder = saved(bert_mlm(), tmp_path)
    mask_tokenizer().save_pretrained(folder)
    data = [{"input_ids": [2, 5, 3], "labels": [-100, 1, -100]}] * 2
    with pytest.raises(ConfigError, match="task='token-classification'"):
        load_network(folder, data)
    network, _ = load_network(folder, data, task="token-classification")
    assert isinstance(network, BertForTokenClassification)
    assert isinstance(load_network(folder, tagged(4))[0], BertForTokenClassification)


def test_lists_without_a_word_are_refused() -> None:
    with pytest.raises(DataError, match="no example has a word in 'tokens', all lists are empty"):
        prepared([{"tokens": []}], tokenizer(), need_labels=False)
    with pytest.raises(DataError, match=r"it takes (?!.*counted_tokens)"):
        prepared([{"number": 1}], tokenizer(), need_labels=False)


def test_a_word_without_a_label_is_named() -> None:
    data = datasets.Dataset.from_dict({"tokens": [["a"], ["a", "film"]], "tags": [[0], [1, None]]})
    with pytest.raises(DataError, match=r"example 1 has no label for word 1 in 'tags'; give -100"):
        prepared(data, tokenizer())


# Predictions -------------------------------------------------------------------------------------


def test_one_row_per_word_in_the_order_of_the_data(posterior: Posterior) -> None:
    data = tagged(7, seed=3)
    prediction = posterior.predict(data, 3, seed=0)
    sizes = [len(words) for words in data["tokens"]]
    assert len({*sizes}) > 1  # so that the batches are in another order
    assert isinstance(prediction, TagPrediction)
    assert prediction.draws.shape == (3, sum(sizes), 3)
    assert prediction.examples.tolist() == [i for i, n in enumerate(sizes) for _ in range(n)]
    assert prediction.position.tolist() == [j + 1 for n in sizes for j in range(n)]
    assert prediction.targets.tolist() == [tag for row in data["ner_tags"] for tag in row]
    table = prediction.to_pandas()
    assert [*table.columns[:2]] == ["example", "position"]
    part = prediction.select(torch.tensor([4, 1]))
    assert part.examples.tolist() == prediction.examples[[4, 1]].tolist()


def test_batches_with_padding_are_examples_one_by_one(posterior: Posterior) -> None:
    data = tagged(7, seed=3)
    together = posterior.predict(data, 3, seed=0, batch_size=7)
    alone = posterior.predict(data, 3, seed=0, batch_size=1)
    torch.testing.assert_close(together.draws, alone.draws)
    torch.testing.assert_close(together.log_likelihood, alone.log_likelihood)
    for i in range(7):
        one = posterior.predict(data.select([i]), 3, seed=0)
        torch.testing.assert_close(one.draws, together.draws[:, together.examples == i])


def test_the_metrics_are_per_token(posterior: Posterior) -> None:
    data = tagged(7, seed=3)
    prediction, scores = posterior.predict(data, 3, seed=0), posterior.evaluate(data, 3, seed=0)
    tags = torch.tensor([tag for row in data["ner_tags"] for tag in row])
    right = (prediction.draws.mean(0).argmax(-1) == tags).float().mean()
    assert scores["accuracy"] == pytest.approx(float(right))
    picked = prediction.draws[:, torch.arange(len(tags)), tags].mean(0)
    assert scores["nll"] == pytest.approx(float(-picked.log().mean()), rel=1e-5)
    assert {*scores} == {*ClassPrediction.higher_is_better}


@pytest.mark.filterwarnings("ignore:the temperature 20")  # of a network that learnt little
def test_a_temperature_is_that_of_the_lowest_score(posterior: Posterior, tmp_path: Path) -> None:
    posterior.save(tmp_path)
    copy = pyrolora.load(tmp_path, bert_tags())
    data = tagged(9, seed=4)
    made = copy.calibrate(data)
    after = copy.evaluate(data)["nll"]
    assert made.nll_after < made.nll_before
    assert after == pytest.approx(made.nll_after, rel=1e-3)


def test_a_saved_posterior_predicts_the_same(posterior: Posterior, tmp_path: Path) -> None:
    posterior.save(tmp_path)
    loaded = pyrolora.load(tmp_path, bert_tags())
    assert loaded.task.name == "token-classification"
    first, second = (p.predict(tagged(5), 3, seed=0).draws for p in (posterior, loaded))
    torch.testing.assert_close(first, second)


def test_texts_and_words_without_tags_are_predicted(posterior: Posterior) -> None:
    words = posterior.predict([{"tokens": ["the", "film"]}, {"tokens": ["good"]}], 3, seed=0)
    texts = posterior.predict(["the film", "good"], 3, seed=0)
    assert words.examples.tolist() == [0, 0, 1]
    torch.testing.assert_close(words.draws, texts.draws)
    assert words.targets is None


def test_other_tags_of_outside_data_are_left_alone(posterior: Posterior) -> None:
    outside = [{"tokens": ["the", "book"], "ner_tags": [7, 9]}] * 3
    scores = posterior.evaluate(tagged(5), 3, seed=0, outside=outside)
    assert 0 <= scores["ood_auroc"] <= 1


def test_arviz_has_a_dimension_of_tokens(posterior: Posterior) -> None:
    data = tagged(5)
    idata = posterior.to_arviz(4, data=data, log_likelihood=True)
    count = sum(map(len, data["tokens"]))
    assert idata["log_likelihood"]["y"].dims == ("chain", "draw", "token")
    assert idata["observed_data"]["y"].shape == (count,)
    assert idata["posterior_predictive"]["probs"].shape == (1, 4, count, 3)
    prediction = posterior.predict(data, 4)
    places = idata["constant_data"]["position"]
    assert places["token"].values.tolist() == prediction.example.tolist()
    assert places.values.tolist() == prediction.position.tolist()


def test_text_is_not_generated(posterior: Posterior) -> None:
    with pytest.raises(ConfigError, match=r"causal language model.*'token-classification'"):
        posterior.generate(["the film"])


def test_the_command_line_says_of_each_row_what_it_is(tmp_path: Path) -> None:
    folder = saved(bert_mlm(), tmp_path / "model")
    tokenizer().save_pretrained(folder)
    rows = [{"tokens": r["tokens"], "tags": [NAMES[i] for i in r["ner_tags"]]} for r in tagged(9)]
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text("\n".join(map(json.dumps, rows)))
    done("fit", data, "--model", folder, "--guide", "map", "--epochs", 1, "--output-dir", run)
    table = [*csv.DictReader(io.StringIO(done("predict", run, data).out))]
    assert len(table) == sum(len(row["tokens"]) for row in rows)
    for row in table:
        assert json.loads(row["tokens"]) == rows[int(row["example"])]["tokens"]
        assert row["target"] == rows[int(row["example"])]["tags"][int(row["position"]) - 1]
    scores = done("evaluate", run, data, "--json").json
    right = [row["predicted"] == row["target"] for row in table]
    assert scores["accuracy"] == pytest.approx(sum(right) / len(right))


# Wrong input -------------------------------------------------------------------------------------


class Slow:
    """A tokenizer that does not say which token belongs to which word."""

    is_fast = False
    model_max_length = 32


@pytest.mark.parametrize(
    ("data", "made", "words"),
    [
        ([{"tokens": ["a", "film"], "tags": [0]}], tokenizer, "example 0 has 2 words.*1 labels"),
        (
            [{"tokens": ["a", "film"], "tags": [0, 3]}],
            tokenizer,
            "3 classes, got labels from 0 to 3",
        ),
        ([{"tokens": ["a"], "tags": [-2]}], tokenizer, "labels from -2 to -2"),
        ([{"tokens": ["a"], "tags": [-100]}], tokenizer, "every token is labelled -100"),
        ([{"tokens": ["a"], "tags": ["X"]}], tokenizer, "names, such as 'X'.*id2label"),
        ([{"tokens": ["a"], "tags": [0]}], Slow, "fast tokenizer, got the slow one Slow.*use_fast"),
        ([{"tokens": ["a"], "tags": [0]}], lambda: None, "no tokenizer"),
        ([{"tokens": ["a"]}], tokenizer, "the data has no labels"),
        ([{"text": "a film", "labels": [0, 1]}], tokenizer, "a tag belongs to a word.*'tokens'"),
        ([{"input_ids": [2, 5, 3], "labels": [1]}], tokenizer, "3 tokens and 1 labels"),
        ([{"input_ids": [2, 5, 3], "labels": 1}], tokenizer, "one whole-number label per"),
        ([{"input_ids": [2, 5], "labels": [0.5, 1.0]}], tokenizer, "one whole-number label per"),
    ],
)
def test_data_that_cannot_be_used_are_refused(data: Any, made: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        prepared(data, made())


def test_a_network_without_logits_per_token_is_refused() -> None:
    options = {"tokenizer": tokenizer(), "adapter": AdapterConfig(r=1), "epochs": 1}
    with pytest.raises(DataError, match=r"one row of logits per token"):
        pyrolora.fit(bert(3), tagged(6), "map", task="token-classification", **options)


def test_a_network_that_gives_fewer_tokens_is_refused() -> None:
    task = TokenClassification()
    with pytest.raises(ConfigError, match=r"each of the 4 tokens.*for 3"):
        task.check_reading(torch.zeros(2, 3, 5), {"labels": torch.zeros(2, 4)}, nn.Identity())


def test_a_head_for_another_task_is_not_taken_for_one_of_tags(tmp_path: Path) -> None:
    folder = saved(bert(3), tmp_path)
    tokenizer().save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"BertForSequenceClassification, whose head.*mismatched"):
        load_network(folder, tagged(4))


def test_a_causal_model_with_tags_is_loaded_for_them(tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path)
    tokenizer().save_pretrained(folder)
    assert type(load_network(folder, tagged(4))[0]).__name__ == "LlamaForTokenClassification"


def test_two_columns_of_tags_are_two_readings() -> None:
    rows = {"tokens": [["a", "film"]], "pos_tags": [[0, 1]], "ner_tags": [[1, 0]]}
    data = datasets.Dataset.from_dict(rows)
    with pytest.raises(DataError, match=r"which of the columns \['ner_tags', 'pos_tags'\]"):
        prepared(data, tokenizer())
    with pytest.warns(UserWarning, match=r"\['ner_tags'\] are not read"):
        ready = prepared(data.rename_column("pos_tags", "labels"), tokenizer())
    assert ready.labels.tolist() == [[-100, 0, 1, -100]]
    alone = prepared(data.remove_columns("ner_tags"), tokenizer())
    assert alone.labels.tolist() == [[-100, 0, 1, -100]]
    with pytest.raises(DataError, match="two labels"):
        prepared(data.rename_columns({"pos_tags": "labels", "ner_tags": "label"}), tokenizer())
    tagged_twice = datasets.Dataset.from_dict({**rows, "words": [["b", "b"]]})
    with pytest.raises(DataError, match=r"columns \['tokens', 'words'\]"):
        prepared(tagged_twice.remove_columns("pos_tags"), tokenizer())


def test_a_label_of_the_sentence_beside_tags_is_named() -> None:
    with pytest.warns(UserWarning, match=r"\['labels'\] are not read"):
        prepared([{"tokens": ["a"], "ner_tags": [1], "labels": 0}], tokenizer())


def test_words_without_a_token_are_named() -> None:
    data = [{"tokens": ["a", " ", "film", ""], "ner_tags": [0, 1, 2, 1]}]
    with pytest.warns(UserWarning, match="2 words have no token.*' ' in example 0"):
        ready = prepared(data, tokenizer())
    assert ready.labels.tolist() == [[-100, 0, 2, -100]]
    with pytest.raises(DataError, match="example 0 has a missing word in 'tokens'"):
        prepared([{"tokens": ["a", None]}], tokenizer(), need_labels=False)


@pytest.mark.parametrize("tag", [-1, -2])
def test_a_tag_that_is_no_class_is_not_ignored_for_the_names_of_the_others(tag: int) -> None:
    network = bert_tags(
        id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)}
    )
    feature = datasets.List(datasets.ClassLabel(names=sorted(NAMES)))
    rows = {"tokens": [["a", "film", "a"]], "ner_tags": [[1, tag, -100]]}
    data = datasets.Dataset.from_dict(rows).cast_column("ner_tags", feature)
    with pytest.raises(DataError, match=f"labels from {tag} to 2; map"):
        prepared(data, tokenizer(), network)


def test_labels_of_tokens_may_be_called_label() -> None:
    ready = prepared([{"input_ids": [2, 5, 3], "label": [-100, 1, -100]}])
    assert ready.labels.tolist() == [[-100, 1, -100]]
    with pytest.raises(DataError, match=r"'ner_tags' or 'tags'.*got \['label', 'tokens'\]"):
        prepared([{"tokens": ["a"], "label": 0}], tokenizer())


def byte_level(**options: bool) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of single characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(**options)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="!")


def test_words_without_the_space_of_byte_level_tokens_are_named() -> None:
    network, data = bert_tags(vocab_size=300), [{"tokens": ["a", "b"], "tags": [0, 1]}]
    with pytest.warns(UserWarning, match="as if no space were before it.*add_prefix_space=True"):
        prepared(data, byte_level(add_prefix_space=False), network)
    ready = prepared(data, byte_level(add_prefix_space=True), network)
    assert ready.labels.tolist() == [[0, -100, 1, -100]]


def test_texts_need_a_tokenizer_that_tells_words_apart() -> None:
    core = Tokenizer(models.BPE({"\u2581": 0, "a": 1, "b": 2, "?": 3}, [], unk_token="?"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    whole = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="?")
    with pytest.raises(DataError, match=r"does not tell the words of a text apart.*'tokens'"):
        prepared(["a b"], whole, need_labels=False)
    ready = prepared([{"tokens": ["a", "b"], "tags": [0, 1]}], whole)
    assert ready.labels.tolist() == [[0, -100, 1, -100]]
