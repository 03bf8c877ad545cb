"""Extractive question answering: the law against transformers' own loss, windows, answers."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from console import done, saved
from peft_trainer import check_map
from problems import (
    WORDS,
    Rows,
    arguments,
    bert,
    bert_mlm,
    bert_spans,
    chat_tokenizer,
    squad,
    tokenizer,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertForQuestionAnswering,
    PreTrainedTokenizerFast,
    XLNetConfig,
    XLNetForQuestionAnsweringSimple,
)

import pyrolora
from pyrolora import AdapterConfig, Posterior
from pyrolora.data import prepare
from pyrolora.data.spans import EXAMPLE, FIRST, NONE, PAST
from pyrolora.errors import ConfigError, DataError
from pyrolora.predictive import SpanPrediction, evaluate
from pyrolora.report import report_on
from pyrolora.tasks import QuestionAnswering, load_network, task_for


def prepared(data: Any, net: Any = None, tokens: Any = None, **options: Any) -> Any:
    net, tokens = bert_spans() if net is None else net, tokenizer() if tokens is None else tokens
    return prepare(data, net, QuestionAnswering(), tokens, **options)


def batch_of(ready: Any) -> dict[str, torch.Tensor]:
    batch: dict[str, torch.Tensor] = ready.collate([ready.examples[i] for i in range(len(ready))])
    return batch


def inputs_of(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    beside = {"labels", *QuestionAnswering.extras}
    return {name: t for name, t in batch.items() if name not in beside}


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    options = {"tokenizer": tokenizer(), "adapter": AdapterConfig(r=2), "seed": 0}
    return pyrolora.fit(bert_spans(), squad(8, 40), "meanfield", epochs=2, **options)


# The law -----------------------------------------------------------------------------------------


def test_the_likelihood_is_transformers_own_loss_summed_over_both_ends() -> None:
    net, task = bert_spans(), QuestionAnswering()
    batch = batch_of(prepared(squad(5), net))  # all of one length: padding has no probability here
    start, end = batch["labels"].unbind(-1)
    loss = net(**inputs_of(batch), start_positions=start, end_positions=end).loss
    output = task.output(net(**inputs_of(batch)))
    torch.testing.assert_close(-task.log_prob(output, batch).sum(), 2 * 5 * loss)


def test_a_batch_may_have_the_columns_of_transformers(posterior: Posterior) -> None:
    batch = batch_of(prepared(squad(4)))
    first, last = batch["labels"].unbind(-1)
    columns = {**inputs_of(batch), "start_positions": first, "end_positions": last}
    task, joint = posterior.task, posterior.model
    with torch.no_grad():
        output = joint.network(batch, joint.program.mean())
        again = joint.network(columns, joint.program.mean())
    torch.testing.assert_close(task.log_prob(again, columns), task.log_prob(output, batch))


def test_a_map_fit_is_that_of_peft_and_the_trainer(tmp_path: Path) -> None:
    """transformers' loss is the mean of both ends: it takes steps that are twice as long."""
    plain = {"optim": "sgd", "max_grad_norm": 0.0}
    net = bert_spans(initializer_range=0.3)
    ready = prepared(squad(12), net)

    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        batch = ready.collate(rows)
        start, end = batch["labels"].unbind(-1)
        return {**inputs_of(batch), "start_positions": start, "end_positions": end}

    check_map(
        net,
        squad(12),
        ready.examples,
        collate,
        kind="QUESTION_ANS",
        head="qa_outputs",
        ours=arguments(tmp_path / "ours", learning_rate=0.1, **plain),
        theirs=arguments(
            tmp_path / "theirs", learning_rate=0.2, remove_unused_columns=False, **plain
        ),
        tokenizer=tokenizer(),
    )


