"""Fused experts and routers: adapters of parameters, by ``target_parameters``, against PEFT."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from problems import arguments, bert
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
)

import pyrolora
from pyrolora import AdapterConfig, loading
from pyrolora.adapters import attach
from pyrolora.errors import CheckpointError, ConfigError, TargetError
from pyrolora.guides import Flat, Laplace, MeanField, MonteCLoRA
from pyrolora.peft import write_adapter

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.randint(5, 40, (5, 7), generator=torch.Generator().manual_seed(1))
ROWS = [{"input_ids": row.tolist(), "attention_mask": [1] * 7} for row in IDS]
# PEFT uses these keys nevertheless.
WARNED = pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")


def made(kind: type, config: Any) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = kind(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return network


def mixtral() -> nn.Module:
    """Experts (E, out, in)."""
    return made(MixtralForCausalLM, MixtralConfig(**SIZES))


def gpt_oss() -> nn.Module:
    """Experts (E, in, out), and biases."""
    return made(GptOssForCausalLM, GptOssConfig(**SIZES, head_dim=8))


NETWORKS = {"mixtral": (mixtral, "mlp.gate.weight"), "gpt_oss": (gpt_oss, "mlp.router.weight")}


def adapter(router: str, **options: Any) -> AdapterConfig:
    """Experts, the router, and the queries; the two parameters of the experts differ in rank."""
    given = {"target_modules": ["q_proj"], "rank_pattern": {"down_proj": 3}, **options}
    return AdapterConfig(r=2, lora_alpha=8, target_parameters=[*EXPERTS, router], **given)


def logits(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network.eval()(input_ids=IDS).logits


def scores(network: nn.Module) -> Tensor:
    found = logits(network)[:, :-1].log_softmax(-1)
    return found.gather(-1, IDS[:, 1:, None])[..., 0].sum(1)


def written(network: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], k: int) -> nn.Module:
    """The network with W + s B A of draw k in its weights, each matrix found by its name."""
    network = copy.deepcopy(network).requires_grad_(False)
    for name, pair in factors.items():
        A, B = (factor[k] if factor.dim() == 3 else factor for factor in pair)
        update = 8 / (2 if "down_proj" not in name else 3) * (B @ A)
        place, _, last = name.rpartition(".")
        if not last.isdigit():
            weight = dict(network.named_parameters()).get(name)
            (network.get_submodule(name).weight if weight is None else weight).add_(update)
            continue
        module, _, parameter = place.rpartition(".")
        matrix = network.get_submodule(module).get_parameter(parameter)[int(last)]
        matrix += update.T if isinstance(network, GptOssForCausalLM) else update
    return network


@pytest.fixture(scope="module", params=NETWORKS)
def fitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A network as it was, and a posterior with draws that are far apart."""
    make, router = NETWORKS[request.param]
    args = arguments(tmp_path_factory.mktemp("fit"), max_steps=2, learning_rate=2e-2)
    guide = MonteCLoRA(units="one", scale_updates="gradient")
    return make(), pyrolora.fit(make(), ROWS, guide, adapter=adapter(router), training=args)


def test_each_expert_has_an_adapter_of_its_own(fitted: Any) -> None:
    posterior = fitted[1]
    specs = posterior.bank.specs
    own = [name for name in specs if name.startswith("model.layers.1.mlp.experts.down_proj.")]
    assert [name.rpartition(".")[2] for name in own] == ["0", "1", "2"]
    assert len(specs) == 2 * (1 + 2 * 3 + 1)
    assert {(s.in_features, s.out_features, s.rank) for n, s in specs.items() if n in own} == {
        (12, 16, 3)
    }


