"""Sequence to sequence: the fit, the scores and the texts are those of transformers and PEFT."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from peft_trainer import Start
from problems import absolute, arguments, bart, bert, summaries, t5, writer_tokenizer
from transformers import (
    DataCollatorForSeq2Seq,
    MBartConfig,
    MBartForConditionalGeneration,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5ForConditionalGeneration,
)

import pyrolora
from pyrolora import AdapterConfig, tasks
from pyrolora.columns import IGNORED
from pyrolora.data import prepare
from pyrolora.errors import ConfigError, DataError
from pyrolora.guides import MonteCLoRA
from pyrolora.inference.arguments import check_arguments
from pyrolora.inference.curvature import kfac
from pyrolora.predictive import TokenPrediction
from pyrolora.tasks import Seq2Seq, task_for

NETWORKS = {"T5": t5, "BART": bart}
ADAPTER = AdapterConfig(r=2, target_modules="all-linear")
WIDE = absolute(MonteCLoRA, sample_scale=1.0, init_covariance=1.0)


def tokenised(data: datasets.Dataset) -> datasets.Dataset:
    """The tokens of `summaries`, by transformers alone."""
    read = writer_tokenizer()
    rows = []
    for row in data:
        labels = read(text_target=row["summary"])["input_ids"]
        rows.append({**read(row["document"]), "labels": labels})
    return datasets.Dataset.from_list(rows).select_columns(
        ["input_ids", "attention_mask", "labels"]
    )


def batched(network: Any, data: datasets.Dataset) -> dict[str, torch.Tensor]:
    """One batch by transformers' own collator."""
    return DataCollatorForSeq2Seq(writer_tokenizer(), network)([*tokenised(data)])


def scores(network: Any, data: datasets.Dataset) -> list[float]:
    """log p(y | x) of each example by its own loss, without padding."""
    found = []
    for row in tokenised(data):
        loss = network(**{name: torch.tensor([value]) for name, value in row.items()}).loss
        found.append(-float(loss.detach()) * len(row["labels"]))
    return found


def batched_inputs(posterior: pyrolora.Posterior) -> dict[str, torch.Tensor]:
    """The same batch by the posterior's collator."""
    data, network = summaries(5), posterior.base
    prepared = prepare(data, network, posterior.task, posterior.tokenizer)
    return prepared.collate([*prepared.examples])


@pytest.fixture(scope="module", params=NETWORKS)
def posterior(request: pytest.FixtureRequest) -> pyrolora.Posterior:
    return pyrolora.fit(
        NETWORKS[request.param](), summaries(), WIDE, tokenizer=writer_tokenizer(), epochs=1,
        learning_rate=1e-2, adapter=ADAPTER,
    )  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_map_equals_peft_and_the_seq2seq_trainer(name: str, tmp_path: Path) -> None:
    """Texts of several lengths in one batch, from the same start; weight decay and clipping too."""
    data, changes = summaries(8), {"max_steps": 4, "weight_decay": 0.1, "max_grad_norm": 0.5}
    changes |= {"per_device_train_batch_size": 8, "learning_rate": 3e-2}
    start = Start()
    posterior = pyrolora.fit(
        NETWORKS[name](), data, "map", tokenizer=writer_tokenizer(), adapter=ADAPTER,
        training=arguments(tmp_path, **changes), callbacks=start,
    )  # fmt: skip
    config = peft.LoraConfig(
        r=2, lora_alpha=ADAPTER.lora_alpha, target_modules="all-linear", task_type="SEQ_2_SEQ_LM"
    )
    model = peft.get_peft_model(NETWORKS[name](), config)
    layers = {n: model.get_submodule(f"base_model.model.{n}") for n in start.factors}
    with torch.no_grad():
        for n, (A, B) in start.factors.items():
            layers[n].lora_A["default"].weight.copy_(A)
            layers[n].lora_B["default"].weight.copy_(B)
    options = arguments(tmp_path, **changes, remove_unused_columns=False).to_dict()
    args = Seq2SeqTrainingArguments(
        **{n: v for n, v in options.items() if not str(v).startswith("<")}
    )
    Seq2SeqTrainer(
        model=model, args=args, train_dataset=tokenised(data),
        data_collator=DataCollatorForSeq2Seq(writer_tokenizer(), model),
    ).train()  # fmt: skip
    for n, (A, B) in posterior.factors().items():
        assert not torch.allclose(A, start.factors[n][0], atol=1e-3)
        torch.testing.assert_close(A, layers[n].lora_A["default"].weight, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(B, layers[n].lora_B["default"].weight, atol=1e-4, rtol=1e-3)


def test_scores_are_the_networks_own_loss_without_padding(posterior: pyrolora.Posterior) -> None:
    """In one batch of several lengths, of draws that share a pass."""
    assert posterior.model.together(batched_inputs(posterior))
    data = summaries(6, seed=1)
    found = posterior.log_likelihood(data, draws=[0, 2])
    for row, k in zip(found.tolist(), (0, 2), strict=True):
        assert row == pytest.approx(scores(posterior.merge(draw=k), data), abs=1e-4)
    assert (found[0] - found[1]).abs().min() > 1e-3


def test_a_prediction_has_the_uncertainty_of_every_token(posterior: pyrolora.Posterior) -> None:
    data = summaries(5)
    made = posterior.predict(data, draws=[0, 1, 2])
    assert isinstance(made, TokenPrediction)
    sizes = [len(row["labels"]) for row in tokenised(data)]
    assert made.num_tokens.tolist() == sizes
    assert made.entropy.isfinite().sum(1).tolist() == sizes
    batch = batched(posterior.base, data)
    logits = [posterior.merge(draw=k)(**batch).logits.detach() for k in range(3)]
    probs = torch.stack(logits).softmax(-1).mean(0)
    entropy = -(probs * probs.log()).sum(-1)[batch["labels"].ne(IGNORED)]
    torch.testing.assert_close(made.entropy[made.entropy.isfinite()], entropy, atol=1e-4, rtol=1e-4)
    metrics = posterior.evaluate(data, draws=[0, 1, 2])
    assert metrics["perplexity"] == pytest.approx(torch.tensor(metrics["nll"]).exp().item())


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}]
)
def test_texts_are_those_of_merged_networks_and_scored_by_all(
    posterior: pyrolora.Posterior, options: dict[str, int]
) -> None:
    """Prompts of several lengths in one pass; each draw writes as its merged network does alone."""
    prompts, several = (
        ["the film is good", "bad", "very dull film"],
        1 + ("num_return" in str(options)),
    )
    made = posterior.generate(prompts, draws=[0, 2], max_new_tokens=5, **options)
    for d, k in enumerate((0, 2)):
        network = posterior.merge(draw=k)
        for i, prompt in enumerate(prompts):
            ids = torch.tensor([writer_tokenizer()(prompt)["input_ids"]])
            rows = network.generate(ids, max_new_tokens=5, **options)[:, 1:].tolist()
            for j, row in enumerate(rows):
                end = row.index(3) + 1 if 3 in row else len(row)
                place = d * several + j
                own = made.sequences[i, place][made.mask[i, place]]
                assert own.tolist() == row[:end]
                read = torch.tensor([[network.config.decoder_start_token_id, *own[:-1].tolist()]])
                logits = network(input_ids=ids, decoder_input_ids=read).logits.log_softmax(-1)
                score = logits[0].gather(-1, own[:, None]).sum().item()
                assert made.log_likelihood[d, i, place].item() == pytest.approx(score, abs=1e-4)


