"""FSDP2 and other ways to take a network apart: what is read, and what is refused by name."""

from __future__ import annotations

import os

import pytest
import torch
from problems import arguments, bert, mlp, tokens
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import pyrolora
from pyrolora import AdapterConfig
from pyrolora.adapters import check_in_memory
from pyrolora.errors import ConfigError
from pyrolora.inference.sharding import Sharding, shard, sharding_asked
from pyrolora.model.network import AdaptedNetwork
from pyrolora.processes import launched

BLOCK = "BertLayer"


class Several:
    """The Trainer's arguments in one of several processes."""

    world_size = 2
    torch_compile = False

    def __init__(self, training):
        self.fsdp, self.fsdp_config = training.fsdp, training.fsdp_config
        self.fsdp_plugin_args = training.fsdp_plugin_args


@pytest.fixture
def group(tmp_path):
    """A group of this process alone."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    distributed.destroy_process_group()


def fitted(folder, guide="map", network=None, **options):
    training = arguments(folder, max_steps=1, **options)
    adapter = None if guide == "full" else AdapterConfig(r=2)
    network = bert() if network is None else network
    return pyrolora.fit(network, tokens(8), guide, training=training, adapter=adapter)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, Sharding()),
        ({"version": 2, "reshard_after_forward": False}, Sharding(reshard=False)),
        ({"transformer_layer_cls_to_wrap": BLOCK}, Sharding((BLOCK,))),
        ({"fsdp_transformer_layer_cls_to_wrap": [BLOCK], "cpu_offload": False}, Sharding((BLOCK,))),
    ],
)
def test_the_options_of_the_arguments_are_read_and_kept_from_the_trainer(
    config, expected, tmp_path
):
    args = Several(arguments(tmp_path, fsdp=True, fsdp_config=config))
    with sharding_asked(args) as asked:
        assert asked == expected
        assert not args.fsdp
        assert args.fsdp_plugin_args is None


def test_the_options_of_accelerates_launcher_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", BLOCK)
    with sharding_asked(Several(arguments(tmp_path))) as asked:
        assert asked == Sharding((BLOCK,), reshard=False)
        assert "ACCELERATE_USE_FSDP" not in os.environ
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with (
        pytest.raises(ConfigError, match=r"--fsdp_offload_params true.*set it to false"),
        sharding_asked(Several(arguments(tmp_path))),
    ):
        pass


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"version": 1}, "version 1 is not supported.*'version': 2"),
        ({"cpu_offload": True}, "cpu_offload=True.*leave it out"),
        ({"activation_checkpointing": True}, "gradient_checkpointing=True"),
        ({"cpu_ram_efficient_loading": True}, "every process loads the network"),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, "checkpoints hold the posterior"),
        ({"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 10}, "min_num_params=10"),
        ({"auto_wrap_policy": "NO_WRAP"}, "'NO_WRAP'.*'TRANSFORMER_BASED_WRAP'"),
        ({"forward_prefetch": True}, "FSDP2 here reads version"),
        ({}, "there is one; start several"),
    ],
)
@pytest.mark.filterwarnings("ignore:FSDP1")
def test_options_that_would_do_nothing_are_refused_before_training(
    config, message, tmp_path, steps
):
    with pytest.raises(ConfigError, match=message):
        fitted(tmp_path, fsdp=True, fsdp_config=config)
    assert not steps


def test_compiled_code_beside_fsdp_is_refused(tmp_path):
    args = Several(arguments(tmp_path, fsdp=True))
    args.torch_compile = True
    with (
        pytest.raises(ConfigError, match=r"torch_compile=True.*leave one of the two out"),
        sharding_asked(args),
    ):
        pass


@pytest.mark.parametrize(
    ("variable", "what"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism_config"),
    ],
)
def test_other_ways_of_accelerates_launcher_are_refused(
    variable, what, tmp_path, monkeypatch, steps
):
    training = arguments(tmp_path, max_steps=1)
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigError, match=rf"launched with {what}.*torchrun.*fsdp=True"):
        pyrolora.fit(bert(), tokens(8), "map", training=training, adapter=AdapterConfig(r=2))
    assert not steps


def test_deepspeed_in_the_arguments_is_refused(tmp_path, steps):
    training = arguments(tmp_path, max_steps=1)
    training.deepspeed = {"zero_optimization": {"stage": 3}}
    with pytest.raises(ConfigError, match=r"deepspeed=.*not supported.*fsdp=True"):
        pyrolora.fit(bert(), tokens(8), "map", training=training, adapter=AdapterConfig(r=2))
    assert not steps


def test_processes_that_would_not_train_together_are_refused(tmp_path, monkeypatch, steps):
    training = arguments(tmp_path, max_steps=1)
    assert training.world_size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched() == 1  # a scheduler's variable, without torch's others
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match=r"2 processes run.*use_cpu=True"):
        pyrolora.fit(bert(), tokens(8), "map", training=training, adapter=AdapterConfig(r=2))
    assert not steps


def test_a_tensor_parallel_network_is_refused(group, steps):
    network, mesh = bert(), init_device_mesh("cpu", (1,))
    layer = network.bert.encoder.layer[0].output.dense
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(ConfigError, match=r"part of the weight '.*output\.dense\.weight'.*tp_plan"):
        pyrolora.fit(network, tokens(8), "map", adapter=AdapterConfig(r=2), epochs=1)
    assert not steps


def test_blocks_are_gathered_one_by_one_and_outputs_stay(group, tmp_path):
    posterior = fitted(tmp_path, "meanfield")
    expected = posterior.predict(tokens(4), 2, seed=0).draws
    names = [type(module).__name__ for module in posterior.base.modules()]
    shard(posterior.model, Sharding((BLOCK,)), torch.device("cpu"))
    assert posterior.model.sharded
    assert [type(module).__name__ for module in posterior.base.modules()] == names
    split = {name for name, p in posterior.base.named_parameters() if hasattr(p, "to_local")}
    assert split == {n for n, _ in posterior.base.named_parameters() if "classifier" not in n}
    with pytest.raises(ConfigError, match="part of the weight"):
        check_in_memory(posterior.base)
    whole = AdaptedNetwork.sharded
    try:  # there is nobody to wait for
        AdaptedNetwork.sharded = property(lambda self: False)
        assert torch.equal(posterior.predict(tokens(4), 2, seed=0).draws, expected)
    finally:
        AdaptedNetwork.sharded = whole


def test_what_has_no_blocks_or_is_trained_is_not_sharded(tmp_path):
    posterior = fitted(tmp_path)
    with pytest.raises(ConfigError, match=r"is a 'LlamaDecoderLayer'.*to_wrap"):
        shard(posterior.model, Sharding(("LlamaDecoderLayer",)), torch.device("cpu"))
    data = torch.randn(6, 4), torch.arange(6) % 3
    plain = pyrolora.fit(mlp(), data, "map", task="classification", adapter=AdapterConfig(r=2))
    with pytest.raises(ConfigError, match="no module of this Sequential"):
        shard(plain.model, Sharding(), torch.device("cpu"))
    with pytest.raises(ConfigError, match="guide trains them all"):
        shard(fitted(tmp_path, "full").model, Sharding(), torch.device("cpu"))
