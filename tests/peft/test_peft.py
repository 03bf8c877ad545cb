"""PEFT's format: what we write PEFT loads, what PEFT writes we read, with the same function."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from problems import SIZES, batch_of, bert, gpt2, llama, mlp, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from pyrolora import AdapterConfig
from pyrolora.adapters import Attachment, LayerSpec, attach, bind
from pyrolora.adapters.targets import find_targets
from pyrolora.errors import CheckpointError, ConfigError, PyroLoraError
from pyrolora.guides import MAP
from pyrolora.model import JointModel, build
from pyrolora.peft import read_adapter, write_adapter
from pyrolora.peft import write as module
from pyrolora.tasks import task_for

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def roberta() -> nn.Module:
    """Its head, ``classifier``, has modules of its own."""
    torch.manual_seed(0)
    config = RobertaConfig(**SIZES, num_labels=2, hidden_dropout_prob=0.0, pad_token_id=0)
    return RobertaForSequenceClassification(config).eval()


def distilbert() -> nn.Module:
    """Two heads, of which the name of one ends with the name of the other."""
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=SIZES["vocab_size"], dim=16, hidden_dim=32, n_layers=2, n_heads=2, num_labels=2
    )
    return DistilBertForSequenceClassification(config).eval()


class Conv(nn.Sequential):
    """A layer that is no linear one, and one that is."""

    def __init__(self) -> None:
        super().__init__(nn.Conv3d(1, 4, 1), nn.Flatten(), nn.Linear(4, 3))


def logits(network: nn.Module) -> Tensor:
    """The network's output on fixed inputs."""
    with torch.no_grad():
        if not hasattr(network, "config") or not hasattr(network.config, "vocab_size"):
            return network(X)
        batch = batch_of(tokens(6))
        return network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def joint_of(network: nn.Module, attachment: Attachment, config: AdapterConfig) -> JointModel:
    plain = "classification" if isinstance(network, nn.Sequential) else None
    return build(network, attachment, config, MAP(), task_for(network, plain), 1)


def mean_logits(joint: JointModel) -> Tensor:
    """The network under the mean adapter and the posterior's heads, as it puts them out."""
    with torch.no_grad(), bind(joint.binding(joint.program.bank.means())):
        return logits(joint.base)


def heads_of(joint: JointModel) -> dict[str, nn.Module]:
    return {name: head for name, (head,) in joint.named_heads().items()}


def randomised(network: nn.Module, config: AdapterConfig) -> JointModel:
    """A posterior whose means and heads are away from where they started."""
    joint = joint_of(network, attach(network, config), config)
    bank = joint.program.bank
    bank.assign("A_loc", 0.5 * torch.randn_like(bank.A_loc))
    bank.assign("B_loc", 0.5 * torch.randn_like(bank.B_loc))
    with torch.no_grad():
        for parameter in joint.heads.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return joint


def write(joint: JointModel, path: Path) -> None:
    bank = joint.program.bank
    write_adapter(path, bank.specs, bank.matrices(bank.means()), heads_of(joint), joint.base)


def loaded(path: Path, network: nn.Module) -> JointModel:
    """The posterior of an adapter in a folder."""
    adapter = read_adapter(path, network)
    joint = joint_of(
        network, Attachment(network, adapter.specs, list(adapter.heads)), adapter.config
    )
    bank = joint.program.bank
    A, B = bank.layouts["A"].blocks, bank.layouts["B"].blocks
    bank.assign("A_loc", torch.cat([adapter.matrices[b.layer][0].flatten() for b in A]))
    bank.assign("B_loc", torch.cat([adapter.matrices[b.layer][1].mT.flatten() for b in B]))
    for name, head in heads_of(joint).items():
        head.load_state_dict(adapter.heads[name])
    return joint


