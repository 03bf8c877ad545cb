"""Reward modelling: TRL's loss by hand, its data, and rewards with their spread."""

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
from problems import LETTERED, arguments, letter_tokenizer, llama, llama_reward
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer

import pyrolora
from pyrolora import AdapterConfig, Posterior
from pyrolora.data import prepare
from pyrolora.errors import ConfigError, DataError
from pyrolora.guides import Laplace
from pyrolora.predictive import evaluate
from pyrolora.tasks import RewardModelling, RewardPrediction, Rewards

ROWS: list[dict[str, Any]] = [
    {"prompt": "the film ", "chosen": "is good", "rejected": "is very very bad"},
    {"prompt": "a book ", "chosen": "good good", "rejected": "dull"},
    {"prompt": "", "chosen": "fine", "rejected": "the film was not very dull"},
    {"prompt": "the ", "chosen": "book is fine", "rejected": "bad"},
]
MARGINS = [{**row, "margin": 0.3 * i} for i, row in enumerate(ROWS)]
CHAT = "{% for m in messages %}{{ m['role'][0] ~ ' ' ~ m['content'] }} {% endfor %}"


def fit(data: Any = ROWS, guide: Any = "montec", **options: Any) -> Posterior:
    usual = {"epochs": 3, "seed": 0, "learning_rate": 1e-2, "adapter": AdapterConfig(r=2)}
    chosen = {**usual, "tokenizer": letter_tokenizer(), "task": "reward-modelling", **options}
    return pyrolora.fit(llama_reward(), data, guide, **chosen)


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    return fit(MARGINS)


def by_hand(plain: Any, text: str) -> Tensor:
    """The reward of one text, which EOS ends."""
    ids = [*letter_tokenizer()(text)["input_ids"], LETTERED.index("[SEP]")]
    return plain(torch.tensor([ids])).logits[0, 0]


def test_draws_are_by_hand_from_networks_with_their_weights(posterior: Posterior) -> None:
    found = posterior.predict(MARGINS, draws=[0, 2])
    assert isinstance(found, RewardPrediction)
    for s, draw in enumerate((0, 2)):
        plain = posterior.merge(draw)
        for i, row in enumerate(MARGINS):
            with torch.no_grad():
                pair = [by_hand(plain, row["prompt"] + row[n]) for n in ("chosen", "rejected")]
            torch.testing.assert_close(found.rewards[s, i], torch.stack(pair))
            difference = pair[0] - pair[1]
            torch.testing.assert_close(found.draws[s, i, 0], difference.sigmoid())
            scores = F.logsigmoid(difference - row["margin"])
            torch.testing.assert_close(found.log_likelihood[s, i], scores, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.differences, found.rewards[..., 0] - found.rewards[..., 1])
    alone = posterior.predict(MARGINS, draws=[0, 2], batch_size=1)
    torch.testing.assert_close(alone.rewards, found.rewards)
    scores = evaluate(found)
    right = (found.draws[..., 0].mean(0) > 0.5).float().mean()
    assert scores["accuracy"] == pytest.approx(float(right))
    assert scores["nll"] == pytest.approx(-float(found.log_predictive.mean()))
    picked = found.select(torch.tensor([2, 0]))
    assert torch.equal(picked.rewards, found.rewards[:, [2, 0]])


def test_equal_rewards_count_as_wrong_as_they_do_for_trl(posterior: Posterior) -> None:
    pair = {"prompt": "the ", "chosen": "good", "rejected": "good"}
    found = posterior.predict([pair], num_samples=3)
    assert found.probs.tolist() == [[0.5, 0.5]]
    assert evaluate(found)["accuracy"] == 0


def test_single_texts_have_rewards_and_their_spread(posterior: Posterior) -> None:
    texts = [row["prompt"] + row["chosen"] for row in ROWS]
    found = posterior.predict(texts, draws=[0, 2])
    assert isinstance(found, Rewards)
    pairs = posterior.predict(ROWS, draws=[0, 2])
    assert isinstance(pairs, RewardPrediction)
    torch.testing.assert_close(found.draws, pairs.rewards[..., 0])
    torch.testing.assert_close(found.uncertainty, pairs.std[:, 0])
    assert found.to_pandas().columns.tolist() == ["reward", "reward_sd"]
    assert posterior.to_arviz(3, data=texts)["posterior_predictive"]["reward"].shape == (1, 3, 4)
    with pytest.raises(DataError, match="'chosen' and 'rejected'"):
        posterior.evaluate(texts)


class ByHand(Trainer):
    """transformers' Trainer with the loss of TRL's ``RewardTrainer``."""

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Tensor:
        losses = []
        for row in inputs["rows"]:
            chosen, rejected = (
                by_hand(model, row["prompt"] + row[n]) for n in ("chosen", "rejected")
            )
            losses.append(-F.logsigmoid(chosen - rejected - row.get("margin", 0.0)))
        return torch.stack(losses).mean()