def test_mean_and_draws_are_those_of_networks_with_the_updates_in_their_weights(
    fitted: Any, tmp_path: Path
) -> None:
    network, posterior = fitted
    mean = scores(written(network, posterior.factors(), 0))
    torch.testing.assert_close(posterior.log_likelihood(ROWS, 0)[0], mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(scores(posterior.merge()), mean, atol=1e-4, rtol=0)
    drawn = posterior.factors(posterior.sample(3, seed=3))
    expected = torch.stack([scores(written(network, drawn, k)) for k in range(3)])
    assert expected.std(0).min() > 0.05
    found = posterior.log_likelihood(ROWS, 3, seed=3)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    posterior.save(tmp_path)
    again = pyrolora.load(tmp_path, copy.deepcopy(network))
    assert torch.equal(again.log_likelihood(ROWS, 3, seed=3), found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scaling": 7.0}, "have adapters of one rank and scaling, and that of"),
        ({"lookup": True}, "has lookup=False, and in the posterior True"),
        ({"name": "model.layers.7.mlp.experts.down_proj.2"}, "has no linear layer and no param"),
        ({"out_features": 3}, "maps 12 to 16 features, and in the posterior 12 to 3"),
    ],
)
def test_a_description_that_does_not_fit_the_network_is_refused(
    fitted: Any, change: dict[str, Any], said: str
) -> None:
    specs = list(fitted[1].bank.specs.values())
    own = next(i for i, s in enumerate(specs) if s.name.endswith("1.mlp.experts.down_proj.2"))
    specs[own] = replace(specs[own], **change)
    with pytest.raises(CheckpointError, match=said):
        loading._check_layers(specs, fitted[0])


def other_sizes(network: nn.Module) -> nn.Module:
    config = copy.deepcopy(network.config)
    config.num_local_experts = 2
    return type(network)(config)


@WARNED
def test_peft_computes_the_same_and_its_adapters_are_read(fitted: Any, tmp_path: Path) -> None:
    network, posterior = fitted
    posterior.to_peft(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(network), tmp_path / "ours")
    expected = logits(posterior.merge())
    assert (expected - logits(network)).abs().max() > 0.1
    torch.testing.assert_close(logits(theirs), expected, atol=1e-4, rtol=0)
    again = pyrolora.from_peft(tmp_path / "ours", copy.deepcopy(network))
    assert list(again.bank.specs) == list(posterior.bank.specs)
    torch.testing.assert_close(logits(again.merge()), expected, atol=1e-5, rtol=0)
    with pytest.raises(
        CheckpointError, match=r"weight.lora_B.weight\' has shape \(3, 2\), .* \(2, 2\)"
    ):
        pyrolora.from_peft(tmp_path / "ours", other_sizes(network))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    read = pyrolora.from_peft(tmp_path / "theirs", copy.deepcopy(network))
    torch.testing.assert_close(logits(read.merge()), logits(theirs), atol=1e-4, rtol=0)


