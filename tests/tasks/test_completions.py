"""Completions of a causal language model: against PEFT, packed against not, from file to text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from console import done, pyrolora_, refused
from peft_trainer import lora_layers
from problems import arguments, bert, chat_tokenizer, llama, tokens
from transformers import Trainer
from trl import SFTConfig

import pyrolora
from pyrolora import AdapterConfig, TextOptions
from pyrolora.data import prepare
from pyrolora.errors import ConfigError, DataError
from pyrolora.guides import MAP, MonteCLoRA
from pyrolora.tasks import CausalLM

TARGETS = ["q_proj", "v_proj"]
ROWS = [{"prompt": "q" * (i + 1), "completion": "a" * (2 + i % 4)} for i in range(9)]
CHATS = [
    {"messages": [{"role": "user", "content": c}, {"role": "assistant", "content": c * 2}]}
    for c in "abcdef"
]
SMALL = TextOptions(max_length=32)
PACKED = TextOptions(max_length=32, packing=True)


def decoder(**changes: Any) -> Any:
    return llama(vocab_size=261, max_position_embeddings=64, initializer_range=0.3, **changes)


def fitted(rows: Any = ROWS, guide: Any = "map", network: Any = None, **options: Any) -> Any:
    usual = {"tokenizer": chat_tokenizer(), "adapter": AdapterConfig(r=2), "seed": 1}
    if "training" not in options:
        usual |= {"epochs": 2, "batch_size": 4}
    else:
        usual.pop("seed")
    return pyrolora.fit(decoder() if network is None else network, rows, guide, **usual | options)


@pytest.fixture(scope="module")
def posterior() -> Any:
    return fitted(CHATS, MonteCLoRA(sample_scale=0.5), texts=TextOptions(assistant_only_loss=True))


# The objective --------------------------------------------------------------------------------


def by_hand() -> list[dict[str, list[int]]]:
    """The rows with labels of -100 at the prompt, written without the library."""
    eos = chat_tokenizer().eos_token_id
    pairs = [
        (chat_tokenizer()(r["prompt"])["input_ids"], chat_tokenizer()(r["completion"])["input_ids"])
        for r in ROWS
    ]
    return [
        {"input_ids": [*p, *c, eos], "labels": [-100] * len(p) + [*c, eos], "attention_mask": [1]
         * (len(p) + len(c) + 1)}
        for p, c in pairs
    ]  # fmt: skip


def test_completions_are_learnt_as_peft_and_the_trainer_learn_labels_by_hand(
    tmp_path: Path,
) -> None:
    """Batches of all rows: both objectives then are the mean over all labelled tokens."""
    ours = fitted(
        training=arguments(tmp_path / "ours", max_steps=4, per_device_train_batch_size=9, seed=1),
        adapter=AdapterConfig(r=2, lora_alpha=4, target_modules=TARGETS),
    )
    start = fitted(
        training=arguments(tmp_path / "start", max_steps=1, learning_rate=1e-12, seed=1),
        adapter=AdapterConfig(r=2, lora_alpha=4, target_modules=TARGETS),
    ).factors()
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(decoder(), config)
    layers = lora_layers(model, {n: (A, torch.zeros_like(B)) for n, (A, B) in start.items()})
    padded = Padded(by_hand())
    Trainer(
        model=model,
        args=arguments(tmp_path / "peft", max_steps=4, per_device_train_batch_size=9, seed=1),
        train_dataset=padded.rows,
        data_collator=padded.batch,
    ).train()
    for name, (A, B) in ours.factors().items():
        torch.testing.assert_close(A, layers[name].lora_A["default"].weight, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(B, layers[name].lora_B["default"].weight, rtol=1e-3, atol=1e-5)


class Padded:
    """Rows of several lengths, padded by hand."""

    def __init__(self, rows: list[dict[str, list[int]]]) -> None:
        self.rows = rows

    def batch(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        fill = {"input_ids": 256, "labels": -100, "attention_mask": 0}
        return {
            name: torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(row[name]) for row in rows], True, value
            )
            for name, value in fill.items()
        }


# Packing --------------------------------------------------------------------------------------


def test_packed_texts_are_the_same_fit() -> None:
    alone, packed = (fitted(texts=t, batch_size=64) for t in (SMALL, PACKED))
    assert alone.model.num_examples == packed.model.num_examples == len(ROWS)
    for field in ("log_likelihood", "loss", "grad_norm"):
        first = [entry[field] for entry in alone.history if field in entry]
        assert first == pytest.approx([e[field] for e in packed.history if field in e], rel=1e-5)
    for name, pair in packed.factors().items():
        for found, expected in zip(pair, alone.factors()[name], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(packed.log_likelihood(ROWS, 0), alone.log_likelihood(ROWS, 0))


def test_packed_rows_of_a_batch_stand_for_all_rows() -> None:
    """The mean over all batches of one row is the log-likelihood of all texts."""
    task = CausalLM()
    task.texts = PACKED
    network, tokenizer = decoder(), chat_tokenizer()
    packed = prepare(ROWS, network, task, tokenizer, to_pack=True)
    assert len(packed) < packed.num_examples == len(ROWS)
    posterior = fitted(texts=PACKED, guide=MAP(), network=network)
    whole = posterior.log_likelihood(ROWS, 0).sum()
    joint = posterior.model
    rows = []
    with torch.no_grad():
        for batch in packed.loader(1):
            output = joint.network(batch, joint.program.mean())
            rows.append(joint.task.log_prob(output, batch).sum())
    torch.testing.assert_close(torch.stack(rows).sum(), whole)
    assert joint.rows == joint.num_examples  # an example is a row, from the end of the fit on


def test_packing_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="packed in one row see each other"):
        fitted([{"input_ids": [5, 6, 7]}] * 4, network=Blind(decoder()), texts=PACKED,
               task="causal-lm", adapter=AdapterConfig(r=1, target_modules=["q_proj"]))  # fmt: skip
    beside = [{"input_ids": [5, 6], "inputs_embeds": [[0.0], [1.0]]}] * 2
    with pytest.raises(DataError, match=r"has \['inputs_embeds'\], and packing=True packs tokens"):
        fitted(beside, texts=PACKED)


class Blind(torch.nn.Module):
    """A decoder that counts all positions of a row as those of one text."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network, self.config = network, network.config

    def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None) -> Any:
        return self.network(input_ids=input_ids, attention_mask=attention_mask)


