"""merge(): a new plain network with the function of the mean adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import batch_of, bert, bert_mlm, gpt2, llama, mlp, tokens
from test_digest import coded
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CLIPVisionConfig,
    ConvNextConfig,
    ConvNextForImageClassification,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

import pyrolora
from pyrolora import AdapterConfig, Posterior
from pyrolora.adapters import Wrapper, attach, bind
from pyrolora.adapters.weight_noise import WeightNoise
from pyrolora.errors import ConfigError
from pyrolora.guides import MAP
from pyrolora.model import JointModel, build
from pyrolora.storage import merged as merge_of
from pyrolora.tasks import MaskedLM, task_for

X, Y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def texts() -> Any:
    """Tokens without class labels, for language models."""
    return tokens(12).remove_columns("labels")


PROBLEMS: dict[str, tuple[Any, Any, str]] = {
    "bert": (bert, tokens, "classification"),
    "bert, regression": (
        lambda: bert(num_labels=1),
        lambda: tokens().map(lambda row: {"labels": float(row["labels"])}),
        "regression",
    ),
    "llama": (llama, texts, "text-generation"),
    "gpt2": (gpt2, texts, "text-generation"),
    "plain": (mlp, lambda: (X, Y), "classification"),
}


def fitted(name: str, guide: str = "map", network: Any = None, **adapter: Any) -> Posterior:
    """A posterior whose adapter has moved far enough to change the function."""
    make, data, task = PROBLEMS[name]
    return pyrolora.fit(
        make() if network is None else network,
        data(),
        guide=guide,
        task=task,
        adapter=AdapterConfig(**{"r": 3, **adapter}),
        epochs=3,
        learning_rate=0.05,
        batch_size=6,
        seed=0,
    )


def inputs_of(name: str) -> dict[str, Tensor]:
    if name == "plain":
        return {"inputs": X}
    batch = batch_of(tokens())
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


@torch.no_grad()
def logits(network: nn.Module, name: str) -> Tensor:
    batch = inputs_of(name)
    return network(X) if name == "plain" else network(**batch).logits.float()


@torch.no_grad()
def mean_logits(posterior: Posterior, name: str) -> Tensor:
    """The network under the mean adapter, as the posterior itself runs it."""
    output = posterior.model.network(inputs_of(name), posterior.bank.means())
    return output.unsqueeze(-1) if posterior.task.name == "regression" else output


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_identical(module: nn.Module, before: dict[str, Tensor]) -> None:
    after = module.state_dict()
    assert set(after) == set(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("guide", ["map", "montec"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_merged_network_has_the_function_of_the_mean_adapter(name: str, guide: str) -> None:
    posterior = fitted(name, guide)
    merged = posterior.merge()
    expected = mean_logits(posterior, name)
    torch.testing.assert_close(logits(merged, name), expected, atol=1e-5, rtol=1e-5)
    assert (expected - logits(posterior.base, name)).abs().max() > 1e-2


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_merged_network_is_plain(name: str) -> None:
    merged = fitted(name).merge()
    original = PROBLEMS[name][0]()
    kinds = {key: type(module) for key, module in merged.named_modules()}
    assert kinds == {key: type(module) for key, module in original.named_modules()}
    assert set(merged.state_dict()) == set(original.state_dict())
    assert not any(isinstance(module, Wrapper) for module in merged.modules())
    assert not merged.training
    assert all(p.requires_grad and p.grad is None for p in merged.parameters())


@pytest.mark.parametrize("name", PROBLEMS)
def test_merging_changes_neither_the_base_nor_the_posterior(name: str) -> None:
    posterior = fitted(name, "montec")
    base, model = copies(posterior.base), copies(posterior.model)
    kinds = [type(module) for module in posterior.base.modules()]
    merged = posterior.merge()
    assert_identical(posterior.base, base)
    assert_identical(posterior.model, model)
    assert [type(module) for module in posterior.base.modules()] == kinds
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.add_(1.0)
    assert_identical(posterior.base, base)
    assert_identical(posterior.model, model)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_base_has_its_original_weights_after_the_fit(name: str) -> None:
    posterior = fitted(name)
    original = PROBLEMS[name][0]()
    assert_identical(posterior.detach(), copies(original))


@pytest.mark.parametrize("name", ["bert", "bert, regression", "llama", "gpt2"])
def test_the_merged_network_saves_and_loads_by_itself(name: str, tmp_path: Path) -> None:
    merged: Any = fitted(name).merge()
    merged.save_pretrained(tmp_path)
    language = name in ("llama", "gpt2")
    loader = AutoModelForCausalLM if language else AutoModelForSequenceClassification
    again = loader.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again, name), logits(merged, name), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "adapter",
    [
        {"r": 2, "rank_pattern": {"key": 4}, "alpha_pattern": {"query": 40}},
        {"use_rslora": True, "lora_alpha": 3},
        {"target_modules": "all-linear"},
        {"modules_to_save": []},
        {"lora_dropout": 0.5},
    ],
    ids=str,
)
def test_every_adapter_setting_merges(adapter: dict[str, Any]) -> None:
    posterior = fitted("bert", **adapter)
    expected = mean_logits(posterior, "bert")
    torch.testing.assert_close(logits(posterior.merge(), "bert"), expected, atol=1e-5, rtol=1e-5)
    assert (expected - logits(posterior.base, "bert")).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_a_half_precision_base_merges_in_single_precision_and_rounds_once(name: str) -> None:
    network = PROBLEMS[name][0]().to(torch.bfloat16)
    posterior = fitted(name, network=network)
    merged = posterior.merge()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    for layer, (A, B) in posterior.factors().items():
        update = posterior.bank.specs[layer].scaling * (B @ A)
        update = update.T if name == "gpt2" else update
        weight = posterior.base.get_submodule(layer).get_parameter("base_layer.weight")
        expected = (weight.float() + update).to(torch.bfloat16)
        assert torch.equal(merged.get_submodule(layer).get_parameter("weight"), expected)
        assert not torch.equal(expected, weight)
    difference = logits(merged, name) - mean_logits(posterior, name)
    assert difference.abs().max() < 0.05 * mean_logits(posterior, name).abs().max()


def test_the_merged_network_has_the_posteriors_head() -> None:
    posterior = fitted("bert")
    merged = posterior.merge()
    head = posterior.model.named_heads()["classifier"][0].get_parameter("weight")
    assert torch.equal(merged.get_submodule("classifier").get_parameter("weight"), head)
    assert not torch.equal(bert().get_submodule("classifier").get_parameter("weight"), head)


def test_two_posteriors_of_one_network_merge_to_their_own_functions() -> None:
    network = bert()
    first = fitted("bert", network=network)
    second = fitted("bert", network=network, target_modules=["value", "output.dense"])
    expected = [mean_logits(first, "bert"), mean_logits(second, "bert")]
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    for posterior, output in zip((first, second), expected, strict=True):
        got = logits(posterior.merge(), "bert")
        torch.testing.assert_close(got, output, atol=1e-5, rtol=1e-5)


def test_a_detached_posterior_still_merges() -> None:
    posterior = fitted("bert")
    expected = mean_logits(posterior, "bert")
    posterior.detach()
    torch.testing.assert_close(logits(posterior.merge(), "bert"), expected, atol=1e-5, rtol=1e-5)


def test_an_adapted_output_layer_that_is_tied_to_the_embedding_merges() -> None:
    """Only the output layer is adapted: the embedding must stay, tied though they are."""
    posterior = fitted("gpt2", target_modules=["lm_head"])
    expected = mean_logits(posterior, "gpt2")
    assert (expected - logits(posterior.base, "gpt2")).abs().max() > 1e-2
    torch.testing.assert_close(logits(posterior.merge(), "gpt2"), expected, atol=1e-5, rtol=1e-5)


class Codes(nn.Linear):
    """A linear layer that keeps numbers of another kind, and their scale beside them."""

    def __init__(self, layer: nn.Linear, kind: torch.dtype, highest: float) -> None:
        super().__init__(layer.in_features, layer.out_features)
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / highest
        codes = layer.weight.detach() / scale
        codes = codes.to(kind) if kind.is_floating_point else codes.round().to(kind)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def quantised(kind: torch.dtype) -> nn.Sequential:
    network = mlp()
    highest = 127.0 if kind is torch.int8 else 400.0
    return nn.Sequential(Codes(network[0], kind, highest), nn.Tanh(), network[2])


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("guide", ["map", "montec", "ensemble"])
def test_a_quantised_network_keeps_adapters_in_their_own_precision(
    kind: torch.dtype, guide: str, tmp_path: Path
) -> None:
    network = quantised(kind)
    options = {"epochs": 5, "learning_rate": 0.05, "seed": 0, "task": "classification"}
    posterior = pyrolora.fit(network, (X, Y), guide, adapter=AdapterConfig(r=2), **options)
    found = posterior.predict((X, Y), 1, seed=0).probs
    of_mean = posterior.predict((X, Y), 0).probs
    draws = posterior.sample(1, seed=0)
    (A0, B0), (A2, B2) = (
        tuple(m.reshape(-1, *m.shape[-2:])[0] for m in pair)  # the mean factor has no draws
        for pair in posterior.factors(draws).values()
    )
    scaling = [spec.scaling for spec in posterior.bank.specs.values()]
    with torch.no_grad():
        plain = posterior.detach()
        hidden = (plain[0](X) + scaling[0] * X @ A0.T @ B0.T).tanh()
        expected = plain[2](hidden) + scaling[1] * hidden @ A2.T @ B2.T
    torch.testing.assert_close(found, expected.softmax(-1), rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match=rf"of '0' is no plain one.*{kind}.*dequantize=True"):
        posterior.merge()
    whole = posterior.merge(dequantize=True)
    assert [type(layer) for layer in (whole[0], posterior.detach()[0])] == [nn.Linear, Codes]
    with torch.no_grad():
        torch.testing.assert_close(whole(X).softmax(-1), of_mean)
    posterior.to_peft(tmp_path)


def test_a_parametrised_layer_is_not_merged() -> None:
    network = mlp()
    torch.nn.utils.parametrizations.weight_norm(network[0])
    posterior = pyrolora.fit(
        network, (X, Y), "map", epochs=1, task="classification", adapter=AdapterConfig(r=2)
    )
    with pytest.raises(ConfigError, match=r"of '0' is no plain one.*parametrised"):
        posterior.merge()


def test_a_layer_under_two_names_gets_a_weight_for_each(tmp_path: Path) -> None:
    lin = nn.Linear(4, 4)
    options = {"epochs": 20, "learning_rate": 0.02, "seed": 0, "task": "classification"}
    apart = nn.Sequential(nn.Sequential(lin), nn.Tanh(), nn.Sequential(lin), nn.Linear(4, 3))
    beside = nn.Sequential(lin, nn.Tanh(), lin, nn.Linear(4, 3))
    for network, adapted in ((apart, ["0.0", "2.0", "3"]), (beside, ["0", "3"])):
        posterior = pyrolora.fit(network, (X, Y), "map", adapter=AdapterConfig(r=2), **options)
        assert list(posterior.bank.specs) == adapted
        expected = posterior.predict((X, Y), 0).probs
        with torch.no_grad():
            found = posterior.merge()(X).softmax(-1)
        torch.testing.assert_close(found, expected)
        if network is apart:
            with pytest.raises(ConfigError, match=r"'0.0' and '2.0' are one layer"):
                posterior.to_peft(tmp_path)
        else:
            posterior.to_peft(tmp_path)
        posterior.detach()


def test_what_is_merged_in_inference_mode_can_be_trained() -> None:
    posterior = fitted("plain")
    with torch.inference_mode():
        network = posterior.merge()
    network(X).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


# Tied embeddings ----------------------------------------------------------------------------------


def t5() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1}
    config = T5Config(**sizes, num_heads=2, decoder_start_token_id=0, pad_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def llava() -> Any:
    """A language model with tied embeddings inside of a network with nested configurations."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    text = LlamaConfig(**sizes, vocab_size=16, pad_token_id=0, tie_word_embeddings=True)
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    options = {"tie_word_embeddings": True, "image_token_index": 15}
    config = LlavaConfig(vision_config=vision, text_config=text, **options)
    return LlavaForConditionalGeneration(config).eval()