def test_padding_changes_nothing(posterior: Posterior) -> None:
    data = datasets.concatenate_datasets([squad(3, 5), squad(3, 11), squad(3, 60)])
    whole = posterior.predict(data, 3, seed=0, batch_size=9)
    single = posterior.predict(data, 3, seed=0, batch_size=1)
    torch.testing.assert_close(whole.log_likelihood, single.log_likelihood, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole.draws, single.draws, atol=1e-5, rtol=1e-5)
    assert whole.texts == single.texts


def test_the_curvature_is_the_hessian_on_average() -> None:
    task, output = QuestionAnswering(), torch.randn(1, 3, 2)
    batch = {"labels": torch.tensor([[0, 2]])}
    exact = torch.autograd.functional.hessian(lambda f: -task.log_prob(f, batch).sum(), output)
    torch.manual_seed(0)
    vectors = next(task.curvature(output.expand(50_000, -1, -1), {})).flatten(1)
    found = vectors.T @ vectors / len(vectors)
    torch.testing.assert_close(found, exact.reshape(6, 6), atol=0.02, rtol=0.0)


def test_a_draw_is_the_network_with_its_update_in_the_weights(posterior: Posterior) -> None:
    data, net, task = squad(4, seed=1), bert_spans(), QuestionAnswering()
    drawn = posterior.predict(data, draws=[1])
    with torch.no_grad():
        for name, (A, B) in posterior.factors(posterior.sample(draws=[1])).items():
            scaling = posterior.bank.specs[name].scaling
            net.get_submodule(name).weight += scaling * B[0] @ A[0]
        for name, (head, *_) in posterior.model.named_heads().items():
            net.get_submodule(name).load_state_dict(head.state_dict())
        batch = batch_of(prepared(data, net))
        scores = task.log_prob(task.output(net(**inputs_of(batch))), batch)
    torch.testing.assert_close(drawn.log_likelihood[0], scores, atol=1e-5, rtol=1e-4)


# Windows -----------------------------------------------------------------------------------------


def test_the_labels_are_the_tokens_of_the_answers() -> None:
    ready = prepared(squad(6))
    for row, source in zip(ready.examples, squad(6), strict=True):
        start, end = row["labels"]
        words = tokenizer().convert_ids_to_tokens(row["input_ids"][start : end + 1])
        assert words == (source["answers"]["text"] or ["[CLS]"])


def test_a_long_context_has_windows_that_hold_it_all() -> None:
    """A window without the answer has that of CLS, and one of those with it has its place."""
    data = squad(6, 60)
    ready = prepared(data)
    batch = batch_of(ready)
    assert len(ready) > 2 * len(data)
    assert batch["input_ids"].shape[-1] == 32
    for i, source in enumerate(data):
        rows = (batch[EXAMPLE] == i).nonzero().flatten().tolist()
        seen = {int(c) for row in rows for c in batch[FIRST][row] if c >= 0}
        spaces = [k for k, c in enumerate(source["context"]) if c == " "]
        assert seen == {0, *(k + 1 for k in spaces)}
        places = set()
        for row in rows:
            start, end = batch["labels"][row].tolist()
            if start != int(batch[NONE][row]):
                places.add((int(batch[FIRST][row, start]), int(batch[PAST][row, end])))
        answers = source["answers"]
        spans = zip(answers["answer_start"], answers["text"], strict=True)
        assert places == {(start, start + len(text)) for start, text in spans}


def test_the_context_comes_first_where_padding_is_left() -> None:
    tokens = tokenizer()
    tokens.padding_side = "left"
    ready = prepared(squad(4, 40), tokens=tokens)
    row = next(r for r in ready.examples if r["labels"] != [0, 0])
    assert tokens.convert_ids_to_tokens(row["input_ids"][slice(*row["labels"])]) in ([], ["good"])
    start, end = row["labels"]
    assert tokens.decode(row["input_ids"][start : end + 1]) in ("good", "bad")
    assert row[FIRST][-2] == -1  # the question, and the last special token


