"""Networks of known shapes with random weights, where only time and memory matter."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedConfig,
    RobertaConfig,
    set_seed,
)

from pyrolora import AdapterConfig
from pyrolora.adapters import attach

SEED = 0
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Shape:
    """A network's configuration, and the batch that it is measured with.

    Attributes
    ----------
    config
        Makes transformers' configuration; an encoder classifies, a decoder is a language model.
    batch, length
        Examples in a batch, tokens an example.
    attention
        Names of the query, key and value layers.
    causal
        Whether it is a language model.
    large
        Too large for a processor: measured on accelerators alone, in bfloat16.
    """

    config: Callable[..., PreTrainedConfig]
    options: Mapping[str, Any]
    batch: int
    length: int
    attention: tuple[str, ...]
    causal: bool = False
    large: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.large else torch.float32

    def configuration(self, **changes: Any) -> PreTrainedConfig:
        return self.config(**{**self.options, **changes})

    def network(self, device: torch.device | str, **changes: Any) -> Any:
        """The network with random weights."""
        set_seed(SEED)
        kind = AutoModelForCausalLM if self.causal else AutoModelForSequenceClassification
        with torch.device(device):
            network = kind.from_config(self.configuration(**changes), dtype=self.dtype)
        network.config.use_cache = False  # as in training with the Trainer
        return network

    def batches(self, count: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
        """Batches of random tokens, all of full length."""
        random = torch.Generator().manual_seed(SEED)
        vocabulary = self.configuration().vocab_size
        shape = (count, self.batch, self.length)
        ids = torch.randint(vocabulary // 10, vocabulary, shape, generator=random)
        labels = ids if self.causal else torch.randint(2, shape[:2], generator=random)
        return [
            {
                "input_ids": x.to(device),
                "attention_mask": torch.ones_like(x, device=device),
                "labels": y.to(device),
            }
            for x, y in zip(ids, labels, strict=True)
        ]


QUERY_KEY_VALUE = ("query", "key", "value")
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def _llama(hidden: int, layers: int, heads: int, inner: int, vocabulary: int, **more: Any) -> Any:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        **more,
    }


SHAPES: dict[str, Shape] = {
    # all-MiniLM-L6-v2
    "minilm": Shape(
        BertConfig,
        {
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "intermediate_size": 1536,
            "vocab_size": 30522,
        },
        16,
        64,
        QUERY_KEY_VALUE,
    ),
    "roberta-base": Shape(
        RobertaConfig,
        {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
        32,
        128,
        QUERY_KEY_VALUE,
    ),
    "llama-12": Shape(LlamaConfig, _llama(512, 12, 8, 1408, 4096), 8, 64, PROJECTIONS, True),
    "llama-24": Shape(LlamaConfig, _llama(512, 24, 8, 1408, 4096), 8, 64, PROJECTIONS, True),
    "smollm2": Shape(  # SmolLM2-135M
        LlamaConfig,
        _llama(576, 30, 9, 1536, 49152, num_key_value_heads=3, tie_word_embeddings=True),
        4,
        128,
        PROJECTIONS,
        True,
    ),
    "llama-1b": Shape(
        LlamaConfig,
        _llama(2048, 16, 32, 8192, 128256, num_key_value_heads=8, tie_word_embeddings=True),
        8,
        512,
        PROJECTIONS,
        True,
        large=True,
    ),
    "llama-7b": Shape(
        LlamaConfig, _llama(4096, 32, 32, 11008, 32000), 4, 512, PROJECTIONS, True, large=True
    ),
}


NARROW = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def narrowed(name: str, layers: int) -> str:
    """Add a shape of narrow layers and few tokens, and return its name.

    Next to nothing is computed in its steps: what remains is the host's time. Its name is the
    other's, with ``-narrow`` behind it.
    """
    shape = SHAPES[name]
    options = {**shape.options, **NARROW, "num_hidden_layers": layers}
    SHAPES[f"{name}-narrow"] = replace(shape, options=options, batch=2, length=8)
    return f"{name}-narrow"


@dataclass(frozen=True)
class Case:
    """One network, which of its layers get adapters, and of what rank.

    ``name`` is a shape, with ``/all-linear`` behind it where all linear layers have adapters and
    not only query, key and value.
    """

    name: str
    rank: int

    @property
    def shape(self) -> Shape:
        return SHAPES[self.name.partition("/")[0]]

    @property
    def targets(self) -> str | list[str]:
        return ALL_LINEAR if self.name.endswith(f"/{ALL_LINEAR}") else list(self.shape.attention)

    @property
    def adapter(self) -> AdapterConfig:
        return AdapterConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=self.targets)

    def describe(self) -> dict[str, Any]:
        """What a result says of its case."""
        return {
            "case": self.name,
            "batch": self.shape.batch,
            "length": self.shape.length,
            "dtype": str(self.shape.dtype).removeprefix("torch."),
        }


def title(run: Mapping[str, Any]) -> str:
    """A result's case in words."""
    return f"{run['case']}: batch {run['batch']} x {run['length']} tokens, {run['dtype']}"


def case_names(device: torch.device) -> list[str]:
    """The cases that a device is for."""
    fitting = [n for n, shape in SHAPES.items() if device.type != "cpu" or not shape.large]
    return [f"{name}{suffix}" for name in fitting for suffix in ("", f"/{ALL_LINEAR}")]


def case(value: str) -> str:
    """An argparse type: the name of a case."""
    shape, slash, targets = value.partition("/")
    if shape not in SHAPES or (slash and targets != ALL_LINEAR):
        raise argparse.ArgumentTypeError(
            f"{value!r} is no case; choose one of {', '.join(SHAPES)}, with '/{ALL_LINEAR}' behind "
            "it for adapters on all linear layers"
        )
    return value


def twin(network: nn.Module) -> Any:
    """A copy with modules and trained head of its own that shares the frozen weights, so that many
    contestants of a large network fit into memory."""
    heads = {id(p) for name, p in network.named_parameters() if name.startswith("classifier")}
    shared = {id(p): p for p in network.parameters() if id(p) not in heads}
    return copy.deepcopy(network, shared)


def adapted_layers(case: Case, **changes: Any) -> list[Any]:
    """The layers that get an adapter; their shapes are all that is made."""
    return attach(case.shape.network("meta", **changes), case.adapter).specs