def tied_llama() -> Any:
    return llama(tie_word_embeddings=True, initializer_range=0.3)


@torch.no_grad()
def with_adapters(network: Any, **adapter: Any) -> JointModel:
    """A joint model whose adapters and heads have moved, without a fit."""
    config = AdapterConfig(r=2, **adapter)
    joint = build(network, attach(network, config), config, MAP(), MaskedLM(), 4)
    generator = torch.Generator().manual_seed(0)
    for parameter in (*joint.program.parameters(), *joint.heads.parameters()):
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return joint


TIED: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "bert, adapted": (bert_mlm, {"target_modules": ["decoder"], "modules_to_save": []}, False),
    "bert, owned": (bert_mlm, {"target_modules": ["query"], "modules_to_save": ["cls"]}, False),
    "bert, as it was": (bert_mlm, {"target_modules": ["query"], "modules_to_save": []}, True),
    "llama, adapted": (tied_llama, {"target_modules": ["lm_head"]}, False),
    "llama, output owned": (
        tied_llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        False,
    ),
    "llama, input owned": (
        tied_llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        False,
    ),
    "llama, as it was": (tied_llama, {"target_modules": ["q_proj"]}, True),
    "t5, adapted": (t5, {"target_modules": ["lm_head"]}, False),
    "llava, adapted": (llava, {"target_modules": ["lm_head"], "modules_to_save": []}, False),
    "llava, as it was": (llava, {"target_modules": ["q_proj"], "modules_to_save": []}, True),
}