# From data to the end --------------------------------------------------------------------------


def test_later_predictions_read_texts_as_the_fit_did(posterior: Any, tmp_path: Path) -> None:
    expected = [len(row["messages"][1]["content"]) + 2 for row in CHATS]  # the end, and a new line
    assert posterior.predict(CHATS, 0).num_tokens.tolist() == expected
    posterior.save(tmp_path / "saved")
    again = pyrolora.load(tmp_path / "saved", decoder())
    assert again.texts == TextOptions(assistant_only_loss=True)
    assert again.evaluate(CHATS, 4, seed=0) == posterior.evaluate(CHATS, 4, seed=0)
    again.texts = None
    assert again.predict(CHATS, 0).num_tokens.sum() > sum(expected)
    with pytest.raises(ConfigError, match="texts must be a pyrolora"):
        again.texts = {"max_length": 3}
    later = pyrolora.fit(decoder(), CHATS, prior=posterior, epochs=1, batch_size=4)
    assert later.texts == posterior.texts


def test_prompts_without_their_completions_are_no_texts() -> None:
    posterior = fitted(epochs=1)
    chat = [{"prompt": CHATS[0]["messages"][:1]}]
    for rows, name in (([{"prompt": "qqq"}], "text"), (chat, "messages")):
        told = rf"'prompt' without what is written for it.*rename_column\('prompt', '{name}'\)"
        for verb in (posterior.evaluate, posterior.predict, fitted):
            with pytest.raises(DataError, match=told):
                verb(rows)
    assert posterior.evaluate([{"text": "qqq"}], 0)["nll"] > 0
    named = TextOptions(dataset_text_field="prompt")
    assert (
        fitted([{"prompt": "qqq"}], texts=named, epochs=1).evaluate([{"prompt": "qqq"}], 0)["nll"]
        > 0
    )


def test_folders_of_earlier_versions_lack_entries_and_load(tmp_path: Path) -> None:
    from pyrolora.storage.description import described

    fitted(CHATS, "map").save(tmp_path / "now")
    meta = json.loads((tmp_path / "now" / "posterior.json").read_text())
    now = described(meta)
    assert meta.pop("texts") is None
    assert meta.pop("temperature") == 1
    assert meta["adapter"].pop("target_parameters") is None
    assert not any(layer.pop("lookup") for layer in meta["layers"])
    assert described(meta) == now


def test_options_of_texts_are_for_language_models_alone() -> None:
    with pytest.raises(ConfigError, match=r"how a causal language model reads texts, .*'classif"):
        pyrolora.fit(bert(), tokens(), "map", texts=TextOptions(max_length=8))
    with pytest.raises(ConfigError, match=r"texts must be a pyrolora.TextOptions"):
        fitted(texts={"max_length": 8})


# TRL's arguments --------------------------------------------------------------------------------


def supervised(folder: Path, **options: Any) -> SFTConfig:
    usual = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "max_steps": 1,
        "disable_tqdm": True,
    }
    return SFTConfig(
        str(folder), gradient_checkpointing=None, save_strategy="no", dataloader_pin_memory=False,
        **usual | options,
    )  # fmt: skip


