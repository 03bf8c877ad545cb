"""Which layers are adapted, with which ranks and scalings, and which modules are task heads."""

from __future__ import annotations

import copy
import re

import peft
import pytest
import torch
from problems import SIZES, WORDS, bert, gpt2, llama, mlp
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from pyrolora.adapters import attach
from pyrolora.adapters.config import AdapterConfig
from pyrolora.errors import ConfigError, TargetError


def roberta():
    return RobertaForSequenceClassification(RobertaConfig(**SIZES, pad_token_id=0))


def distilbert():
    config = DistilBertConfig(
        vocab_size=len(WORDS),
        dim=16,
        hidden_dim=32,
        n_layers=2,
        n_heads=2,
        max_position_embeddings=32,
    )
    return DistilBertForSequenceClassification(config)


def gpt2_classifier():
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": len(WORDS)}
    return GPT2ForSequenceClassification(GPT2Config(**sizes, pad_token_id=0))


def llama_classifier():
    config = LlamaConfig(**SIZES, num_key_value_heads=1, pad_token_id=0)
    return LlamaForSequenceClassification(config)


def qwen2():
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=1, pad_token_id=0))


def qwen3():
    config = Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=8, pad_token_id=0)
    return Qwen3ForCausalLM(config)


def vit():
    sizes = {k: v for k, v in SIZES.items() if k not in ("max_position_embeddings", "vocab_size")}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4))


def mamba():
    """An architecture without attention."""
    own = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 4}
    return MambaForCausalLM(MambaConfig(vocab_size=len(WORDS), **own))


def names(network, **options):
    """The names that a configuration wraps; the network is left as it was."""
    attachment = attach(network, AdapterConfig(**{"r": 2, **options}))
    attachment.detach()
    return [spec.name for spec in attachment.specs]


def heads(network, **options):
    attachment = attach(network, AdapterConfig(**{"r": 2, **options}))
    attachment.detach()
    return list(attachment.heads)


# "auto" ----------------------------------------------------------------------------------------

PROJECTIONS = {
    "bert": (bert, "bert.encoder.layer.{}.attention.self.{}", ["query", "key", "value"]),
    "roberta": (roberta, "roberta.encoder.layer.{}.attention.self.{}", ["query", "key", "value"]),
    "distilbert": (
        distilbert,
        "distilbert.transformer.layer.{}.attention.{}",
        ["q_lin", "k_lin", "v_lin"],
    ),
    "gpt2": (gpt2, "transformer.h.{}.attn.{}", ["c_attn"]),
    "llama": (llama, "model.layers.{}.self_attn.{}", ["q_proj", "k_proj", "v_proj"]),
    "qwen2": (qwen2, "model.layers.{}.self_attn.{}", ["q_proj", "k_proj", "v_proj"]),
    "qwen3": (qwen3, "model.layers.{}.self_attn.{}", ["q_proj", "k_proj", "v_proj"]),
    # The names of ViT's projections depend on the version of transformers: see the next test.
    "vit": (vit, None, None),
}


@pytest.mark.parametrize("architecture", [name for name in PROJECTIONS if name != "vit"])
def test_auto_wraps_exactly_the_attention_projections(architecture):
    build, pattern, projections = PROJECTIONS[architecture]
    expected = [pattern.format(i, name) for i in range(2) for name in projections]
    assert names(build()) == expected


def test_auto_wraps_exactly_the_attention_projections_of_vit_old_or_new():
    found = names(vit())
    assert len(found) == 6
    assert all(re.search(r"\.attention\.(attention\.)?(q|k|v|query|key|value)", n) for n in found)
    assert not any(n.endswith(("o_proj", "dense")) for n in found)


@pytest.mark.parametrize("architecture", PROJECTIONS)
def test_every_auto_target_reads_the_attentions_input_and_is_called(architecture):
    """Query, key and value of one block see one and the same input tensor."""
    network = PROJECTIONS[architecture][0]().eval()
    seen = {}
    for name in names(network):
        network.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: args[0]})
        )
    if architecture == "vit":
        network(torch.randn(1, 3, 8, 8))
    else:
        network(torch.tensor([[4, 5, 6]]))
    assert list(seen) == names(network)
    for i in range(2):
        inputs = [x for name, x in seen.items() if f".{i}." in name]
        assert all(torch.equal(x, inputs[0]) for x in inputs)


def test_auto_wraps_every_linear_layer_of_a_plain_network():
    assert names(mlp()) == ["0", "2"]


