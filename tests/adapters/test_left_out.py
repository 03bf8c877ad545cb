"""What gets no adapter is said by name."""

from __future__ import annotations

import peft
import pytest
import torch
from problems import SIZES, bert, bert_mlm, llama, mlp
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPConfig,
    CLIPForImageClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    GptOssConfig,
    GraniteMoeConfig,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForQuestionAnswering,
)
from transformers.models.dbrx.configuration_dbrx import DbrxFFNConfig
from transformers.models.dbrx.modeling_dbrx import DbrxExpertGLU

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.adapters import Binding, Factors, attach, bind
from pyrolora.adapters.heads import find_heads
from pyrolora.errors import ConfigError, TargetError

EXPERTS = {"num_key_value_heads": 2, "num_experts_per_tok": 1}
TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
WITH_HEADS = {**TINY, "num_attention_heads": 2, "vocab_size": 30}


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**WITH_HEADS, **EXPERTS, num_local_experts=2))


def qwen_moe() -> nn.Module:
    own = {"num_experts": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**WITH_HEADS, **EXPERTS, **own))


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.out = nn.Conv1d(4, 4, 1, groups=2), nn.Linear(4, 2)
        self.attention = nn.MultiheadAttention(4, 2)


# Names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "names", "said"),
    [
        (bert, ["query", "LayerNorm"], "'LayerNorm' is of the class LayerNorm, no lin"),
        (bert, ["query", "valeu"], "'valeu' is no module .*'value'"),
        (
            bert,
            ["query", "self"],
            "'self' is of the class BertSelfAttention.*inside of it: 'query'",
        ),
        (bert, ["query", "classifier"], "'classifier' belongs to a task head"),
        (Conv, ["out", "patches"], "'patches' is of the class Conv1d, and has groups"),
        (Conv, ["out", "attention"], "'attention' is of the class MultiheadAttention, whose weigh"),
        (mixtral, ["q_proj", "gate_up_proj"], "'gate_up_proj' is a parameter of a MixtralExperts"),
        (
            mixtral,
            ["q_proj", "gate", "w1"],
            "'gate' is of the class Mixtral.*'w1' is no mod",
        ),
    ],
)
def test_each_name_that_selects_no_layer_is_said_with_what_it_is(make, names, said) -> None:
    for targets in (names, peft.LoraConfig(target_modules=names).target_modules):
        network = make()
        with pytest.raises(TargetError, match=said):
            attach(network, AdapterConfig(r=2, target_modules=targets))
        assert all(type(m).__name__ != "AdapterLayer" for m in network.modules())


@pytest.mark.parametrize(
    ("excluded", "said"),
    [
        (["valeu"], "has no such module .*'value'"),
        ("layer.0", "a BertLayer with layers inside .* would exclude none"),
        (["value", "layer.0"], "a BertLayer with layers inside"),
    ],
)
def test_an_exclusion_that_excludes_nothing_is_refused(excluded, said) -> None:
    config = AdapterConfig(r=2, target_modules=["query", "value"], exclude_modules=excluded)
    with pytest.raises(TargetError, match=said):
        attach(bert(), config)


def test_an_exclusion_of_what_is_not_selected_is_fine() -> None:
    config = AdapterConfig(r=2, exclude_modules=["lm_head", "o_proj"])
    assert len(attach(llama(), config).specs) == 6


def test_a_name_whose_layers_are_all_excluded_is_refused() -> None:
    targets = {"target_modules": ["query", "key"], "exclude_modules": ["key"]}
    with pytest.raises(TargetError, match="'key' is excluded by exclude_modules"):
        attach(bert(), AdapterConfig(r=2, **targets))


def test_what_a_regular_expression_matches_and_cannot_be_adapted_is_named() -> None:
    config = AdapterConfig(r=2, target_modules=r"out|patches")
    with pytest.warns(UserWarning, match=r"no adapter: 'patches \(Conv1d\)'"):
        attach(Conv(), config)


def test_modules_to_save_have_to_exist_and_to_have_parameters() -> None:
    for name, said in (("clasifier", "'classifier'"), ("dropout", "no parameters to train")):
        with pytest.raises(TargetError, match=said):
            attach(bert(), AdapterConfig(r=2, modules_to_save=[name]))


def test_no_name_is_not_every_name() -> None:
    with pytest.raises(TargetError, match="matches no linear layer"):
        attach(bert(), pyrolora.adapters.as_adapter_config(peft.LoraConfig(target_modules=[])))


# Weights -----------------------------------------------------------------------------------------


def test_experts_and_routers_are_pointed_out_with_the_share_that_is_adapted() -> None:
    said = r"here 57% .*#.mlp.gate \(MixtralTopKRouter\)', 'model.layers.#.mlp.experts \(Mixtral"
    network = mixtral()
    own = sum(p.numel() for n, p in network.named_parameters() if "self_attn" in n)
    rest = sum(p.numel() for n, p in network.named_parameters() if "mlp" in n and p.dim() > 1)
    said = said.replace("57%", f"{own / (own + rest):.0%}")
    with pytest.warns(UserWarning, match=said):
        attach(network, AdapterConfig(r=2, target_modules="all-linear"))


MOES = {
    "GptOssExperts": GptOssConfig(**WITH_HEADS, **EXPERTS, num_local_experts=2, head_dim=8),
    "OlmoeExperts": OlmoeConfig(**WITH_HEADS, **EXPERTS, num_experts=2),
    "GraniteMoeExperts": GraniteMoeConfig(**WITH_HEADS, **EXPERTS, num_local_experts=2),
}