def test_the_arguments_of_trl_say_how_texts_are_read(tmp_path: Path) -> None:
    options = {"max_length": 24, "packing": True, "completion_only_loss": False}
    made = fitted(training=supervised(tmp_path, **options))
    assert made.texts == TextOptions(**options)
    assert made.settings["learning_rate"] == 2e-5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "dft"}, "loss_type='dft' is not supported"),
        ({"packing_strategy": "wrapped", "packing": True}, "packing_strategy='wrapped'"),
        ({"eos_token": "</s>"}, "eos_token='</s>' is not supported: set it on the tokenizer"),
        ({"eval_packing": True}, "eval_packing=True"),
        ({"padding_free": True}, "padding_free=True"),
        ({"chat_template_path": "x"}, "chat_template_path='x'"),
        ({"dataset_kwargs": {"skip_prepare_dataset": True}}, "dataset_kwargs="),
        ({"shuffle_dataset": True}, "shuffle_dataset=True"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_options_of_trl_without_an_effect_are_refused_by_name(
    options: Any, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        fitted(training=supervised(tmp_path, **options))


def test_texts_are_told_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="texts= and a SFTConfig both say"):
        fitted(training=supervised(tmp_path), texts=SMALL)


# Writing ----------------------------------------------------------------------------------------


def test_chats_and_rows_are_prompts_that_open_the_assistants_turn(posterior: Any) -> None:
    chat = CHATS[0]["messages"][:1]
    opened = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    options = {"num_samples": 0, "max_new_tokens": 3}
    ids = chat_tokenizer()(opened)["input_ids"]
    expected = posterior.generate([ids], **options)
    for inputs in (chat, [chat], [{"messages": chat}], [{"question": "a"}], [{"prompt": chat}]):
        found = posterior.generate(inputs, **options)
        assert found.sequences.tolist() == expected.sequences.tolist(), inputs
    for inputs in ([{"prompt": "ab"}], [{"prompt": "ab", "completion": "c"}]):  # as in a fit
        found = posterior.generate(inputs, **options)
        assert found.sequences.tolist() == posterior.generate(["ab"], **options).sequences.tolist()
    two = posterior.generate([chat, [{"from": "human", "value": "bc"}]], **options)
    assert two.sequences[0].tolist() == expected.sequences[0].tolist()
    assert len(two.texts) == 2
    with pytest.raises(DataError, match="ends with a message of the assistant"):
        posterior.generate(CHATS)


def test_each_row_ends_with_the_first_stop_string_that_it_completes(posterior: Any) -> None:
    prompts, options = ["abc", "b", "The fox"], {"draws": [0, 1, 2], "max_new_tokens": 12}
    whole = posterior.generate(prompts, **options)
    stops = [whole.texts[0][0][3:5], whole.texts[1][1][2:3]]
    found = posterior.generate(prompts, stop_strings=stops, **options)
    shorter = 0
    for i in range(3):
        for k in range(3):
            ids = whole.sequences[i, k][whole.mask[i, k]].tolist()
            texts = [chat_tokenizer().decode(ids[: n + 1]) for n in range(len(ids))]
            size = next(
                (n + 1 for n, t in enumerate(texts) if any(s in t for s in stops)), len(ids)
            )
            assert found.sequences[i, k][found.mask[i, k]].tolist() == ids[:size]
            shorter += size < len(ids)
    assert shorter >= 2
    assert posterior.generate(prompts, stop_strings=[], **options).texts == whole.texts
    beams = posterior.generate(prompts, num_samples=0, num_beams=2, stop_strings=stops,
                               max_new_tokens=6)  # fmt: skip
    assert len(beams.texts) == 3


def test_a_streamer_is_given_the_tokens_of_one_text(posterior: Any) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append(-1)

    prompt = [5, 6, 7]
    for draws in ({"num_samples": 0}, {"draws": [1]}):
        streamer = Streamer()
        found = posterior.generate([prompt], max_new_tokens=4, streamer=streamer, **draws)
        assert streamer.seen == [*prompt, *found.sequences[0, 0].tolist(), -1]


# The command line ------------------------------------------------------------------------------


def test_chats_from_a_file_to_the_end_on_the_command_line(tmp_path: Path) -> None:
    decoder().save_pretrained(tmp_path / "model")
    chat_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    asked = [{"messages": row["messages"][:1]} for row in CHATS[:2]]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    run = tmp_path / "run"
    done("fit", tmp_path / "chats.jsonl", "--model", tmp_path / "model", "--output-dir", run,
         "--epochs", 1, "--set", "texts.assistant_only_loss=true",
         "--set", "texts.max_length=48", "--set", "texts.packing=true")  # fmt: skip
    posterior = pyrolora.load(run)
    assert posterior.texts == TextOptions(max_length=48, assistant_only_loss=True, packing=True)
    drawn = ("--num-samples", 2, "--seed", 0)
    found = done("evaluate", run, tmp_path / "chats.jsonl", "--json", *drawn).json
    assert found["nll"] == pytest.approx(posterior.evaluate(CHATS, 2, seed=0)["nll"], rel=1e-4)
    lines = done("generate", run, tmp_path / "asked.jsonl", "--num-samples", 0,
                 "--max-new-tokens", 3, "--stop-string", "zz").out.splitlines()  # fmt: skip
    expected = posterior.generate([row["messages"] for row in asked], 0, max_new_tokens=3)
    texts = [[c["text"] for c in json.loads(line)["continuations"]] for line in lines]
    assert texts == expected.texts
    refused(pyrolora_("fit", tmp_path / "chats.jsonl", "--model", tmp_path / "model",
                      "--output-dir", tmp_path / "no", "--set", "texts.length=3"),
            "TextOptions has no such option")  # fmt: skip
