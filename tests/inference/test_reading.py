"""A network is refused that does not give what its likelihood reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import SIZES, bert, gpt2, llama, tokens
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BertConfig,
    BertForTokenClassification,
    BertLMHeadModel,
    RobertaConfig,
    RobertaForCausalLM,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.errors import ConfigError
from pyrolora.tasks import available, task_for

TEXTS = tokens(4).remove_columns("labels")
BART: dict[str, Any] = {
    **{f"{part}_layers": 1 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 2 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 16 for part in ("encoder", "decoder")},
    "d_model": 16,
    "vocab_size": 16,
    "max_position_embeddings": 32,
}


def fit(network: nn.Module, data: Any = TEXTS, **options: Any) -> Any:
    adapter = AdapterConfig(r=1, target_modules="all-linear")
    return pyrolora.fit(network, data, "map", epochs=1, adapter=adapter, **options)


def xlnet() -> nn.Module:
    sizes = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, "vocab_size": 16}
    return XLNetLMHeadModel(XLNetConfig(**sizes, initializer_range=0.3)).eval()


@pytest.mark.filterwarnings("ignore:'all-linear' adapts linear layers")
@pytest.mark.parametrize(
    "network",
    [
        xlnet,
        lambda: BertLMHeadModel(BertConfig(**SIZES, initializer_range=0.3)).eval(),
        lambda: RobertaForCausalLM(
            RobertaConfig(**SIZES, pad_token_id=1, initializer_range=0.3)
        ).eval(),
    ],
    ids=["XLNet", "BERT", "RoBERTa"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_that_sees_what_it_predicts_is_no_causal_one(network: Any, dtype: Any) -> None:
    made = network().to(dtype)
    with pytest.raises(ConfigError, match=r"no causal language model.*is_decoder=True"):
        fit(made)


@pytest.mark.parametrize(
    "network",
    [
        llama,
        gpt2,
        lambda: BertLMHeadModel(BertConfig(**SIZES, is_decoder=True)).eval(),
        lambda: llama(sliding_window=2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_ones_pass(network: Any, dtype: Any) -> None:
    assert fit(network().to(dtype)).task.name == "text-generation"


class SeesAll(nn.Module):
    """Its packed texts see each other: it takes positions, and looks at what is before alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16)

    def forward(self, input_ids: torch.Tensor, position_ids: Any = None) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.table(input_ids).cumsum(1))
        return logits


def test_packed_texts_that_see_each_other_are_told() -> None:
    rows = [{"input_ids": [5, 6, 7, 8], "position_ids": [0, 1, 0, 1]}] * 2
    with pytest.raises(ConfigError, match="packed in one row see each other"):
        fit(SeesAll(), rows, task="text-generation")
    rows = [{"input_ids": [5, 6, 7, 8], "position_ids": [0, 1, 2, 3]}] * 2
    fit(SeesAll(), rows, task="text-generation")


def test_tags_are_no_tokens() -> None:
    """A network of the user's own whose config has more words than it gives logits."""
    encoder = bert(num_labels=3)

    class Tags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert, self.head, self.config = encoder.bert, nn.Linear(16, 3), encoder.config

        def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> Any:
            return self.head(self.bert(input_ids, attention_mask).last_hidden_state)

    rows = [{"input_ids": [5, 6, 7], "labels": [0, 1, 2]}] * 2
    with pytest.raises(ConfigError, match=r"logits of its vocabulary.*token-classification"):
        fit(Tags(), rows, task="fill-mask")


TASKS: dict[str, tuple[Any, str]] = {
    "pictures": (
        lambda: SegformerForSemanticSegmentation(SegformerConfig(num_labels=2)),
        "semantic segmentation",
    ),
}


@pytest.mark.parametrize("law", [None, *available()])
@pytest.mark.parametrize("task", TASKS)
def test_tasks_without_a_likelihood_are_refused_whichever_is_named(
    task: str, law: str | None
) -> None:
    network, words = TASKS[task]
    with pytest.raises(ConfigError, match=f"{words}.*not supported yet"):
        task_for(network(), law)


@pytest.mark.parametrize("law", [n for n in available() if n != "token-classification"])
def test_a_network_for_tags_is_refused_by_other_tasks(law: str) -> None:
    network = BertForTokenClassification(BertConfig(**SIZES))
    with pytest.raises(ConfigError, match=r"network for token classification.*another task"):
        task_for(network, law)


WRITERS = {
    "T5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ),
    "BART": lambda: BartForConditionalGeneration(BartConfig(**BART)),
}


@pytest.mark.parametrize("law", [n for n in available() if n != "text2text-generation"])
@pytest.mark.parametrize("network", WRITERS)
def test_labels_of_another_task_would_not_reach_a_decoder(network: str, law: str) -> None:
    """BART is among transformers' masked language models, too."""
    with pytest.raises(ConfigError, match=r"would not reach.*'text2text-generation'"):
        task_for(WRITERS[network](), law)


def test_an_encoder_decoder_may_classify() -> None:
    network = BartForSequenceClassification(BartConfig(**BART, num_labels=2))
    assert task_for(network).name == "classification"


def test_outputs_without_logits_are_told() -> None:
    raw = bert().bert(torch.ones(1, 3).long())
    with pytest.raises(ConfigError, match=r"'last_hidden_state'.*not supported yet"):
        task_for(bert()).output(raw)