def test_padding_on_the_left_moves_no_answer() -> None:
    """XLNet's tokenizer pads on the left, and ends a text with the token for no answer."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="$A [SEP] [CLS]",
        pair="$A [SEP] $B:1 [SEP]:1 [CLS]:2",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    tokens = PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **special)
    sizes = {"vocab_size": len(WORDS), "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32}
    net = XLNetForQuestionAnsweringSimple(XLNetConfig(**sizes, dropout=0.0)).eval()
    data = datasets.concatenate_datasets([squad(3, 5), squad(3, 11)])
    batch = batch_of(prepared(data, net, tokens))
    starts = [row["text"][:1] or ["[CLS]"] for row in data["answers"]]
    found = batch["input_ids"].gather(1, batch["labels"])
    assert found.tolist() == [[WORDS.index(word)] * 2 for (word,) in starts]
    task = QuestionAnswering()
    with torch.no_grad():
        single = [batch_of(prepared(data.select([i]), net, tokens)) for i in range(len(data))]
        apart = [task.log_prob(task.output(net(**inputs_of(b))), b) for b in single]
        together = task.log_prob(task.output(net(**inputs_of(batch))), batch)
    torch.testing.assert_close(together, torch.cat(apart))


def test_white_space_around_an_answer_does_not_count() -> None:
    context = "  good film is bad "
    answers = [("  good", 0), ("good ", 2), (" bad ", 14), (" is ", 11), (context, 0)]
    rows = [
        {"question": "the", "context": context, "answers": {"text": [t], "answer_start": [s]}}
        for t, s in answers
    ]
    ready = prepared(datasets.Dataset.from_list(rows))
    for row, (text, _) in zip(ready.examples, answers, strict=True):
        first, last = row["labels"]
        assert context[row[FIRST][first] : row[PAST][last]] == text.strip()


def test_answers_have_no_white_space_around_them() -> None:
    """The tokens of GPT-2 begin with the space before their word."""
    tokens = chat_tokenizer()
    tokens.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    net = bert_spans(vocab_size=len(tokens), max_position_embeddings=128)
    rows = prepared(squad(3), net, tokens).examples
    for row, context in zip(rows, squad(3)["context"], strict=True):
        pieces = [context[a:b] for a, b in zip(row[FIRST], row[PAST], strict=True) if a >= 0]
        assert pieces == [letter.strip() for letter in context]


def test_an_answer_longer_than_the_overlap_is_told() -> None:
    context = " ".join(["film", "book"] * 30)
    answers = {"text": [context[5:-5]], "answer_start": [5]}
    row = {"question": "is the film good", "context": context, "answers": answers}
    with pytest.warns(UserWarning, match="answers of 1 of 2 examples.*that of example 1"):
        ready = prepared([squad(2)[0] | {"title": None, "id": None}, row])
    assert all(label == [0, 0] for label in list(ready.examples["labels"])[1:])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"answers": {"text": ["good"], "answer_start": [2]}}, "at character 2 of its context"),
        ({"answers": {"text": ["good"]}}, "give a dict of two lists"),
        ({"answers": ["good"]}, "give a dict of two lists"),
        ({"question": "film " * 40}, "40 tokens.*no room"),
        ({"context": None}, "missing values"),
    ],
)
def test_data_that_cannot_be_read_are_told(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        prepared(squad(3, **changes))


def test_other_columns_are_told() -> None:
    with pytest.raises(DataError, match="'question', 'context' and 'answers'"):
        prepared(squad(3).rename_column("context", "passage"))
    rows = [{"input_ids": [2, 4, 3, 5, 3], "start_positions": 3, "end_positions": 7}] * 2
    with pytest.raises(DataError, match="from token 3 to token 7, and it has 5"):
        prepared(rows)
    with pytest.raises(DataError, match="task='question-answering'"):
        prepare(rows, bert(), pyrolora.tasks.Classification())


def test_both_forms_of_answers_are_one() -> None:
    data, rows = squad(4), []
    for row in data:
        pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        rows.append({**row, "answers": [{"text": t, "answer_start": s} for t, s in pairs]})
    torch.testing.assert_close(prepared(rows).labels, prepared(data).labels)
    lost = squad(4, is_impossible=True)
    assert not prepared(lost).labels.any()


@pytest.mark.parametrize("form", [lambda rows: rows, Rows])
def test_tokens_with_positions_are_windows(form: Any) -> None:
    raw = prepared(squad(5))
    rows = [
        {
            "input_ids": row["input_ids"],
            "start_positions": row["labels"][0],
            "end_positions": row["labels"][1],
        }
        for row in raw.examples
    ]
    ready = prepared(form(rows))
    torch.testing.assert_close(ready.labels, raw.labels)
    batch, known = batch_of(ready), batch_of(raw)
    torch.testing.assert_close(batch[FIRST] >= 0, known[FIRST] >= 0)
    torch.testing.assert_close(batch[NONE], known[NONE])
    assert "start_positions" not in batch


# The network -------------------------------------------------------------------------------------


def test_the_network_says_the_task(tmp_path: Path) -> None:
    assert task_for(bert_spans()).name == "question-answering"
    assert task_for(bert_spans(), "QUESTION_ANS").name == "question-answering"
    with pytest.raises(ConfigError, match="name 'question-answering'"):
        task_for(bert_spans(), "classification")
    with pytest.raises(ConfigError, match="start_logits"):
        pyrolora.fit(bert(), squad(4), "map", task="question-answering", tokenizer=tokenizer())
    net, _ = load_network(saved(bert_mlm(), tmp_path), squad(4))
    assert isinstance(net, BertForQuestionAnswering)


# The prediction ----------------------------------------------------------------------------------


def record_of(scores: torch.Tensor, offsets: list[int]) -> dict[str, torch.Tensor]:
    """The record of one window whose token 0 is CLS; token t begins at ``offsets[t]``."""
    batch = {
        FIRST: torch.tensor([offsets]),
        PAST: torch.tensor([[c + 1 if c >= 0 else -1 for c in offsets]]),
        NONE: torch.tensor([0]),
        EXAMPLE: torch.tensor([0]),
    }
    return SpanPrediction.reduce(QuestionAnswering(), [scores[:, None]], batch)


@pytest.mark.parametrize("likely", [0, 2, 4])
def test_the_answer_is_the_likeliest_over_all_windows(likely: int) -> None:
    """Against the definition, span by span; the windows share the characters 2 and 3.

    They have fewer spans than are kept, and the last token ends no text but the context.
    """
    outputs, offsets = (
        [torch.randn(3, 5, 2), torch.randn(3, 5, 2)],
        [[-1, 0, 1, 2, 3], [-1, 2, 3, 4, 5]],
    )
    for output in outputs:
        output[:, likely] += 4
    made = SpanPrediction.collect(
        [record_of(output, own) for output, own in zip(outputs, offsets, strict=True)],
        QuestionAnswering(),
    )
    odds: dict[tuple[int, int], torch.Tensor] = {}
    for output, own in zip(outputs, offsets, strict=True):
        p = output.softmax(-2)
        none = p[:, 0, 0] * p[:, 0, 1]
        for a, b in itertools.combinations_with_replacement(range(1, 5), 2):
            span = (own[a], own[b] + 1)
            odds[span] = odds.get(span, torch.zeros(3)) + p[:, a, 0] * p[:, b, 1] / none
    total = 1 + torch.stack([*odds.values()]).sum(0)
    probs = {span: value / total for span, value in odds.items()} | {(-1, -1): 1 / total}
    best = max(probs, key=lambda span: float(probs[span].mean()))
    assert tuple(made.span[0].tolist()) == best
    torch.testing.assert_close(made.draws[:, 0], probs[best])
    assert math.isclose(float(sum(p.mean() for p in probs.values())), 1, rel_tol=1e-5)


def test_metrics_by_hand() -> None:
    zeros = torch.zeros(4)
    made = SpanPrediction(
        targets=torch.tensor([[0, 4], [0, 4], [-1, -1], [0, 4]]),
        log_likelihood=torch.log(torch.tensor([[0.5, 0.25, 0.5, 0.5]])),
        draws=torch.full((1, 4), 0.5),
        span=torch.tensor([[0, 4], [0, 4], [-1, -1], [-1, -1]]),
        start_entropy=zeros,
        end_entropy=zeros,
        aleatoric=zeros,
        windows=torch.ones(4).long(),
        texts=("The good film", "good book", "", ""),
        references=(("bad", "good film."), ("good film",), ("",), ("good",)),
    )
    found = evaluate(made)
    assert found["exact_match"] == pytest.approx(0.5)  # articles and dots do not count
    assert found["f1"] == pytest.approx((1 + 0.5 + 1 + 0) / 4)
    assert found["nll"] == pytest.approx(5 * math.log(2) / 4)
    assert {*found} == {*SpanPrediction.higher_is_better}


def test_it_works_end_to_end(posterior: Posterior, tmp_path: Path) -> None:
    data = squad(5, 40, seed=2)
    prediction = posterior.predict(data, 4, seed=0)
    assert prediction.texts == tuple(
        row["context"][max(a, 0) : max(b, 0)]
        for row, (a, b) in zip(data, prediction.span.tolist(), strict=True)
    )
    answers = [row["answers"]["text"] or [""] for row in data]
    assert [*prediction.to_pandas()["target"]] == [known[0] for known in answers]
    bare = posterior.predict(data.remove_columns("answers"), 4, seed=0)
    assert bare.texts == prediction.texts
    assert bare.targets is None
    train = posterior.to_arviz(8, data=squad(8, 40), log_likelihood=True, seed=0)
    assert train["log_likelihood"]["y"].shape == (1, 8, 8)
    assert train["log_likelihood"].attrs["num_examples"] == 8  # not of windows
    report = report_on(posterior, data, num_samples=3, seed=0)
    assert "(no answer)" in report.html
    assert 0 <= report.metrics["f1"] <= 1
    posterior.save(tmp_path / "saved")
    loaded = pyrolora.load(tmp_path / "saved", bert_spans())
    torch.testing.assert_close(loaded.predict(data, 4, seed=0).draws, prediction.draws)
    posterior.to_peft(tmp_path / "adapter")
    back = pyrolora.from_peft(tmp_path / "adapter", bert_spans(), tokenizer=tokenizer())
    torch.testing.assert_close(back.predict(data, 0).draws, posterior.predict(data, 0).draws)


def test_curvature_and_evaluation_in_a_fit() -> None:
    options = {"tokenizer": tokenizer(), "adapter": AdapterConfig(r=1), "epochs": 1, "seed": 0}
    fitted = pyrolora.fit(bert_spans(), squad(6), "laplace", eval_data=squad(4), **options)
    assert fitted.predict(squad(4), 3).epistemic.shape == (4,)
    assert any("eval_f1" in entry for entry in fitted.history)


def test_from_a_shell(tmp_path: Path) -> None:
    model, rows, run = (
        saved(bert_spans(), tmp_path / "model"),
        tmp_path / "rows.jsonl",
        tmp_path / "run",
    )
    rows.write_text("".join(json.dumps(row) + "\n" for row in squad(6, 40).to_list()))
    table = tmp_path / "table.jsonl"
    fit = ("--model", model, "--guide", "map", "--epochs", 1, "--output-dir", run)
    done("fit", rows, *fit, "--eval-data", rows)
    assert 0 <= done("evaluate", run, rows, "--json").json["exact_match"] <= 1
    done("predict", run, rows, "--output", table)
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    assert len(lines) == 6
    assert all(line["predicted"] in line["context"] for line in lines)
