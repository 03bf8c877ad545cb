"""Query, key and value are found by name and place, with PEFT's table or without it."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import transformers
from problems import SIZES, WORDS, llama
from torch import nn

from pyrolora.adapters import Binding, Factors, attach, bind, features, projections, unwrap
from pyrolora.adapters.config import AdapterConfig
from pyrolora.adapters.projections import KEY, QUERY, VALUE, roles
from pyrolora.errors import TargetError

SMALL = {**SIZES, "num_hidden_layers": 2, "num_attention_heads": 2}
PICTURE = {"hidden_size": 16, "intermediate_size": 32, "image_size": 8, "patch_size": 4}
VISION = {**PICTURE, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 8}
GPT = {"vocab_size": len(WORDS), "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}
MLA = {
    "kv_lora_rank": 4,
    "q_lora_rank": 6,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "moe_intermediate_size": 8,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
QKV, Q_K_V = ["q_proj", "k_proj", "v_proj"], ["q", "k", "v"]


def made(kind: str, **options) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, re.sub("For.*|Model$|LMHead.*", "", kind) + "Config")
    return getattr(transformers, kind)(config(**options)).eval()


def llava() -> nn.Module:
    text = {"model_type": "llama", **SMALL, "num_key_value_heads": 1}
    vision = {"model_type": "clip_vision_model", **VISION}
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=9)
    return transformers.LlavaForConditionalGeneration(config)


# Class -> what makes it, where the projections are ('#' stands for a number), and their names.
FAMILIES = {
    "opt": (
        lambda: made("OPTForCausalLM", **SMALL, ffn_dim=32, word_embed_proj_dim=16),
        ["model.decoder.layers.#.self_attn"],
        ["k_proj", "v_proj", "q_proj"],
    ),
    "phi": (lambda: made("PhiForCausalLM", **SMALL), ["model.layers.#.self_attn"], QKV),
    "phi3": (
        lambda: made("Phi3ForCausalLM", **SMALL, pad_token_id=0),
        ["model.layers.#.self_attn"],
        ["qkv_proj"],
    ),
    "gpt_neox": (
        lambda: made("GPTNeoXForCausalLM", **SMALL),
        ["gpt_neox.layers.#.attention"],
        ["query_key_value"],
    ),
    "gptj": (
        lambda: made("GPTJForCausalLM", **GPT, rotary_dim=4),
        ["transformer.h.#.attn"],
        ["k_proj", "v_proj", "q_proj"],
    ),
    "codegen": (
        lambda: made("CodeGenForCausalLM", **{**GPT, "n_head": 4}, rotary_dim=4),
        ["transformer.h.#.attn"],
        ["qkv_proj"],
    ),
    "deberta": (
        lambda: made("DebertaForMaskedLM", **SMALL),
        ["deberta.encoder.layer.#.attention.self"],
        ["in_proj"],
    ),
    "deberta-v2": (
        lambda: made(
            "DebertaV2ForMaskedLM", **SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"]
        ),
        ["deberta.encoder.layer.#.attention.self"],
        ["query_proj", "key_proj", "value_proj"],
    ),
    "mpnet": (
        lambda: made("MPNetForMaskedLM", **SMALL),
        ["mpnet.encoder.layer.#.attention.attn"],
        Q_K_V,
    ),
    "longformer": (
        lambda: made("LongformerForMaskedLM", **SMALL, attention_window=4),
        ["longformer.encoder.layer.#.attention.self"],
        ["query", "key", "value"],
    ),
    "t5": (
        lambda: made("T5ForConditionalGeneration", vocab_size=len(WORDS), **T5),
        [
            "encoder.block.#.layer.#.SelfAttention",
            "decoder.block.#.layer.#.SelfAttention",
            "decoder.block.#.layer.#.EncDecAttention",
        ],
        Q_K_V,
    ),
    "mixtral": (
        lambda: made("MixtralForCausalLM", **SMALL, **MOE, num_key_value_heads=1),
        ["model.layers.#.self_attn"],
        QKV,
    ),
    "deepseek_v3": (
        lambda: made("DeepseekV3ForCausalLM", **SMALL, **MLA),
        ["model.layers.#.self_attn"],
        ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"],
    ),
    "clip": (
        lambda: made("CLIPModel", vision_config=VISION, text_config={**SMALL, "projection_dim": 8}),
        ["text_model.encoder.layers.#.self_attn", "vision_model.encoder.layers.#.self_attn"],
        ["k_proj", "v_proj", "q_proj"],
    ),
    "llava": (llava, ["model.language_model.layers.#.self_attn"], QKV),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_its_projections_with_pefts_table_and_without_it(family, monkeypatch):
    make, places, names = FAMILIES[family]
    network = make()
    specs = attach(network, AdapterConfig(r=2)).specs
    found = [spec.name.rpartition(".")[::2] for spec in specs]
    wheres = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "#", place) for place, _ in found)
    assert list(wheres) == places
    assert set(found) == {(place, name) for place, _ in found for name in names}
    assert len(found) == 2 * len(places) * len(names)
    monkeypatch.setattr(projections, "_of_peft", lambda network: [])
    assert projections.projections(make()) == [spec.name for spec in specs]


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("attn.Wqkv", "", (QUERY, KEY, VALUE)),
        ("query_key_value", "", (QUERY, KEY, VALUE)),
        ("attn.c_attn", "GPT2Attention", (QUERY, KEY, VALUE)),
        ("mixer.in_proj", "MambaMixer", ()),
        ("kv_a_proj_with_mqa", "", (KEY, VALUE)),
        ("to_q", "", (QUERY,)),
        ("v_proj_delayed", "", (VALUE,)),
        ("projection_key", "", (KEY,)),
        ("self.pos_key_proj", "", ()),
        ("relative_k_proj", "", ()),
        ("qa_outputs", "", ()),
        ("o_proj", "", ()),
        ("attn.proj", "", ()),
    ],
)
def test_names_say_what_a_layer_projects_to(name, kind, expected) -> None:
    assert roles(name, kind) == expected


class Block(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def test_a_module_with_two_of_the_three_is_no_attention() -> None:
    """As RWKV's feed-forward part."""
    two = Block(key=nn.Linear(4, 4), value=nn.Linear(4, 4))
    three = Block(q=nn.Linear(4, 4), kv_proj=nn.Linear(4, 8), out=nn.Linear(4, 4))
    found = projections.projections(Block(ffn=two, attn=three))
    assert found == ["attn.q", "attn.kv_proj"]


