"""``layers_to_transform`` chooses the blocks that PEFT chooses."""

from __future__ import annotations

import copy

import peft
import pytest
from problems import bert, gpt2, llama
from transformers import T5Config, T5ForConditionalGeneration, TrainingArguments

import pyrolora
from pyrolora.adapters import as_adapter_config, attach
from pyrolora.adapters.config import AdapterConfig
from pyrolora.errors import ConfigError, TargetError


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=30, **sizes))


def adapted(network, config) -> set[str]:
    found = attach(network, config)
    found.detach()
    return {spec.name for spec in found.specs}


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (bert, {"target_modules": ["query", "value"], "layers_to_transform": 1}),
        (llama, {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0]}),
        (
            gpt2,
            {"target_modules": ["c_attn"], "layers_to_transform": [0], "fan_in_fan_out": True},
        ),
        (t5, {"target_modules": ["q"], "layers_to_transform": [1]}),
        (
            t5,
            {"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "decoder.block"},
        ),
        (
            t5,
            {"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": ["x", "layer"]},
        ),
    ],
)
def test_the_blocks_are_those_of_peft(make, options) -> None:
    network = make()
    config = peft.LoraConfig(r=2, **options)
    ours = adapted(network, as_adapter_config(config))
    wrapped = peft.get_peft_model(copy.deepcopy(network), config)
    theirs = {
        name.removeprefix("base_model.model.")
        for name, module in wrapped.named_modules()
        if hasattr(module, "lora_A")
    }
    assert ours == theirs
    assert ours < adapted(make(), AdapterConfig(r=2, target_modules=options["target_modules"]))


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
def test_rules_are_narrowed_to_blocks_too(targets) -> None:
    config = AdapterConfig(r=2, target_modules=targets, layers_to_transform=[1])
    found = adapted(bert(), config)
    assert found == {
        name
        for name in adapted(bert(), AdapterConfig(r=2, target_modules=targets))
        if ".layer.1." in name
    }
    assert len(found) == (3 if targets == "auto" else 6)


def test_a_number_that_no_layer_has_is_refused_with_those_that_there_are() -> None:
    config = AdapterConfig(r=2, target_modules=["query"], layers_to_transform=[1, 5])
    with pytest.raises(TargetError, match=r"names '5', .*have the numbers '0', '1'"):
        attach(bert(), config)
    elsewhere = AdapterConfig(r=2, layers_to_transform=0, layers_pattern="blocks")
    with pytest.raises(TargetError, match=r"have no number behind 'blocks'"):
        attach(bert(), elsewhere)


def test_a_name_that_is_in_no_chosen_block_is_refused() -> None:
    targets = ["query", "layer.0.attention.self.key"]
    config = AdapterConfig(r=2, target_modules=targets, layers_to_transform=1)
    with pytest.raises(TargetError, match=r"self.key' is excluded by layers_to_transform"):
        attach(bert(), config)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers_to_transform": [-1]}, "whole number >= 0, got -1"),
        ({"layers_to_transform": 1.0}, "whole number >= 0, got 1.0"),
        ({"layers_to_transform": []}, "is empty: no layer is left"),
        ({"layers_to_transform": 1, "target_modules": ".*query"}, "is a regular expression, which"),
        ({"layers_pattern": "layer"}, "which is None; pass it, or leave out both"),
    ],
)
def test_what_can_mean_nothing_is_refused(options, said) -> None:
    with pytest.raises(ConfigError, match=said):
        AdapterConfig(**options)


def test_a_pattern_that_is_no_expression_is_quoted() -> None:
    config = AdapterConfig(r=2, layers_to_transform=1, layers_pattern="(")
    with pytest.raises(ConfigError, match=r"'\(' is not a regular expression"):
        attach(bert(), config)


def test_the_blocks_are_in_what_is_saved(tmp_path) -> None:
    data = [{"input_ids": [4, 5], "attention_mask": [1, 1], "labels": i} for i in (0, 1)]
    adapter = AdapterConfig(r=2, layers_to_transform=1, layers_pattern=["layer"])
    network = bert()
    steps = TrainingArguments(str(tmp_path / "run"), max_steps=1, report_to="none", use_cpu=True)
    posterior = pyrolora.fit(copy.deepcopy(network), data, "map", adapter=adapter, training=steps)
    posterior.save(tmp_path / "saved")
    loaded = pyrolora.load(tmp_path / "saved", network)
    assert loaded.bank.config == posterior.bank.config == adapter
    assert loaded.bank.config.layers_to_transform == [1]
    assert [*loaded.bank.specs] == [*posterior.bank.specs]
    assert all(".layer.1." in name for name in loaded.bank.specs)