@pytest.mark.parametrize("case", TIED)
def test_what_is_saved_says_whether_the_embeddings_are_tied(case: str, tmp_path: Path) -> None:
    make, adapter, tied = TIED[case]
    joint = with_adapters(make(), **adapter)
    factors = joint.program.mean()
    ids = torch.randint(3, 14, (2, 6), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if case.startswith("t5") else {})}
    network: Any = merge_of(joint, factors)
    network.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["tie_word_embeddings"] is tied
    same = network.get_output_embeddings().weight is network.get_input_embeddings().weight
    assert same is tied
    again = type(network).from_pretrained(tmp_path).eval()
    with torch.no_grad(), bind(joint.binding(factors)):
        expected = joint.base(**inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(network(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(again(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_copy_of_the_embeddings_that_is_equal_is_tied_again() -> None:
    network = tied_llama()
    config = AdapterConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    law = task_for(network, "text-generation")
    joint = build(network, attach(network, config), config, MAP(), law, 4)
    merged: Any = merge_of(joint, joint.program.mean())
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_a_network_that_computes_otherwise_when_untied_is_refused() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1}
    network = UMT5ForConditionalGeneration(UMT5Config(**sizes, num_heads=2)).eval()
    joint = with_adapters(network, target_modules=["lm_head"])
    with pytest.raises(ConfigError, match=r"UMT5.*not tied computes something else.*to_peft"):
        merge_of(joint, joint.program.mean())


def test_a_merged_network_has_no_name_that_loads_it(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    merged: Any = fitted("bert", network=network).merge()
    assert merged.config._name_or_path == ""
    assert network.config._name_or_path == str(tmp_path)


# Networks without input embeddings, and weights that are no numbers -------------------------------


def convnext() -> Any:
    torch.manual_seed(0)
    config = ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, patch_size=2)
    return ConvNextForImageClassification(config).eval()


def test_a_network_without_input_embeddings_merges(tmp_path: Path) -> None:
    joint = with_adapters(convnext(), target_modules=["pwconv1"])
    factors, images = joint.program.mean(), torch.randn(2, 3, 8, 8)
    with pytest.raises(NotImplementedError):
        joint.base.get_input_embeddings()
    merged: Any = merge_of(joint, factors)
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    with torch.no_grad(), bind(joint.binding(factors)):
        expected = joint.base(images).logits
        plain = convnext()(images).logits
    with torch.no_grad():
        torch.testing.assert_close(again(images).logits, expected, atol=1e-5, rtol=1e-5)
    assert (expected - plain).abs().max() > 1e-3


def test_a_weight_of_a_subclass_of_tensors_is_refused_in_words() -> None:
    """As torchao's and quanto's, which cannot be copied, split or added to."""
    network = nn.Sequential(coded(), nn.Linear(4, 3))
    joint = with_adapters(network, target_modules=["0"])
    with pytest.raises(ConfigError, match=r"of '0' is no plain one.*a Coded, .*to_peft"):
        merge_of(joint, joint.program.mean())
    noise = WeightNoise((1,), 0.1, 0)
    with pytest.raises(ConfigError, match=r"got a Coded of torch.float32"):
        noise.frozen(network[0].base_layer, X, torch.zeros(2, 4), torch.zeros(2, 4))


def test_a_network_that_cannot_be_copied_is_refused_in_words() -> None:
    joint = with_adapters(nn.Sequential(coded(), nn.Linear(4, 3)), target_modules=["1"])
    with pytest.raises(ConfigError, match=r"this Sequential cannot be copied.*to_peft"):
        merge_of(joint, joint.program.mean())