def test_auto_raises_where_there_is_no_attention_and_lists_the_layers():
    with pytest.raises(TargetError, match=r"keys and values .*'mamba' has none") as caught:
        attach(mamba(), AdapterConfig(r=2))
    assert "'backbone.layers.#.mixer.in_proj'" in str(caught.value)
    assert "all-linear" in str(caught.value)


def test_architectures_without_attention_work_with_names():
    found = names(mamba(), target_modules=["in_proj"])
    assert found == ["backbone.layers.0.mixer.in_proj"]


# The same LoraConfig in PEFT -------------------------------------------------------------------


def peft_layers(network, **options):
    """name -> (rank, scaling) as PEFT wraps a copy of the network."""
    wrapped = peft.get_peft_model(copy.deepcopy(network), peft.LoraConfig(**options))
    return {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for name, layer in wrapped.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }


def our_layers(network, **options):
    attachment = attach(network, AdapterConfig(**options))
    attachment.detach()
    return {spec.name: (spec.rank, spec.scaling) for spec in attachment.specs}


BERT_CASES = {
    "suffixes": {"target_modules": ["query", "value"]},
    "dotted-suffix": {"target_modules": ["attention.self.key", "output.dense"]},
    "whole-name": {"target_modules": ["bert.encoder.layer.1.attention.self.query"]},
    "regex": {"target_modules": r".*\.layer\.1\..*\.(query|value)"},
    "regex-alternatives": {"target_modules": r".*\.\d+\.(intermediate|output)\.dense"},
    "exclude-suffix": {"target_modules": ["query", "dense"], "exclude_modules": ["pooler.dense"]},
    "exclude-regex": {"target_modules": ["query"], "exclude_modules": r".*layer\.0.*"},
    "exclude-name": {
        "target_modules": ["query"],
        "exclude_modules": ["bert.encoder.layer.0.attention.self.query"],
    },
    "rank": {"target_modules": ["query", "value"], "rank_pattern": {"value": 2}},
    "rank-regex": {
        "target_modules": ["query", "value"],
        "rank_pattern": {r"layer\.1\..*": 2, "query": 3},
    },
    "rank-order": {
        "target_modules": ["query", "value"],
        "rank_pattern": {"self.query": 3, r".*": 5},
    },
    "rank-half-a-word": {"target_modules": ["query", "value"], "rank_pattern": {"alue": 2}},
    "rank-middle": {"target_modules": ["query"], "rank_pattern": {"layer.0": 2}},
    "alpha": {"target_modules": ["query", "value"], "alpha_pattern": {"query": 5}},
    "rank-and-alpha": {
        "target_modules": ["query", "value", "key"],
        "rank_pattern": {"query": 2, r"0\.attention\.self\.value": 3},
        "alpha_pattern": {"value": 7, r".*layer\.1.*query": 1},
    },
    "rslora": {"target_modules": ["query"], "use_rslora": True},
    "rslora-patterns": {
        "target_modules": ["query", "key"],
        "use_rslora": True,
        "rank_pattern": {"key": 3},
        "alpha_pattern": {"query": 9},
    },
}


# PEFT and we warn of keys that match no layer; two cases show that half a name is no match.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:rank_pattern has the key:RuntimeWarning")
@pytest.mark.parametrize("case", BERT_CASES.values(), ids=BERT_CASES.keys())
def test_names_ranks_and_scalings_are_pefts_for_the_same_configuration(case):
    network = bert()
    options = {"r": 4, "lora_alpha": 6, **case}
    expected = peft_layers(network, **options)
    assert our_layers(network, **options) == expected
    assert expected  # PEFT did wrap something


@pytest.mark.parametrize(
    ("build", "task"),
    [
        (bert, "SEQ_CLS"),
        (llama_classifier, "SEQ_CLS"),
        (llama, "CAUSAL_LM"),
        (qwen3, "CAUSAL_LM"),
    ],
)
def test_all_linear_wraps_what_peft_wraps(build, task):
    network = build()
    expected = peft_layers(network, r=2, target_modules="all-linear", task_type=task)
    ours = our_layers(network, r=2, lora_alpha=8, target_modules="all-linear")
    assert ours == expected


def test_all_linear_leaves_out_both_modules_of_distilberts_head():
    """PEFT adapts the first of them, and then fails at making a copy of it."""
    found = names(distilbert(), target_modules="all-linear")
    assert len(found) == 12
    assert not any("classifier" in name for name in found)


def test_all_linear_wraps_conv1d_as_peft_does():
    network = gpt2()
    options = {"r": 2, "target_modules": "all-linear"}
    expected = peft_layers(network, **options, task_type="CAUSAL_LM", fan_in_fan_out=True)
    assert our_layers(network, **options).keys() == expected.keys()
    assert "transformer.h.0.mlp.c_proj" in expected


