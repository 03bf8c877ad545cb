"""Choices by a causal language model: by hand from its logits, against PEFT, from end to end."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from console import done
from peft_trainer import Start, lora_layers
from problems import LETTERED, arguments, bert_choice, letter_tokenizer, llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Trainer

import pyrolora
from pyrolora import AdapterConfig, Posterior
from pyrolora.columns import CHOICE_TOKENS, COMPLETION_MASK
from pyrolora.data import prepare
from pyrolora.data.choice_prompts import letter_tokens, prompt_of
from pyrolora.data.encoding import Encoder
from pyrolora.errors import ConfigError, DataError
from pyrolora.guides import Laplace
from pyrolora.tasks import LetterChoice, TextChoice, TokenMeanChoice, task_for

LAWS = {"letters": LetterChoice, "texts": TextChoice, "texts-per-token": TokenMeanChoice}
ROWS = [
    {"question": "the film is", "choices": ["good", "not very bad", "dull"], "label": 1},
    {"question": "the book", "choices": ["is dull", "good"], "label": 0},
    {"question": "was the very very fine film", "choices": ["a", "the", "was", "is"], "label": 3},
    {"question": "a", "choices": ["film", "film film"], "label": 1},
]


def network(**changes: Any) -> Any:
    sizes = {"vocab_size": len(LETTERED), "max_position_embeddings": 64, "initializer_range": 0.4}
    return llama(**{**sizes, **changes})


def fit(how: str, guide: Any = "montec", data: Any = ROWS, **options: Any) -> Posterior:
    usual = {"epochs": 2, "seed": 0, "learning_rate": 1e-2, "adapter": AdapterConfig(r=2)}
    chosen = {**usual, "tokenizer": letter_tokenizer(), **options}
    return pyrolora.fit(network(), data, guide, choices=how, **chosen)


@pytest.fixture(scope="module")
def posteriors() -> dict[str, Posterior]:
    return {how: fit(how) for how in LAWS}


def by_hand(plain: Any, how: str, row: dict[str, Any]) -> Tensor:
    """The scores of one example's choices, from the logits of a plain network, text by text."""
    words = letter_tokenizer()
    if how == "letters":
        ids = words(prompt_of(row["question"], row["choices"]))["input_ids"]
        law = plain(torch.tensor([ids])).logits[0, -1]
        return law[[LETTERED.index(letter) for letter in "ABCD"[: len(row["choices"])]]]
    scores = []
    for choice in row["choices"]:
        start, ids = (
            words(t)["input_ids"] for t in (row["question"], f"{row['question']} {choice}")
        )
        law = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
        own = [law[i - 1, ids[i]] for i in range(len(start), len(ids))]
        scores.append(sum(own) / (len(own) if how == "texts-per-token" else 1))
    return torch.stack(scores)


# The law ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", LAWS)
def test_draws_are_by_hand_from_networks_with_their_weights(
    how: str, posteriors: dict[str, Posterior]
) -> None:
    """Draw by draw, W + s B A in the weights, without batches or padding."""
    posterior = posteriors[how]
    found = posterior.predict(ROWS, draws=[0, 3], batch_size=4)
    assert type(posterior.task) is LAWS[how]
    for s, draw in enumerate((0, 3)):
        plain = posterior.merge(draw)
        for i, row in enumerate(ROWS):
            with torch.no_grad():
                expected = by_hand(plain, how, row).log_softmax(-1)
            size = len(row["choices"])
            torch.testing.assert_close(found.draws[s, i, :size], expected.exp())
            assert (found.draws[s, i, size:] == 0).all()
            scores = found.log_likelihood
            assert scores is not None
            torch.testing.assert_close(scores[s, i], expected[row["label"]], atol=1e-5, rtol=1e-4)
    alone = posterior.predict(ROWS, draws=[0, 3], batch_size=1)
    torch.testing.assert_close(alone.draws, found.draws)
    assert posterior.evaluate(ROWS, draws=[0, 3])["nll"] == pytest.approx(
        -float(found.log_predictive.mean())
    )


class ByHand(Trainer):
    """transformers' Trainer with a loss of the choices that is written out, example by example."""

    how = ""

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Tensor:
        losses = [
            F.cross_entropy(by_hand(model, self.how, row)[None], torch.tensor([row["label"]]))
            for row in inputs["rows"]
        ]
        return torch.stack(losses).mean()