class Start(TrainerCallback):
    """Writes the adapter from which a fit starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any):
        joint = model.joint
        bank = joint.program.bank
        write_adapter(self.folder, bank.specs, bank.matrices(bank.means()), {}, joint.base)


@WARNED
def test_three_steps_of_map_are_those_of_pefts_trainer(tmp_path: Path) -> None:
    options = {"max_steps": 3, "learning_rate": 0.5, "optim": "sgd", "max_grad_norm": 0.0}
    options |= {"lr_scheduler_type": "constant", "weight_decay": 0.0}
    args = arguments(tmp_path / "out", **options, per_device_train_batch_size=len(ROWS))
    posterior = pyrolora.fit(
        mixtral(),
        ROWS,
        "map",
        adapter=adapter("mlp.gate.weight"),
        training=args,
        callbacks=Start(tmp_path / "start"),
    )
    model = peft.PeftModel.from_pretrained(mixtral(), tmp_path / "start", is_trainable=True)
    data = [{**row, "labels": row["input_ids"]} for row in ROWS]
    Trainer(model, args, train_dataset=data).train()
    found = logits(posterior.merge())
    assert (found - logits(mixtral())).abs().max() > 0.05
    torch.testing.assert_close(found, logits(model), atol=1e-4, rtol=0)


def test_weight_noise_reaches_experts_and_is_gone_at_prediction(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=2)
    losses = {}
    for rho in (1e-6, 0.5):
        guide = Flat(inner=MeanField(), rho=rho)
        config = adapter("mlp.gate.weight", target_modules=[])
        posterior = pyrolora.fit(mixtral(), ROWS, guide, adapter=config, training=args)
        losses[rho] = posterior.history[-1]["train_loss"]
        torch.testing.assert_close(
            posterior.log_likelihood(ROWS, 0)[0], scores(posterior.merge()), atol=1e-4, rtol=0
        )
    assert abs(losses[0.5] - losses[1e-6]) > 1e-3


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["experts.gate_up"], r"'experts.gate_up', and Mixtral.* no such parameter .*gate_up_proj"),
        (["input_layernorm.weight"], r"matrices, .*'weight' of .*has the shape \(16,\)"),
    ],
)
def test_names_that_are_no_matrices_are_refused(names: list[str], said: str) -> None:
    with pytest.raises(TargetError, match=said):
        attach(mixtral(), AdapterConfig(r=2, target_parameters=names))


def test_a_parameter_of_a_head_and_of_the_network_itself_are_refused() -> None:
    with pytest.raises(TargetError, match=r"'classifier.weight', a parameter of a task head"):
        attach(bert(), AdapterConfig(r=2, target_parameters=["classifier.weight"]))
    network = nn.Sequential(nn.Linear(4, 4))
    network.matrix = nn.Parameter(torch.eye(4))
    with pytest.raises(TargetError, match="'matrix', a parameter of the network itself"):
        attach(network, AdapterConfig(r=2, target_parameters=["matrix"]))


def test_a_module_whose_forward_was_replaced_is_refused() -> None:
    network = mixtral()
    experts = network.model.layers[0].mlp.experts
    experts.forward = experts.forward
    with pytest.raises(TargetError, match=r"the forward of 'model.layers.0.*was replaced"):
        attach(network, AdapterConfig(r=2, target_parameters=EXPERTS))


def test_the_weight_of_a_linear_layer_is_the_layer() -> None:
    config = AdapterConfig(r=2, target_modules=[], target_parameters=["k_proj.weight"])
    specs = attach(mixtral(), config).specs
    assert [spec.name for spec in specs] == [f"model.layers.{i}.self_attn.k_proj" for i in (0, 1)]


def test_blocks_and_exclusions_hold_for_parameters() -> None:
    config = AdapterConfig(
        r=2,
        target_modules=[],
        target_parameters=EXPERTS,
        layers_to_transform=1,
        exclude_modules=["gate_up_proj"],
    )
    names = {spec.name.rpartition(".")[0] for spec in attach(mixtral(), config).specs}
    assert names == {"model.layers.1.mlp.experts.down_proj"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_parameters": "gate"}, r"must be a list of names, got 'gate'; write \['gate'\]"),
        ({"lora_dropout": 0.1}, "lora_dropout acts on the input of a layer"),
        ({"init_lora_weights": "pissa"}, "starts from the weights of layers"),
    ],
)
def test_options_that_do_not_go_with_parameters(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        AdapterConfig(**{"target_parameters": EXPERTS, **options})


@pytest.mark.parametrize("guide", [Laplace(), MeanField(scale_updates="curvature")])
def test_a_curvature_of_parameters_is_refused_before_training(
    guide: Any, steps: list[int], tmp_path: Path
) -> None:
    args = arguments(tmp_path, max_steps=1)
    config = AdapterConfig(r=2, target_parameters=EXPERTS)
    with pytest.raises(ConfigError, match=r"inputs of each layer, .*gate_up_proj.0'.* 'montec'"):
        pyrolora.fit(mixtral(), ROWS, guide, adapter=config, training=args)
    assert not steps


@pytest.mark.parametrize("guide", [MonteCLoRA(), MeanField()])
def test_scales_of_parameters_are_trained_by_default(guide: Any, tmp_path: Path) -> None:
    config = AdapterConfig(r=2, target_parameters=EXPERTS)
    args = arguments(tmp_path, max_steps=1)
    posterior = pyrolora.fit(mixtral(), ROWS, guide, adapter=config, training=args)
    program = posterior.model.program
    assert posterior.options == replace(guide, scale_updates="gradient")
    assert all(program.get_parameter(name).requires_grad for name in program.scale_parameters())


def test_all_linear_says_how_the_experts_are_adapted() -> None:
    names = ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    with pytest.warns(UserWarning, match=r"37% .*target_parameters=\['mlp.gate.weight', 'mlp.exp"):
        attach(mixtral(), AdapterConfig(r=2, target_modules="all-linear"))
    config = AdapterConfig(r=2, target_modules="all-linear", target_parameters=names)
    attach(mixtral(), config)  # with no warning, which would fail the test