def test_blocks_that_share_keys_and_values_have_their_queries() -> None:
    def attention(*names: str) -> nn.Module:
        return Block(attn=Block(**{name: nn.Linear(4, 4) for name in names}))

    blocks = nn.ModuleList([attention("wq", "wk", "wv"), attention("wq"), attention("wo")])
    other = nn.ModuleList([attention("wq", "wo")])
    found = projections.projections(Block(blocks=blocks, readers=other))
    assert found == ["blocks.0.attn.wq", "blocks.0.attn.wk", "blocks.0.attn.wv", "blocks.1.attn.wq"]


def test_parametrised_and_tied_projections_are_found_and_computed() -> None:
    """The adapter of a weight that is computed adds to what the layer gives; of one that two layers
    share, each layer has its own."""
    network = llama()
    first, second = (block.self_attn for block in network.model.layers)
    nn.utils.parametrizations.weight_norm(first.q_proj)
    second.k_proj.weight = second.v_proj.weight = nn.Parameter(torch.randn(8, 16) / 4)
    found = attach(network, AdapterConfig(r=2))
    assert len(found.layers) == 6
    ids = torch.tensor([[4, 5, 6, 7]])
    factors, plain = {}, copy.deepcopy(network)
    unwrap(plain)
    for name, layer in found.layers.items():
        inputs, outputs = features(layer)
        A, sB = torch.randn(2, inputs) / 4, torch.randn(2, outputs) / 4
        factors[layer] = Factors(A, sB)
        own = plain.get_submodule(name)
        changed = nn.Linear(inputs, outputs, bias=False)
        changed.weight = nn.Parameter(own.weight.detach() + sB.T @ A)
        plain.set_submodule(name, changed)
    with torch.no_grad(), bind(Binding(factors)):
        ours = network(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(ours, plain(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_projection_whose_layer_lies_in_a_shell_is_found() -> None:
    shells = {f"{x}_proj": Block(linear=nn.Linear(4, 4)) for x in "qkv"}
    found = projections.projections(Block(self_attn=Block(**shells)))
    assert found == [f"self_attn.{x}_proj.linear" for x in "qkv"]


def test_what_pefts_table_alone_knows_is_taken_from_it() -> None:
    network = made("RwkvForCausalLM", vocab_size=30, hidden_size=16, num_hidden_layers=2)
    found = {spec.name.rpartition(".")[2] for spec in attach(network, AdapterConfig(r=2)).specs}
    assert found == {"key", "value", "receptance", "output"}


def test_what_peft_lists_outside_of_attention_is_not_taken() -> None:
    """``fc1`` and ``fc2`` of Phi."""
    network = FAMILIES["phi"][0]()
    assert any(name.endswith("fc1") for name in projections._of_peft(network))
    assert not any(name.endswith("fc1") for name in projections.projections(network))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (
            "XLNetForSequenceClassification",
            {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16},
        ),
        ("ConvNextForImageClassification", {"hidden_sizes": [8], "depths": [1], "num_stages": 1}),
    ],
)
def test_networks_without_linear_projections_are_refused_with_their_layers(kind, options) -> None:
    with pytest.raises(TargetError, match=r"queries, keys and values .*its linear layers are '"):
        attach(made(kind, **options), AdapterConfig(r=2))


def test_projections_that_are_no_linear_layers_are_refused_by_name() -> None:
    options = {**SMALL, "embedding_size": 16}
    options |= {
        f"{x}_groups": 1 for x in ("q", "k", "v", "post_attention", "intermediate", "output")
    }
    network = made("SqueezeBertForMaskedLM", **options)
    with pytest.raises(TargetError, match=r"attention.query', .* cannot be adapted: 'Conv1d'"):
        attach(network, AdapterConfig(r=2))