@pytest.mark.parametrize("build", [gpt2, llama, qwen2])
def test_all_linear_leaves_out_the_language_model_head(build):
    found = names(build(), target_modules="all-linear")
    assert "lm_head" not in found
    assert len(found) > 6


def test_all_linear_leaves_out_a_language_model_head_that_another_posterior_adapts():
    network = llama()
    first = attach(network, AdapterConfig(r=2, target_modules=["lm_head", "q_proj"]))
    second = attach(network, AdapterConfig(r=2, target_modules="all-linear"))
    assert "lm_head" in first.layers
    assert "lm_head" not in second.layers


def test_a_language_model_head_is_adapted_when_it_is_named():
    assert names(llama(), target_modules=["lm_head"]) == ["lm_head"]


def test_layers_inside_a_head_are_no_targets():
    found = names(roberta(), target_modules=["dense"])
    assert len(found) == 6
    assert not any(name.startswith("classifier") for name in found)


def test_names_and_shapes_are_the_same_while_another_attachment_wraps_the_network():
    network = bert()
    config = AdapterConfig(r=2, target_modules="all-linear")
    alone = attach(network, config)
    alone.detach()
    attach(network, AdapterConfig(r=4))
    assert attach(network, config).specs == alone.specs


def test_names_are_the_same_while_the_head_around_them_is_another_posteriors_copy():
    """RoBERTa's head holds linear layers: the first posterior owns it, the second adapts them, or
    is told that it cannot. A name that exists in the wrapped network only could not be loaded."""
    network = roberta()
    inside = AdapterConfig(r=2, target_modules=["classifier.dense"], modules_to_save=[])
    alone = names(network, target_modules=["classifier.dense"], modules_to_save=[])
    assert alone == ["classifier.dense"]
    attach(network, AdapterConfig(r=2))
    found, refusal = [], ""
    try:
        found = [spec.name for spec in attach(network, inside).specs]
    except TargetError as error:
        refusal = str(error)
    assert found == alone or "detach()" in refusal


def test_conv1d_has_its_input_before_its_output():
    """GPT-2's c_attn maps 16 to 48 and stores its weight the other way round."""
    spec = attach(gpt2(), AdapterConfig(r=2)).specs[0]
    assert (spec.in_features, spec.out_features) == (16, 48)


def test_linear_has_its_own_input_and_output():
    spec = attach(bert(), AdapterConfig(r=2, target_modules=["intermediate.dense"])).specs[0]
    assert (spec.in_features, spec.out_features) == (16, 32)


# Heads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (bert, ["classifier"]),
        (roberta, ["classifier"]),
        (distilbert, ["pre_classifier", "classifier"]),
        (gpt2_classifier, ["score"]),
        (llama_classifier, ["score"]),
        (vit, ["classifier"]),
        (gpt2, []),
        (llama, []),
        (qwen2, []),
        (qwen3, []),
        (lambda: BertForMaskedLM(BertConfig(**SIZES)), []),
        (mlp, []),
    ],
    ids=[
        *("bert", "roberta", "distilbert", "gpt2-classifier", "llama-classifier", "vit"),
        *("gpt2", "llama", "qwen2", "qwen3", "bert-mlm", "mlp"),
    ],
)
def test_the_task_head_is_found_and_a_language_models_is_none(build, expected):
    assert heads(build()) == expected


def test_modules_to_save_names_the_heads_and_empty_means_none():
    assert heads(distilbert(), modules_to_save=["classifier"]) == ["classifier"]
    assert heads(bert(), modules_to_save=[]) == []
    assert heads(mlp(), target_modules=["0"], modules_to_save=["2"]) == ["2"]


def test_modules_to_save_takes_suffixes_and_the_outer_of_two_nested_modules():
    network = bert()
    assert heads(network, modules_to_save=["pooler"]) == ["bert.pooler"]
    found = heads(network, modules_to_save=["pooler", "pooler.dense", "classifier"])
    assert found == ["bert.pooler", "classifier"]


def test_a_module_to_save_is_no_target():
    found = names(bert(), target_modules=["dense"], modules_to_save=["pooler"])
    assert "bert.pooler.dense" not in found
    assert len(found) == 6


def test_a_module_to_save_that_does_not_exist_raises_and_the_children_are_listed():
    with pytest.raises(TargetError, match="'clasifier'") as caught:
        attach(bert(), AdapterConfig(r=2, modules_to_save=["clasifier"]))
    assert "'bert'" in str(caught.value)
    assert "'classifier'" in str(caught.value)