def saved(path: Path, network: nn.Module, config: Any, **options: Any) -> Tensor:
    """A PEFT adapter of random numbers in the folder, and its logits."""
    model = get_peft_model(network, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(path, **options)
    return logits(model.eval())


def edit(path: Path, **changes: Any) -> None:
    """Change the configuration of an adapter."""
    file = path / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def retensor(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of an adapter."""
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


# Writing ----------------------------------------------------------------------------------------

MIXED = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*k_proj": 5.0}}
OURS: dict[str, tuple[Callable[[], nn.Module], AdapterConfig]] = {
    "bert": (bert, AdapterConfig(r=3)),
    "bert, regression": (lambda: bert(num_labels=1), AdapterConfig(r=3)),
    "bert, no head": (bert, AdapterConfig(r=3, modules_to_save=[])),
    "distilbert, two heads": (distilbert, AdapterConfig(r=3)),
    "roberta, a head with parts": (roberta, AdapterConfig(r=3)),
    "llama, patterns": (llama, AdapterConfig(r=4, use_rslora=True, **MIXED)),
    "llama, all linear, with its output layer": (
        llama,
        AdapterConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"]),
    ),
    "gpt2": (gpt2, AdapterConfig(r=3)),
    "plain": (mlp, AdapterConfig(r=3)),
    "plain, with a head": (mlp, AdapterConfig(r=3, target_modules=["0"], modules_to_save=["2"])),
}


@pytest.mark.parametrize("name", OURS)
def test_peft_loads_what_we_write_with_the_same_function(name: str, tmp_path: Path) -> None:
    make, config = OURS[name]
    joint = randomised(make(), config)
    write(joint, tmp_path)
    model = PeftModel.from_pretrained(make(), tmp_path)
    close(logits(model), mean_logits(joint))
    assert (logits(model) - logits(make())).abs().max() > 1e-3


@pytest.mark.parametrize("name", OURS)
def test_reading_is_the_inverse_of_writing(name: str, tmp_path: Path) -> None:
    make, config = OURS[name]
    joint = randomised(make(), config)
    write(joint, tmp_path)
    adapter = read_adapter(tmp_path, make())
    bank = joint.program.bank
    assert [spec.name for spec in adapter.specs] == list(bank.specs)
    for spec in adapter.specs:
        own = bank.specs[spec.name]
        assert replace(spec, scaling=own.scaling) == own
        assert spec.scaling == pytest.approx(own.scaling, rel=1e-14)
    for layer, expected in bank.matrices(bank.means()).items():
        assert torch.equal(adapter.matrices[layer][0], expected[0])
        assert torch.equal(adapter.matrices[layer][1], expected[1])
    assert set(adapter.heads) == set(heads_of(joint))
    for head, expected in heads_of(joint).items():
        state = expected.state_dict()
        assert set(adapter.heads[head]) == set(state)
        assert all(torch.equal(adapter.heads[head][key], state[key]) for key in state)


def test_the_rank_is_that_of_the_matrices_and_the_scaling_that_of_the_layer(
    tmp_path: Path,
) -> None:
    """As in an ensemble's mean, whose K members of rank r make one adapter of rank K r."""
    specs = {n: LayerSpec(n, *sizes, 2, 0.3) for n, sizes in (("0", (4, 16)), ("2", (16, 3)))}
    matrices = {
        "0": (torch.randn(6, 4), torch.randn(16, 6)),
        "2": (torch.randn(10, 16), torch.randn(3, 10)),
    }
    write_adapter(tmp_path, specs, matrices, {}, mlp())
    model = PeftModel.from_pretrained(mlp(), tmp_path)
    for name, (A, B) in matrices.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        assert layer.r["default"] == len(A)
        close(layer.get_delta_weight("default"), 0.3 * B @ A)
    assert [(s.rank, s.scaling) for s in read_adapter(tmp_path, mlp()).specs] == [
        (6, pytest.approx(0.3)),
        (10, pytest.approx(0.3)),
    ]


def test_an_adapter_of_one_shape_says_so_in_whole_numbers(tmp_path: Path) -> None:
    """A server that reads r, lora_alpha and the tensors alone gets all there is."""
    write(randomised(llama(), AdapterConfig(r=4, lora_alpha=6)), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 6, False)
    assert isinstance(config["lora_alpha"], int)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["modules_to_save"] is None
    assert config["fan_in_fan_out"] is False
    tensors = load_file(tmp_path / WEIGHTS)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert tensors[key].shape == (4, 16)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


def test_layers_of_one_scaling_have_that_of_r_and_alpha_whatever_their_ranks(
    tmp_path: Path,
) -> None:
    sizes = {"0": 2, "1": 2, "2": 4, "3": 3, "4": 3}
    network = nn.Sequential(*(nn.Linear(4, 4) for _ in sizes))
    specs = {name: LayerSpec(name, 4, 4, r, 2.0) for name, r in sizes.items()}
    matrices = {name: (torch.randn(r, 4), torch.randn(4, r)) for name, r in sizes.items()}
    write_adapter(tmp_path, specs, matrices, {}, network)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["lora_alpha"] / config["r"] == 2.0


class Tower(nn.Module):
    """Layers whose names are like each other: ``h.1``, ``h.11``, ``x.h.1``, ``h_1``."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList([nn.Linear(4, 4) for _ in range(12)])
        self.x = nn.ModuleDict({"h": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
        self.h_0, self.h_1 = nn.Linear(4, 4), nn.Linear(4, 4)


def test_patterns_and_targets_match_the_layers_that_they_mean_alone(tmp_path: Path) -> None:
    """To PEFT a target is the end of a name, and a pattern a regular expression for one."""
    ranks = {"h.0": 2, "h.1": 1, "h.10": 2, "h.11": 3, "x.h.1": 4, "h_1": 2}
    scalings = {"h.0": 1.0, "h.1": 3.0, "h.10": 1.0, "h.11": 0.7, "x.h.1": 1.0, "h_1": 1.0}
    specs = {name: LayerSpec(name, 4, 4, r, scalings[name]) for name, r in ranks.items()}
    matrices = {name: (torch.randn(r, 4), torch.randn(4, r)) for name, r in ranks.items()}
    write_adapter(tmp_path, specs, matrices, {}, Tower())
    model = PeftModel.from_pretrained(Tower(), tmp_path).base_model.model
    found = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert {name: layer.r["default"] for name, layer in found.items()} == ranks
    for name, (A, B) in matrices.items():
        close(found[name].get_delta_weight("default"), scalings[name] * B @ A)
    assert {s.name: s.rank for s in read_adapter(tmp_path, Tower()).specs} == ranks


def masked() -> nn.Module:
    return BertForMaskedLM(bert().config).eval()


@pytest.mark.parametrize(
    ("make", "heads", "task"),
    [
        (bert, None, "SEQ_CLS"),
        (bert, [], None),
        (roberta, None, "SEQ_CLS"),
        (llama, None, "CAUSAL_LM"),
        (gpt2, None, "CAUSAL_LM"),
        (masked, [], None),
        (mlp, None, None),
    ],
)
def test_the_task_is_one_that_peft_can_load(
    make: Callable[[], nn.Module], heads: Any, task: str | None, tmp_path: Path
) -> None:
    network = make()
    config = AdapterConfig(r=2, modules_to_save=heads)
    attachment = attach(network, config)
    specs = {spec.name: spec for spec in attachment.specs}
    matrices = {
        s.name: (torch.randn(2, s.in_features), torch.randn(s.out_features, 2))
        for s in attachment.specs
    }
    kept = {name: slot.base_layer for name, slot in attachment.heads.items()}
    write_adapter(tmp_path, specs, matrices, kept, network)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert written["task_type"] == task
    assert (written["auto_mapping"] is None) == (task is not None)
    PeftModel.from_pretrained(make(), tmp_path)


@pytest.mark.parametrize(
    ("target", "head", "clash"),
    [("0", "2", "'12'"), ("3.2", "2", "'3.2'")],
    ids=["another module", "an adapted layer"],
)
def test_a_head_that_peft_would_confuse_is_refused(
    target: str, head: str, clash: str, tmp_path: Path
) -> None:
    layers: list[nn.Module] = [nn.Linear(4, 4) for _ in range(13)]
    layers[3] = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    network = nn.Sequential(*layers)
    specs = {target: LayerSpec(target, 4, 4, 1, 1.0)}
    matrices = {target: (torch.ones(1, 4), torch.ones(4, 1))}
    with pytest.raises(ConfigError, match=rf"cannot tell .*{clash}"):
        write_adapter(tmp_path, specs, matrices, {head: nn.Linear(4, 4)}, network)
    assert not list(tmp_path.iterdir())


# The folder -------------------------------------------------------------------------------------


def test_an_older_adapter_is_replaced_and_other_files_stay(tmp_path: Path) -> None:
    write(randomised(mlp(), AdapterConfig(r=2)), tmp_path)
    (tmp_path / "README.md").write_text("mine")
    joint = randomised(mlp(), AdapterConfig(r=3))
    write(joint, tmp_path)
    close(logits(PeftModel.from_pretrained(mlp(), tmp_path)), mean_logits(joint))
    assert {f.name for f in tmp_path.iterdir()} == {CONFIG, WEIGHTS, "README.md"}


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("precious")
    with pytest.raises(ConfigError, match=r"holds no adapter, but 'model.safetensors'"):
        write(randomised(mlp(), AdapterConfig(r=2)), tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "adapter"
    file.write_text("")
    with pytest.raises(ConfigError, match="is a file; choose another path"):
        write(randomised(mlp(), AdapterConfig(r=2)), file)


@pytest.mark.parametrize("step", ["write_bytes", "replace", "write_whole"])
def test_a_write_that_dies_leaves_a_whole_adapter_or_none(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk the older adapter stays; later it is gone, and a second try succeeds."""
    older, newer = (randomised(mlp(), AdapterConfig(r=2)) for _ in range(2))
    write(older, tmp_path)

    def die(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(module if step == "write_whole" else Path, step, die)
        with pytest.raises(OSError, match="no space left"):
            write(newer, tmp_path)
    if step == "write_bytes":
        close(mean_logits(loaded(tmp_path, mlp())), mean_logits(older))
    else:
        with pytest.raises(CheckpointError, match="no PEFT adapter"):
            read_adapter(tmp_path, mlp())
    write(newer, tmp_path)
    close(mean_logits(loaded(tmp_path, mlp())), mean_logits(newer))


# Reading ----------------------------------------------------------------------------------------

SEQ = {"task_type": "SEQ_CLS", "r": 3}
LM = {"task_type": "CAUSAL_LM", "r": 3}
PEFTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "bert": (bert, {**SEQ, "target_modules": ["query", "value"]}),
    "bert, regression": (lambda: bert(num_labels=1), {**SEQ, "target_modules": ["query"]}),
    "bert, default targets": (bert, SEQ),
    "bert, without a task": (
        bert,
        {"target_modules": ["query"], "modules_to_save": ["classifier"]},
    ),
    "bert, the pooler too": (
        bert,
        {**SEQ, "target_modules": ["query"], "modules_to_save": ["pooler"]},
    ),
    "distilbert": (distilbert, {**SEQ, "target_modules": ["q_lin"], "lora_dropout": 0.2}),
    "roberta": (roberta, {**SEQ, "target_modules": ["query"]}),
    "roberta, parts of the head are called like targets": (
        roberta,
        {**SEQ, "target_modules": ["query", "dense"]},
    ),
    "llama, patterns": (
        llama,
        {
            **LM,
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2, "^model.layers.1.mlp.down_proj": 5},
            "alpha_pattern": {r"layers\.0\..*_proj": 3},
        },
    ),
    "llama, regular expression": (llama, {**LM, "target_modules": r".*\.1\..*(q|v)_proj"}),
    "llama, all linear": (llama, {**LM, "target_modules": "all-linear"}),
    "llama, one layer": (llama, {**LM, "target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "llama, excluded": (
        llama,
        {
            **LM,
            "target_modules": ["q_proj", "v_proj"],
            "exclude_modules": ["layers.0.self_attn.q_proj"],
        },
    ),
    "llama, output layer": (
        llama,
        {**LM, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "llama, gaussian": (llama, {**LM, "init_lora_weights": "gaussian"}),
    "gpt2": (gpt2, {**LM, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "plain": (mlp, {"r": 3, "target_modules": ["0", "2"]}),
    "plain, with a head": (mlp, {"r": 3, "target_modules": ["0"], "modules_to_save": ["2"]}),
    "plain, a rank above the layer's size": (mlp, {"r": 9, "target_modules": ["0", "2"]}),
}


@pytest.mark.parametrize("name", PEFTS)
def test_we_read_what_peft_writes_with_the_same_function(name: str, tmp_path: Path) -> None:
    make, options = PEFTS[name]
    expected = saved(tmp_path, make(), LoraConfig(**options))
    joint = loaded(tmp_path, make())
    close(mean_logits(joint), expected)
    assert (expected - logits(make())).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["bert", "llama, patterns", "llama, one layer", "gpt2"])
def test_the_configuration_selects_the_layers_that_the_file_has(name: str, tmp_path: Path) -> None:
    make, options = PEFTS[name]
    saved(tmp_path, make(), LoraConfig(**options))
    adapter = read_adapter(tmp_path, make())
    assert find_targets(make(), adapter.config, adapter.heads) == adapter.specs
    assert list(adapter.config.modules_to_save) == list(adapter.heads)


def test_the_configuration_is_that_of_the_file(tmp_path: Path) -> None:
    make, options = PEFTS["distilbert"]
    saved(tmp_path, make(), LoraConfig(**options, lora_alpha=12, init_lora_weights="gaussian"))
    config = read_adapter(tmp_path, make()).config
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 12, 0.2)
    assert (config.init_lora_weights, config.use_rslora) == ("gaussian", False)


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    saved(tmp_path, mlp(), LoraConfig(target_modules=["0"]))
    retensor(tmp_path, lambda t: t.update({key: tensor.half() for key, tensor in t.items()}))
    A, B = read_adapter(tmp_path, mlp()).matrices["0"]
    assert A.dtype == B.dtype == torch.float32


def test_a_network_that_another_posterior_wraps_is_read_for_as_it_is(tmp_path: Path) -> None:
    make, options = PEFTS["bert"]
    expected = saved(tmp_path, make(), LoraConfig(**options))
    network = make()
    other = randomised(network, AdapterConfig(r=2))
    close(mean_logits(loaded(tmp_path, network)), expected)
    assert other.attachment.attached


def test_a_network_that_peft_wraps_is_refused_until_it_is_unloaded(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["0"])
    saved(tmp_path, mlp(), config)
    network = mlp()
    model = get_peft_model(network, config)
    for wrapped in (model, network):
        with pytest.raises(ConfigError, match=r"holds adapters of PEFT's.*unload\(\)"):
            read_adapter(tmp_path, wrapped)
    assert read_adapter(tmp_path, model.unload()).specs[0].name == "0"


# What is not taken ------------------------------------------------------------------------------

WORD, QUERY = "word_embeddings", {"target_modules": ["query"]}
REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "dora": (bert, LoraConfig(**QUERY, use_dora=True), "use_dora=True"),
    "bias": (bert, LoraConfig(**QUERY, bias="lora_only"), "bias='lora_only'"),
    "lora bias": (bert, LoraConfig(**QUERY, lora_bias=True), "lora_bias=True"),
    "adalora": (bert, AdaLoraConfig(**QUERY, total_step=10), "peft_type='ADALORA'"),
    "pissa": (bert, LoraConfig(**QUERY, init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "olora": (bert, LoraConfig(**QUERY, init_lora_weights="olora"), "init_lora_weights='olora'"),
    "tokens": (
        bert,
        LoraConfig(**QUERY, trainable_token_indices={WORD: [1]}),
        r"trainable_token_indices=.*word_embeddings",
    ),
    "trained embeddings": (
        bert,
        LoraConfig(**QUERY, modules_to_save=[WORD]),
        r"modules_to_save='bert\.embeddings\.word_embeddings', which holds embeddings",
    ),
    "convolution": (Conv, LoraConfig(target_modules=["0"], r=2), "'0', a Conv3d"),
}


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor.s. have invalid shape")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_lora_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make, config, message = REFUSED[name]
    get_peft_model(make(), config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        read_adapter(tmp_path, make())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("megatron_config", {"a": 1}),
        ("monteclora_config", {"num_samples": 4}),
        ("layer_replication", [[0, 1]]),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "pissa_niter_4"),
        ("an_option_of_the_future", 1),
    ],
)
def test_an_option_that_changes_the_function_is_refused(
    option: str, value: Any, tmp_path: Path
) -> None:
    saved(tmp_path, mlp(), LoraConfig(target_modules=["0"]))
    edit(tmp_path, **{option: value})
    with pytest.raises(ConfigError, match=f"{option}="):
        read_adapter(tmp_path, mlp())


def test_options_that_are_off_are_taken(tmp_path: Path) -> None:
    """A file of an older or a newer PEFT has other options; None, False, empty is off."""
    saved(tmp_path, mlp(), LoraConfig(target_modules=["0"]))
    edit(tmp_path, of_the_past=None, of_the_future=False, also=[], bias="none")
    assert read_adapter(tmp_path, mlp()).specs[0].name == "0"


def test_saved_embeddings_are_read_where_they_are_the_networks_own(tmp_path: Path) -> None:
    saved(tmp_path, llama(), LoraConfig(**LM), save_embedding_layers=True)
    assert read_adapter(tmp_path, llama()).specs
    other = llama()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    with pytest.raises(ConfigError, match=r"'lm_head\.weight', and this network has another one"):
        read_adapter(tmp_path, other)


def test_a_saved_module_with_an_adapted_layer_in_it_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, mlp(), LoraConfig(target_modules=["0", "2"]))
    layer = mlp()[2]
    edit(tmp_path, modules_to_save=["2"])
    retensor(
        tmp_path,
        lambda t: t.update({f"base_model.model.2.{k}": v for k, v in layer.state_dict().items()}),
    )
    with pytest.raises(ConfigError, match=r"='2', and '2' in it is an adapted layer"):
        read_adapter(tmp_path, mlp())


def test_a_pickle_is_not_read_and_the_message_converts_it(tmp_path: Path) -> None:
    saved(tmp_path, mlp(), LoraConfig(target_modules=["0"]), safe_serialization=False)
    with pytest.raises(CheckpointError, match=r"a pickle.*safe_serialization=True"):
        read_adapter(tmp_path, mlp())


# Damage, and other networks ---------------------------------------------------------------------

LAYER = "base_model.model.bert.encoder.layer.1.attention.self.query"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole adapter of ``bert()``."""
    saved(tmp_path, bert(), LoraConfig(**PEFTS["bert"][1]))
    return tmp_path


def without(key: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(key)


def drop_layer(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if key.startswith(f"{LAYER}.")]:
        del tensors[key]


def drop_all(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if ".lora_" in key]:
        del tensors[key]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{LAYER}.lora_B.weight"), r"no tensor .*layer\.1.*query\.lora_B\.weight"),
        (without("base_model.model.classifier.bias"), r"no tensor classifier\.bias"),
        (drop_layer, r"target_modules selects '.*layer\.1\.attention\.self\.query' in this Bert"),
        (drop_all, "holds no LoRA adapter"),
        (lambda t: t.update({"text.lora_A.weight": torch.ones(1)}), "'text.lora_A.weight', and"),
        (
            lambda t: t.update({f"{LAYER}.lora_A.weight": torch.ones(3, 15)}),
            r"query\.lora_A\.weight' has shape \(3, 15\).*\(3, 16\)",
        ),
        (
            lambda t: t.update({k.replace("query", "key"): v + 0 for k, v in t.items()}),
            r"tensors for .*attention\.self\.key.*does not select",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[dict[str, Tensor]], None], message: str, folder: Path
) -> None:
    retensor(folder, change)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(folder, bert())


def headless() -> nn.Module:
    network = bert()
    del network.classifier
    return network


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bert(num_hidden_layers=1), r"the layer 'bert\.encoder\.layer\.1.*has not"),
        (lambda: bert(num_hidden_layers=3), r"selects 'bert\.encoder\.layer\.2"),
        (lambda: bert(hidden_size=32), r"has shape .*pass the network"),
        (lambda: bert(num_labels=3), r"'classifier\.weight' has shape \(2, 16\).*\(3, 16\)"),
        (llama, "this LlamaForCausalLM has not"),
        (lambda: BertModel(bert().config), "this BertModel has not"),
        (headless, r"'classifier\.bias' of modules_to_save, .* has no such module"),
    ],
)
def test_another_network_is_recognised(
    make: Callable[[], nn.Module], message: str, folder: Path
) -> None:
    with pytest.raises(PyroLoraError, match=message):
        read_adapter(folder, make())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 4}, r"lora_A\.weight' has shape \(3, 16\), and by the configuration.*\(4, 16\)"),
        ({"r": "3"}, r"a value that no adapter can have: r: expected int, got '3'"),
        ({"lora_alpha": -1}, r"'lora_alpha' must be a finite number > 0"),
        ({"lora_dropout": "half"}, "a value that no adapter can have"),
        ({"rank_pattern": {"(": 2}}, r"by the pattern '\(', and it is no regular expression"),
        ({"target_modules": "*"}, r"by the pattern '\*', and it is no regular expression"),
    ],
)
def test_an_edited_configuration_is_refused(
    changes: dict[str, Any], message: str, folder: Path
) -> None:
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(folder, bert())


@pytest.mark.parametrize("key", ["peft_type", "r", "lora_alpha", "target_modules"])
def test_a_configuration_without_its_essentials_is_refused(key: str, folder: Path) -> None:
    options = json.loads((folder / CONFIG).read_text())
    del options[key]
    (folder / CONFIG).write_text(json.dumps(options))
    with pytest.raises(CheckpointError, match=f"has no '{key}'"):
        read_adapter(folder, bert())


@pytest.mark.parametrize("content", ["{", "[]", "1"])
def test_a_configuration_that_is_none_is_refused(content: str, folder: Path) -> None:
    (folder / CONFIG).write_text(content)
    with pytest.raises(CheckpointError, match=r"damaged|has no 'peft_type'"):
        read_adapter(folder, bert())


def test_a_truncated_file_is_refused(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cannot read the saved tensors"):
        read_adapter(folder, bert())


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_folder_without_one_of_the_files_is_refused(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        read_adapter(folder, bert())


# PEFT reads the pattern, and looks for its key among the names of modules alone.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
@pytest.mark.parametrize("targets", ["q_proj v_proj", "q_proj down_proj", "gate_proj up_proj"])
@pytest.mark.parametrize("rank_pattern", [{}, {"down_proj": 3, "gate_proj": 1}])
def test_dense_layers_beside_fused_experts_are_exported_by_their_weights(
    targets: str, rank_pattern: dict[str, int], tmp_path: Path
) -> None:
    """PEFT takes ``down_proj`` for the experts', whatever stands before it."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 30}
    config = Qwen3MoeConfig(**sizes, **experts, **heads, mlp_only_layers=[0])

    def network() -> nn.Module:
        torch.manual_seed(0)
        return Qwen3MoeForCausalLM(config).eval()

    rank_pattern = {name: rank for name, rank in rank_pattern.items() if name in targets}
    chosen = AdapterConfig(r=2, target_modules=targets.split(), rank_pattern=rank_pattern)
    own = randomised(network(), chosen)
    write(own, tmp_path)
    ids = torch.randint(3, 30, (2, 5))
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(network(), tmp_path)(input_ids=ids).logits
        ours = own.network({"input_ids": ids}, own.program.mean())
        plain = network()(input_ids=ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert (ours - plain).abs().max() > 1e-2
    found = read_adapter(tmp_path, network())
    matrices = own.program.bank.matrices(own.program.mean())
    assert [spec.name for spec in found.specs] == list(matrices)
    for name, (A, B) in matrices.items():
        torch.testing.assert_close(found.matrices[name], (A, B))


def test_what_mambas_kernels_read_is_not_exported_since_peft_refuses_it(tmp_path: Path) -> None:
    own_sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 4}
    network = MambaForCausalLM(MambaConfig(vocab_size=30, **own_sizes))
    own = randomised(network, AdapterConfig(r=2, target_modules=["in_proj", "out_proj"]))
    with pytest.raises(ConfigError, match=r"PEFT refuses 'backbone.layers.0.mixer.out_proj'"):
        write(own, tmp_path)