@pytest.mark.parametrize("how", ["letters", "texts"])
def test_map_equals_peft_and_trainer(how: str, tmp_path: Path) -> None:
    start, plain = Start(), network()
    changes = {"max_steps": 4, "remove_unused_columns": False}
    posterior = pyrolora.fit(
        copy.deepcopy(plain), ROWS, "map", choices=how, tokenizer=letter_tokenizer(),
        adapter=AdapterConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]),
        training=arguments(tmp_path / "ours", **changes), callbacks=[start],
    )  # fmt: skip
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(plain, config)
    layers = lora_layers(model, start.factors)
    trainer = ByHand(
        model=model, args=arguments(tmp_path / "peft", **changes), train_dataset=ROWS,
        data_collator=lambda rows: {"rows": rows},
    )  # fmt: skip
    trainer.how = how
    trainer.train()
    moved = 0.0
    for name, (A, B) in posterior.factors().items():
        torch.testing.assert_close(A, layers[name].lora_A["default"].weight, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(B, layers[name].lora_B["default"].weight, atol=1e-5, rtol=1e-4)
        moved = max(moved, float(B.abs().max()))
    assert moved > 1e-3, "nothing was trained"


@pytest.mark.parametrize("how", ["letters", "texts"])
def test_logits_are_computed_where_they_are_read(
    how: str, posteriors: dict[str, Posterior], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row of the vocabulary per prompt, or as many as the longest choice has tokens."""
    joint = posteriors[how].model
    (batch,) = prepare(ROWS, joint.base, joint.task, letter_tokenizer()).loader(4)
    shapes: list[Any] = []
    joint.base.lm_head.register_forward_hook(lambda *of: shapes.append(of[2].shape))
    with torch.no_grad():
        few = joint.network(batch, joint.program.mean())
        monkeypatch.setattr(joint, "_keeps_logits", False)  # as in a network that gives all logits
        torch.testing.assert_close(joint.network(batch, joint.program.mean()), few)
    joint.base.lm_head._forward_hooks.clear()
    rows, length = batch["input_ids"].flatten(0, -2).shape
    assert shapes == [
        (rows, 1 if how == "letters" else 3, len(LETTERED)),
        (rows, length, len(LETTERED)),
    ]


# Tokens of letters ------------------------------------------------------------------------------


def test_the_letters_of_each_tokenizer() -> None:
    """ " A" in one piece, as BPE and SentencePiece have it; "A" where the space is apart."""
    letters = list("AB")
    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {t: i for i, t in enumerate([*sorted(bytes_), "ĠA", "ĠB"])}
    for merges, expected in (([("Ġ", "A"), ("Ġ", "B")], ("", ["ĠA", "ĠB"])), ([], (" ", letters))):
        core = Tokenizer(models.BPE(vocabulary, merges))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        ending, found = letter_tokens(
            Encoder(PreTrainedTokenizerFast(tokenizer_object=core), 99), 2
        )
        assert (ending, [core.id_to_token(i) for i in found]) == expected
    pieces = [
        (p, -1.0)
        for p in ("<unk>", "▁", "▁A", "▁B", *sorted(set(prompt_of("Which?", ["one", "two"]))))
    ]
    core = Tokenizer(models.Unigram(pieces, 0, False))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    ending, found = letter_tokens(Encoder(PreTrainedTokenizerFast(tokenizer_object=core), 99), 2)
    assert (ending, [core.id_to_token(i) for i in found]) == ("", ["▁A", "▁B"])
    with pytest.raises(ConfigError, match=r"a token for each letter.*E: \[1\].*choices='texts'"):
        letter_tokens(Encoder(letter_tokenizer(), 99), 5)  # the fifth is unknown


# From end to end --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["letters", "texts"])
def test_the_posterior_goes_everywhere(
    how: str, posteriors: dict[str, Posterior], tmp_path: Path
) -> None:
    posterior, rows = posteriors[how], ROWS * 2
    expected = posterior.predict(rows, draws=[1])
    posterior.save(tmp_path / "saved")
    loaded = pyrolora.load(tmp_path / "saved", network())
    assert type(loaded.task) is LAWS[how]
    torch.testing.assert_close(loaded.predict(rows, draws=[1]).draws, expected.draws)
    posterior.to_peft(tmp_path / "adapter", 1)
    again = pyrolora.from_peft(
        tmp_path / "adapter", network(), task=loaded.task.name, tokenizer=letter_tokenizer()
    )
    torch.testing.assert_close(again.predict(rows, 0).draws, expected.draws)
    written = posterior.generate(["the film"], draws=[1], max_new_tokens=3)
    with torch.no_grad():
        plain = posterior.merge(1)
        ids = letter_tokenizer()("the film", return_tensors="pt")["input_ids"]
        tokens = plain.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)[0, 2:]
    count = int(written.mask[0, 0].sum())
    assert torch.equal(written.sequences[0, 0, :count], tokens[:count])
    idata = posterior.to_arviz(8, data=rows, log_likelihood=True)
    assert idata["log_likelihood"]["y"].shape == (1, 8, len(rows))
    assert "1: not very bad" in posterior.report(tmp_path / "page.html", rows, seed=0).read_text()
    assert len(pyrolora.compare({"a": posterior, "b": loaded}, rows, num_samples=2, seed=0)) == 2
    linear = pyrolora.fit(
        posteriors[how].merge(),
        ROWS,
        Laplace(curvature="kronecker"),
        choices=how,
        tokenizer=letter_tokenizer(),
        epochs=1,
    )
    assert torch.isfinite(linear.predict(ROWS, 3).draws).all()


def test_a_language_model_chooses_in_each_way_unfitted(posteriors: dict[str, Posterior]) -> None:
    """The same numbers as of a posterior that was fitted to choose, at the same weights."""
    plain = pyrolora.fit(
        network(),
        ["the film is good"] * 2,
        "map",
        tokenizer=letter_tokenizer(),
        epochs=1,
        learning_rate=1e-9,
    )
    for how in LAWS:
        found = plain.predict_choices(ROWS, 0, choices=how)
        for i, row in enumerate(ROWS):
            with torch.no_grad():
                expected = by_hand(network(), how, row).softmax(-1)
            torch.testing.assert_close(
                found.probs[i, : len(expected)], expected, atol=1e-4, rtol=1e-3
            )
    same = posteriors["texts"].predict_choices(ROWS, draws=[1], choices="letters")
    assert not torch.allclose(same.draws, posteriors["texts"].predict(ROWS, draws=[1]).draws)
    mean = posteriors["texts"].predict_choices(ROWS, draws=[1], per_token=True)
    long = posteriors["texts"].predict_choices(ROWS, draws=[1], choices="texts-per-token")
    torch.testing.assert_close(mean.draws, long.draws)
    with pytest.raises(ConfigError, match="per_token=True is for choices by their texts"):
        posteriors["letters"].predict_choices(ROWS, 2, per_token=True)


def test_labels_are_numbers_letters_or_texts() -> None:
    named = {"text": ["good", "dull"], "label": ["1", "2"]}
    rows = [
        {"question": "the film", "choices": {"text": ["a", "is"], "label": ["A", "B"]}, "label": x}
        for x in ("B", "is")
    ]
    law, words = LetterChoice(), letter_tokenizer()
    assert prepare(rows, network(), law, words).labels.tolist() == [1, 1]
    numbered = [{"question": "the film", "choices": named, "label": "1"}]
    assert prepare(numbered, network(), law, words).labels.tolist() == [0]
    labels = ("dull", "A", "1")
    texts = [{"question": "the", "choices": ["good", "dull"], "label": x} for x in labels]
    assert prepare(texts, network(), law, words).labels.tolist() == [1, 0, 1]


def test_from_a_shell(tmp_path: Path) -> None:
    network().save_pretrained(tmp_path / "model")
    letter_tokenizer().save_pretrained(tmp_path / "model")
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text("\n".join(map(json.dumps, ROWS)))
    given = ("--model", tmp_path / "model", "--output-dir", run, "--epochs", 1)
    done("fit", data, *given, "--choices", "letters", "--guide", "map")
    assert json.loads((run / "run.json").read_text())["options"]["task"] == LetterChoice.name
    scores = done("evaluate", run, data, "--json").json
    assert "accuracy" in json.dumps(scores)
    assert "prob_3" in done("predict", run, data).out


# Refusals ---------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused(posteriors: dict[str, Posterior], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"choices='letters'.*choices='texts'"):
        pyrolora.fit(network(), ROWS, "map", tokenizer=letter_tokenizer())
    network().save_pretrained(tmp_path)
    letter_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"choices='letters'.*choices='texts'"):
        pyrolora.fit(tmp_path, ROWS, "map")
    assert (
        pyrolora.fit(tmp_path, ROWS, "map", choices="texts", epochs=1).task.name == TextChoice.name
    )
    with pytest.raises(ConfigError, match=r"one of 'letters', 'texts', 'texts-per-token', got 'x'"):
        fit("x")
    with pytest.raises(
        ConfigError, match=r"choices='texts' is the task.*task= names .letter-choice"
    ):
        fit("texts", task="letter-choice")
    with pytest.raises(ConfigError, match=r"BertForMultipleChoice is none.*leave choices="):
        pyrolora.fit(bert_choice(), ROWS, "map", choices="letters", tokenizer=letter_tokenizer())
    many = [{"question": "a", "choices": ["good"] * 27, "label": 0}]
    with pytest.raises(DataError, match=r"example 0 has 27 choices.*26 letters.*choices='texts'"):
        fit("letters", data=many)
    with pytest.raises(DataError, match=r"label of example 0 is 2, and its choices are \[0, 1\]"):
        fit("letters", data=[{"question": "a", "choices": ["good", "bad"], "label": 2}])
    with pytest.raises(DataError, match=r"column 'choices'.*got the columns \['text'\]"):
        posteriors["letters"].predict(["the film"])
    ids = [{"input_ids": [4, 5], "label": 0}]
    with pytest.raises(DataError, match=f"needs '{CHOICE_TOKENS}'"):
        fit("letters", data=ids)
    with pytest.raises(DataError, match=f"need '{COMPLETION_MASK}'"):
        fit("texts", data=[{"input_ids": [[4, 5], [6, 7]], "label": 0}])
    with pytest.warns(UserWarning, match="1 of 1 texts have more than 64 tokens and are cut"):
        fit("letters", data=[{**ROWS[0], "question": "the " * 80}])
    assert task_for(network()).name == "text-generation"