@pytest.mark.parametrize("data", [ROWS, MARGINS], ids=["plain", "margin"])
def test_map_equals_peft_and_trainer(data: list[dict[str, Any]], tmp_path: Path) -> None:
    start, plain, targets = Start(), llama_reward(), ["q_proj", "v_proj"]
    changes = {"max_steps": 4, "remove_unused_columns": False}
    posterior = pyrolora.fit(
        copy.deepcopy(plain), data, "map", task="reward", tokenizer=letter_tokenizer(),
        adapter=AdapterConfig(r=2, lora_alpha=4, target_modules=targets),
        training=arguments(tmp_path / "ours", **changes), callbacks=[start],
    )  # fmt: skip
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="SEQ_CLS")
    model = peft.get_peft_model(plain, config)
    layers = lora_layers(model, start.factors)
    ByHand(
        model=model, args=arguments(tmp_path / "peft", **changes), train_dataset=data,
        data_collator=lambda rows: {"rows": rows},
    ).train()  # fmt: skip
    for name, (A, B) in posterior.factors().items():
        torch.testing.assert_close(A, layers[name].lora_A["default"].weight, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(B, layers[name].lora_B["default"].weight, atol=1e-5, rtol=1e-4)
    head = model.base_model.model.score.modules_to_save["default"].weight
    own = posterior.model.named_heads()["score"][0].weight
    torch.testing.assert_close(own, head, atol=1e-5, rtol=1e-4)
    assert (own - llama_reward().score.weight).abs().max() > 1e-3, "nothing was trained"


def test_chats_are_written_by_the_template() -> None:
    """The prompt explicit or implicit, as TRL reads them: the tokens of the template."""
    words = letter_tokenizer()
    words.chat_template = CHAT
    ask = [{"role": "a", "content": "the film"}]
    chosen, rejected = ([{"role": "is", "content": c}] for c in ("good", "very bad"))
    explicit = {"prompt": ask, "chosen": chosen, "rejected": rejected}
    implicit = {"chosen": ask + chosen, "rejected": ask + rejected}
    found = [
        prepare([row], llama_reward(), RewardModelling(), words) for row in (explicit, implicit)
    ]
    expected = words.apply_chat_template(ask + chosen, tokenize=True, return_dict=True)["input_ids"]
    for made in found:
        assert made.examples[0]["input_ids"][0][: len(expected)] == expected
        assert made.labels is not None
        assert made.labels.tolist() == [0]
    assert found[0].examples[0] == found[1].examples[0]
    ids = [{"chosen_ids": [4, 5, 3], "rejected_ids": [6, 3]}]
    (batch,) = prepare(ids, llama_reward(), RewardModelling(), words).loader(1)
    assert batch["input_ids"].tolist() == [[[4, 5, 3], [6, 3, 0]]]


def test_the_posterior_goes_everywhere(posterior: Posterior, tmp_path: Path) -> None:
    rows = MARGINS * 2
    expected = posterior.predict(rows, draws=[1])
    posterior.save(tmp_path / "saved")
    loaded = pyrolora.load(tmp_path / "saved", llama_reward())
    torch.testing.assert_close(loaded.predict(rows, draws=[1]).draws, expected.draws)
    posterior.to_peft(tmp_path / "adapter", 1)
    again = pyrolora.from_peft(
        tmp_path / "adapter", llama_reward(), task="reward", tokenizer=letter_tokenizer()
    )
    torch.testing.assert_close(again.predict(rows, 0).draws, expected.draws)
    idata = posterior.to_arviz(8, data=rows, log_likelihood=True)
    assert idata["posterior_predictive"]["reward"].shape == (1, 8, len(rows), 2)
    assert "p(chosen)" in posterior.report(tmp_path / "page.html", rows, seed=0).read_text()
    assert len(pyrolora.compare({"a": posterior, "b": loaded}, rows, num_samples=2, seed=0)) == 2
    linear = pyrolora.fit(posterior, MARGINS, Laplace(curvature="kronecker"))
    assert torch.isfinite(linear.predict(MARGINS, 3).draws).all()


def test_from_a_shell_by_the_name_of_a_language_model(tmp_path: Path) -> None:
    sizes = {"vocab_size": len(LETTERED)}
    llama(**sizes).save_pretrained(tmp_path / "model")
    letter_tokenizer().save_pretrained(tmp_path / "model")
    data, run = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text("\n".join(map(json.dumps, ROWS)))
    done("fit", data, "--model", tmp_path / "model", "--output-dir", run, "--epochs", 1)
    assert pyrolora.load(run).task.name == RewardModelling.name
    assert "reward_chosen_sd" in done("predict", run, data).out
    assert "accuracy" in json.dumps(done("evaluate", run, data, "--json").json)


def test_what_cannot_be_is_refused() -> None:
    row, chat = ROWS[0], [{"role": "user", "content": "good"}]
    for data, words in (
        ([{**row, "rejected": None}], r"example 0: 'rejected' has no value"),
        (
            [{**row, "label": 1}],
            r"has a label.*'chosen' is the preferred.*remove_columns\('label'\)",
        ),
        ([{**row, "chosen": chat, "rejected": chat}], r"'prompt' is a text and 'chosen' is mess"),
        ([{"chosen": chat, "rejected": chat}], "example 0: .* has no chat template"),
        ([{**row, "margin": None}, {**row, "margin": 1.0}], "margin of example 0 is None"),
        (
            [{"system": "a", "question": "the", "chosen": "good", "rejected": "bad"}],
            r"\['system', 'question'\] beside 'chosen'.*rename_column\('question', 'prompt'\)",
        ),
        ([{"text": "good"}], r"expected columns 'chosen' and 'rejected', got \['text'\]; add what"),
        ([{"question": "good"}], r"reads 'chosen' and 'rejected'.*got the columns \['question'\]"),
    ):
        with pytest.raises(DataError, match=words):
            fit(data)
    for other in (llama_reward(2), llama(vocab_size=len(LETTERED))):
        with pytest.raises(DataError, match=r"num_labels=1.*task='reward-modelling'"):
            pyrolora.fit(other, ROWS, "map", tokenizer=letter_tokenizer())
    assert fit(task=None, epochs=1).task.name == RewardModelling.name
    with pytest.raises(DataError, match="has 3 texts, and a preference is one of two"):
        fit(epochs=1).predict([{"input_ids": [[4], [5], [6]]}])
    with pytest.raises(ConfigError, match=r"one number per text.*num_labels=1"):
        pyrolora.fit(llama_reward(2), ROWS, "map", task="reward", tokenizer=letter_tokenizer())