def test_one_of_two_modules_to_save_that_does_not_exist_raises():
    with pytest.raises(TargetError, match="'nothing'"):
        attach(bert(), AdapterConfig(r=2, modules_to_save=["classifier", "nothing"]))


# Errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["q_proj"], "q_proj", r".*\.q_proj", ["uery"], []])
def test_targets_that_match_nothing_raise_and_the_message_lists_what_exists(targets):
    with pytest.raises(TargetError, match="matches no linear layer") as caught:
        attach(bert(), AdapterConfig(r=2, target_modules=targets))
    message = str(caught.value)
    assert repr(targets) in message
    assert "'bert.encoder.layer.#.attention.self.query'" in message
    # Each kind of layer once, not once a block.
    assert message.count("attention.self.query") == 1


def test_names_of_layers_that_are_not_linear_match_nothing():
    with pytest.raises(TargetError, match="matches no linear layer"):
        attach(bert(), AdapterConfig(r=2, target_modules=["dropout", "LayerNorm"]))


def test_excluding_every_target_raises_and_names_both_options():
    config = AdapterConfig(r=2, target_modules=["query"], exclude_modules=["self.query"])
    with pytest.raises(TargetError, match=r"\['query'\] without \['self.query'\]"):
        attach(bert(), config)


def test_a_network_without_linear_layers_raises():
    with pytest.raises(TargetError, match="it has none"):
        attach(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), AdapterConfig(r=1))


def test_a_network_that_is_itself_a_linear_layer_raises_a_target_error():
    """There is no parent in which it could be replaced."""
    with pytest.raises(TargetError):
        attach(nn.Linear(4, 3), AdapterConfig(r=1))


@pytest.mark.parametrize(
    ("r", "pattern"), [(17, {}), (2, {"query": 17})], ids=["r", "rank_pattern"]
)
def test_a_rank_above_the_layers_size_raises_and_names_layer_and_limit(r, pattern):
    with pytest.raises(ConfigError, match=r"rank 17 .*query.*r <= 16"):
        attach(bert(), AdapterConfig(r=r, rank_pattern=pattern))


def test_the_full_rank_of_a_layer_is_allowed():
    assert attach(bert(), AdapterConfig(r=16)).specs[0].rank == 16


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules"])
def test_a_bad_regular_expression_raises_a_config_error_that_quotes_it(option):
    with pytest.raises(ConfigError, match=r"'\(query' is not a regular expression"):
        attach(bert(), AdapterConfig(**{"r": 2, option: "(query"}))


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_a_bad_regular_expression_in_a_pattern_raises_a_config_error_that_quotes_it(option):
    with pytest.raises(ConfigError, match=r"\(query"):
        attach(bert(), AdapterConfig(**{"r": 2, option: {"(query": 2}}))


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["nothing"]},
        {"r": 17},
        {"modules_to_save": ["nothing"]},
        {"target_modules": "("},
    ],
    ids=["targets", "rank", "head", "regex"],
)
def test_an_attachment_that_raises_leaves_the_network_as_it_was(config):
    network = bert()
    before = dict(network.named_modules())
    with pytest.raises((TargetError, ConfigError)):
        attach(network, AdapterConfig(**{"r": 2, **config}))
    after = dict(network.named_modules())
    assert list(after) == list(before)
    assert all(after[name] is module for name, module in before.items())
    assert all(p.requires_grad for p in network.parameters())


# Layers whose weights torch reads without calling them -----------------------------------------


def test_projections_of_multihead_attention_are_not_targeted():
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    network = nn.Sequential(encoder, nn.Linear(16, 2))
    with pytest.warns(UserWarning, match=r"without an adapter are '#.self_attn \(Multihead"):
        assert names(network, target_modules="all-linear") == ["0.linear1", "0.linear2", "1"]
    with pytest.raises(TargetError, match="matches no linear layer"):
        attach(network, AdapterConfig(r=2, target_modules=["out_proj"]))


def test_projections_of_a_network_that_is_multihead_attention_are_not_targeted():
    with pytest.raises(TargetError):
        attach(nn.MultiheadAttention(16, 2), AdapterConfig(r=2, target_modules=["out_proj"]))


def test_a_pattern_that_matches_nothing_is_pointed_out():
    with pytest.warns(RuntimeWarning, match="rank_pattern has the key 'qurey'"):
        attach(bert(), AdapterConfig(r=2, rank_pattern={"qurey": 4}))