def test_a_posterior_comes_back_by_the_networks_path(tmp_path: Path) -> None:
    """Fitted by name; saved, loaded, exported and read by PEFT and from PEFT, all by the path."""
    t5().save_pretrained(tmp_path / "base")
    writer_tokenizer().save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    found = pyrolora.fit(base, summaries(), "map", epochs=1, learning_rate=1e-2)
    assert found.task.name == "text2text-generation"
    implied = tasks.load_network(base, tokenised(summaries()))
    assert isinstance(implied[0], T5ForConditionalGeneration)
    expected = found.log_likelihood(summaries(), 0)
    found.save(tmp_path / "run")
    torch.testing.assert_close(
        pyrolora.load(tmp_path / "run").log_likelihood(summaries(), 0), expected
    )
    found.to_peft(tmp_path / "peft")
    back = pyrolora.from_peft(tmp_path / "peft", base)
    torch.testing.assert_close(back.log_likelihood(summaries(), 0), expected)
    model = peft.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "peft")
    assert expected[0].tolist() == pytest.approx(scores(model, summaries()), abs=1e-4)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
@pytest.mark.parametrize("posterior", ["T5"], indirect=True)
def test_draws_are_checked_by_leave_one_out_and_shown_in_a_report(
    posterior: pyrolora.Posterior, tmp_path: Path
) -> None:
    arviz = pytest.importorskip("arviz")
    made = posterior.to_arviz(8, data=summaries(), log_likelihood=True, seed=0)
    assert arviz.loo(made).n_data_points == 12
    posterior.report(tmp_path / "report.html", summaries(), num_samples=2)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Token by token" in page
    assert re.search(r'title="[^"]*nats">(good|bad)</span>', page)


def test_curvature_does_not_count_padding_whatever_the_lengths(
    posterior: pyrolora.Posterior,
) -> None:
    """Encoder and decoder are told apart even where they have as many positions."""
    rows = [
        {"input_ids": [5, 6, 7, 3], "attention_mask": [1] * 4, "labels": [8, 3]},
        {"input_ids": [9, 3], "attention_mask": [1, 1], "labels": [10, 11, 12, 3]},
    ]
    joint = posterior.model
    prepared = prepare(datasets.Dataset.from_list(rows), joint.base, joint.task, writer_tokenizer())
    found = kfac(joint, prepared.loader(2))
    alone = kfac(joint, prepared.loader(1))
    for name, block in found.items():
        if name.endswith(".A"):  # means of inputs, which are not random
            torch.testing.assert_close(block.columns, alone[name].columns, atol=1e-5, rtol=1e-4)


LABELLED = {"input_ids": [5, 6, 3], "labels": [7, 8, 3]}