@pytest.mark.parametrize("experts", MOES)
def test_fused_experts_of_every_kind_are_named(experts) -> None:
    network = AutoModelForCausalLM.from_config(MOES[experts])
    with pytest.warns(UserWarning, match=rf"without an adapter are .*experts \({experts}\)"):
        attach(network, AdapterConfig(r=2, target_modules="all-linear"))


def test_experts_that_lie_below_one_another_in_a_matrix_are_named() -> None:
    config = DbrxFFNConfig(hidden_size=16, ffn_hidden_size=8, moe_num_experts=2)
    network = nn.Sequential(nn.Linear(16, 16), DbrxExpertGLU(config))
    with pytest.warns(UserWarning, match=r"here 25% .*are '1 \(DbrxExpertGLU\)'"):
        attach(network, AdapterConfig(r=2, target_modules="all-linear"))


def test_what_mambas_kernels_read_is_left_out_by_name() -> None:
    """They read the weight without calling the layer, where they run; PEFT refuses it."""
    own = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 4}
    network = MambaForCausalLM(MambaConfig(vocab_size=30, **own))
    with pytest.warns(UserWarning, match=r"'backbone.layers.#.mixer.out_proj \(Linear\)'"):
        found = attach(network, AdapterConfig(r=2, target_modules="all-linear"))
    assert {name.rpartition(".")[2] for name in found.layers} == {"in_proj", "x_proj", "dt_proj"}


@pytest.mark.filterwarnings("ignore:'all-linear' adapts linear layers")
def test_layers_below_the_rank_are_left_out_of_a_pattern_and_refused_by_name() -> None:
    with pytest.warns(UserWarning, match=r"smaller than its rank: 'model.*shared_expert_gate'"):
        found = attach(qwen_moe(), AdapterConfig(r=2, target_modules="all-linear"))
    assert not any(name.endswith("shared_expert_gate") for name in found.layers)
    named = AdapterConfig(r=2, target_modules=["q_proj", "shared_expert_gate"])
    with pytest.raises(ConfigError, match="rank 2 is above the size of layer"):
        attach(qwen_moe(), named)


class Packed(nn.Module):
    """A quantised layer that is no ``nn.Linear``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight = nn.Parameter(torch.ones(outputs, inputs, dtype=torch.uint8), False)

    def forward(self, x):
        return x @ self.weight.to(x.dtype).T


def test_a_quantised_layer_that_is_no_linear_one_is_called_and_gets_its_adapter() -> None:
    network = llama()
    for block in network.model.layers:
        old = block.self_attn.q_proj
        block.self_attn.q_proj = Packed(old.in_features, old.out_features)
    found = attach(network, AdapterConfig(r=2))
    assert sum(name.endswith("q_proj") for name in found.layers) == 2
    layer = found.layers["model.layers.0.self_attn.q_proj"]
    x, A, sB = torch.randn(3, 16), torch.randn(2, 16), torch.randn(2, 16)
    with bind(Binding({layer: Factors(A, sB)})):
        torch.testing.assert_close(layer(x), x.sum(-1, keepdim=True) + x @ A.T @ sB)


def test_auto_does_not_leave_out_what_it_cannot_adapt() -> None:
    network = llama()
    network.model.layers[0].self_attn.q_proj = nn.Conv1d(16, 16, 1)
    with pytest.raises(TargetError, match=r"layers.0.self_attn.q_proj' cannot .*'Conv1d'"):
        attach(network, AdapterConfig(r=2))


# Adapters of others ------------------------------------------------------------------------------


def test_a_network_with_adapters_of_pefts_inside_is_refused() -> None:
    config = peft.LoraConfig(target_modules=["q_proj"])
    wrapped = peft.get_peft_model(llama(), config).base_model.model
    added = llama()
    added.add_adapter(config)
    for network in (wrapped, added):
        for options in ({}, {"guide": "full"}):
            with pytest.raises(ConfigError, match=r"layers.0.self_attn.q_proj'.*merge_and_unload"):
                pyrolora.fit(network, (torch.randint(3, 16, (4, 6)),), **options)


# Heads -------------------------------------------------------------------------------------------


def clip() -> nn.Module:
    vision = {**TINY, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    return CLIPForImageClassification(
        CLIPConfig(vision_config=vision, text_config=WITH_HEADS, num_labels=3)
    )


def blip() -> nn.Module:
    vision = {**TINY, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    text = {**WITH_HEADS, "encoder_hidden_size": 16, "bos_token_id": 1, "sep_token_id": 2}
    return BlipForConditionalGeneration(BlipConfig(vision_config=vision, text_config=text))


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForQuestionAnswering(T5Config(vocab_size=30, **sizes, decoder_start_token_id=0))


@pytest.mark.parametrize(
    ("make", "heads"),
    [
        (clip, ["classifier"]),
        (t5, ["qa_outputs"]),
        (blip, []),
        (bert_mlm, []),
        (lambda: ElectraForMaskedLM(ElectraConfig(**SIZES, embedding_size=8)), []),
        (
            lambda: DistilBertForMaskedLM(
                DistilBertConfig(vocab_size=30, dim=16, hidden_dim=16, n_layers=1, n_heads=2)
            ),
            [],
        ),
    ],
    ids=["clip", "t5", "blip", "bert", "electra", "distilbert"],
)
def test_a_head_is_neither_a_backbone_nor_what_writes_tokens(make, heads) -> None:
    assert find_heads(make(), AdapterConfig()) == heads


def test_a_plain_module_has_the_heads_that_are_named() -> None:
    assert find_heads(mlp(), AdapterConfig()) == []
    assert find_heads(mlp(), AdapterConfig(modules_to_save=["2"])) == ["2"]