def test_decoder_inputs_are_the_labels_one_place_on_or_refused() -> None:
    options = {"tokenizer": writer_tokenizer(), "epochs": 1, "adapter": ADAPTER}
    plain = pyrolora.fit(t5(), [LABELLED] * 2, "map", **options)
    told = pyrolora.fit(t5(), [{**LABELLED, "decoder_input_ids": [0, 7, 8]}] * 2, "map", **options)
    for (A, B), (C, D) in zip(plain.factors().values(), told.factors().values(), strict=True):
        assert torch.equal(A, C)
        assert torch.equal(B, D)
    for wrong in ([7, 8, 3], [0, 7], [0, 7, 9]):
        with pytest.raises(DataError, match="not its labels one place on"):
            pyrolora.fit(t5(), [{**LABELLED, "decoder_input_ids": wrong}] * 2, "map", **options)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"labels": [7, -100, 3]}, r"-100 before the last token to write.*fill-mask"),
        ({"labels": [-100, -100, 3]}, r"-100 before the last token to write.*decoder_input_ids"),
        ({"labels": [7, 3, 0, 0]}, r"example 0 end with 2 times the token 0.*-100"),
        ({"labels": []}, "at least one"),
        ({"completion_mask": [0, 1, 1]}, r"\['completion_mask'\].*label -100"),
        ({"labels": [7] * 30}, "30 labels.*24 positions"),
        ({"labels": [7, 99]}, r"0\.\.15 or -100"),
        ({"labels": [0.5, 1.5]}, "token ids as 'labels'"),
        ({"labels": [IGNORED, IGNORED]}, "every token is labelled -100"),
    ],
)
def test_labels_that_no_decoder_writes(row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        pyrolora.fit(bart(), [{**LABELLED, **row}] * 2, tokenizer=writer_tokenizer())


def test_texts_need_a_tokenizer() -> None:
    with pytest.raises(DataError, match="there is no tokenizer"):
        pyrolora.fit(t5(), summaries(2))


def test_without_texts_to_write_there_is_nothing_to_score(posterior: pyrolora.Posterior) -> None:
    with pytest.raises(DataError, match=r"texts to write.*generate\(\) writes"):
        posterior.predict([{"document": "the film"}])
    with pytest.raises(DataError, match=r"nothing to score.*generate"):
        posterior.predict([{"input_ids": [5, 6, 3]}])


@pytest.mark.parametrize("name", ["SEQ_2_SEQ_LM", "seq-2-seq-lm", "summarization", "translation"])
def test_names(name: str) -> None:
    assert isinstance(task_for(t5(), name), Seq2Seq)


def test_networks_that_cannot_write_apart_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no encoder-decoder.*that writes text"):
        task_for(bert(), "seq2seq")
    with pytest.raises(ConfigError, match="decoder_start_token_id"):
        task_for(t5(decoder_start_token_id=None))


def test_the_start_of_the_decoder_is_that_of_the_language() -> None:
    """MBart's labels end with the language, which its decoder begins with; texts do not."""
    torch.manual_seed(0)
    config = MBartConfig(**{n: getattr(bart().config, n) for n in (
        "vocab_size", "d_model", "encoder_layers", "decoder_layers", "encoder_ffn_dim",
        "decoder_ffn_dim", "encoder_attention_heads", "decoder_attention_heads",
        "max_position_embeddings", "pad_token_id", "eos_token_id")}, init_std=0.3)  # fmt: skip
    config.decoder_start_token_id = None
    rows = [{"input_ids": [5, 6, 3, 15], "labels": [7, 8, 3, 14]}] * 2
    posterior = pyrolora.fit(MBartForConditionalGeneration(config).eval(), rows, "map",
                             tokenizer=writer_tokenizer(), epochs=1)  # fmt: skip
    made = posterior.generate([[5, 6, 3, 15]], 0, max_new_tokens=3, decoder_start_token_id=14)
    network, own = posterior.merge(), made.sequences[0, 0][made.mask[0, 0]]
    read = torch.tensor([[14, *own[:-1].tolist()]])
    logits = network(input_ids=torch.tensor([[5, 6, 3, 15]]), decoder_input_ids=read).logits
    expected = logits.log_softmax(-1)[0].gather(-1, own[:, None]).sum().item()
    assert made.log_likelihood[0, 0, 0].item() == pytest.approx(expected, abs=1e-5)


def test_a_batch_is_that_of_transformers(posterior: pyrolora.Posterior) -> None:
    ours, theirs = batched_inputs(posterior), batched(posterior.base, summaries(5))
    read = {**ours, **posterior.task.inputs(ours, posterior.base)}
    for name in theirs:
        assert torch.equal(read[name], theirs[name])


def test_the_trainers_arguments_for_sequences_ask_for_nothing_by_default(tmp_path: Path) -> None:
    check_arguments(Seq2SeqTrainingArguments(tmp_path, use_cpu=True, report_to="none"))
    generating = Seq2SeqTrainingArguments(tmp_path, use_cpu=True, predict_with_generate=True)
    with pytest.raises(ConfigError, match=r"no effect here.*predict_with_generate"):
        check_arguments(generating)
