"""FSDP2 for a network that is frozen: each process keeps a part of its weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from pyrolora.errors import ConfigError, listed
from pyrolora.model import JointModel
from pyrolora.processes import all_processes, is_sharded, launched

LAUNCHED = "ACCELERATE_USE_FSDP"
"""The variable by which ``accelerate launch --use_fsdp`` asks for FSDP."""
OTHER_LAUNCHED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
"""Variables of accelerate's launcher that are refused."""
BY_BLOCK = "TRANSFORMER_BASED_WRAP"

READ = ("version", "reshard_after_forward", "transformer_layer_cls_to_wrap", "auto_wrap_policy")
NEUTRAL: dict[str, tuple[Any, str]] = {
    "min_num_params": (0, "name the blocks with transformer_layer_cls_to_wrap"),
    "xla": (False, "it is for TPUs"),
    "xla_fsdp_v2": (False, "it is for TPUs"),
    "xla_fsdp_grad_ckpt": (False, "it is for TPUs"),
    "cpu_offload": (False, "the shards stay on their devices"),
    "activation_checkpointing": (False, "gradient_checkpointing=True has that effect"),
    "cpu_ram_efficient_loading": (False, "every process loads the network before it is sharded"),
    "state_dict_type": ("FULL_STATE_DICT", "checkpoints hold the posterior, without the network"),
}
"""Entries of ``fsdp_config`` that have no effect here: their neutral value, and what to do."""


@dataclass(frozen=True)
class Sharding:
    """The options of FSDP2 that a fit reads.

    Attributes
    ----------
    blocks
        Names of the classes of modules whose weights are gathered together; empty: those that the
        network itself names (``_no_split_modules``).
    reshard
        Whether a block's weights are let go between its forward and its backward pass.
    """

    blocks: tuple[str, ...] = ()
    reshard: bool = True


@contextmanager
def sharding_asked(args: TrainingArguments) -> Iterator[Sharding | None]:
    """Yield the options of FSDP2 in ``args``, or of accelerate's launcher; None without.

    They are taken out of both for the block, so that the Trainer trains what is whole, adapters and
    heads, by DistributedDataParallel. All processes take part in everything within the block.

    Raises
    ------
    ConfigError
        For FSDP in one process, FSDP1, options that would have no effect, and processes that do
        not train together.
    """
    _check_launcher()
    if launched() > 1 and args.world_size == 1:
        raise ConfigError(
            f"{launched()} processes run, and the Trainer knows of one, so that each would make "
            "the same fit in the same folder; set use_cpu=True in the TrainingArguments, without "
            "which processes on CPUs do not train together, or start one process"
        )
    by_launcher = os.environ.get(LAUNCHED, "false").lower() == "true"
    if not args.fsdp and not by_launcher:
        yield None
        return
    asked = _from_config(args.fsdp_config or {}) if args.fsdp else _from_launcher()
    if args.world_size == 1:
        raise ConfigError(
            "FSDP shares a network's weights out over processes, and there is one; start several, "
            "as with 'torchrun --nproc_per_node 4 script.py', or leave fsdp out"
        )
    if args.torch_compile:
        raise ConfigError(
            "torch_compile=True is not supported beside FSDP: compiled code would keep weights "
            "that are gathered for one pass; leave one of the two out"
        )
    args.fsdp, args.fsdp_config, args.fsdp_plugin_args = False, None, None
    os.environ.pop(LAUNCHED, None)
    try:
        with all_processes():
            yield asked
    finally:
        if by_launcher:
            os.environ[LAUNCHED] = "true"


def shard(joint: JointModel, sharding: Sharding, device: torch.device) -> None:
    """Share the weights of the network out over all processes, block by block.

    Task heads stay whole, and so does everything of the posterior. In a pass the weights of a
    block are gathered, used as in one process, and let go.

    Raises
    ------
    ConfigError
        When no module is of the classes that are named, or the network itself is trained.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    network = joint.base
    if not joint.program.bank.specs:
        raise ConfigError(
            "FSDP shares the weights of a frozen network out, and the guide trains them all; "
            "choose a guide with adapters, or leave fsdp out"
        )
    if is_sharded(network):
        return
    blocks = _blocks(network, sharding)
    heads = joint.attachment.heads.values()
    kept = {parameter for head in heads for parameter in head.parameters()}
    # A group of its own: in that of DistributedDataParallel, whose reductions begin when gradients
    # are ready, the order of the two could differ between processes.
    mesh = DeviceMesh.from_group(torch.distributed.new_group(), device.type)
    for module in (*blocks, network):
        fully_shard(module, mesh=mesh, reshard_after_forward=sharding.reshard, ignored_params=kept)
        # transformers and a saved posterior know networks by the names of their classes.
        kind, plain = type(module), type(module).__mro__[2]
        kind.__name__, kind.__qualname__ = plain.__name__, plain.__qualname__
    if hasattr(network, "generate"):
        register_fsdp_forward_method(network, "generate")


def frozen_names(module: nn.Module) -> list[str]:
    """Return the names of a module's parameters that are not trained, and of its buffers."""
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
    return [*frozen, *(name for name, _ in module.named_buffers())]


def _blocks(network: nn.Module, sharding: Sharding) -> list[nn.Module]:
    known = getattr(network, "_no_split_modules", None) or ()
    names = sharding.blocks or tuple(known)
    blocks = [module for module in network.modules() if type(module).__name__ in names]
    found = {type(module).__name__ for module in blocks}
    missing = [name for name in sharding.blocks if name not in found]
    if missing or not blocks:
        raise ConfigError(
            f"FSDP gathers weights block by block, and no module of this {type(network).__name__} "
            f"is a {listed(missing or names)}; name the class of its blocks with fsdp_config="
            "{'transformer_layer_cls_to_wrap': [...]}"
        )
    return blocks


def _check_launcher() -> None:
    """Raise `ConfigError` for what only accelerate's launcher can ask for."""
    for name, what in OTHER_LAUNCHED.items():
        if os.environ.get(name, "false").lower() == "true":
            raise ConfigError(
                f"accelerate was launched with {what} ({name}=true), under which adapters are not "
                "trained; launch plain processes ('torchrun', or 'accelerate launch --multi_gpu'), "
                "with TrainingArguments(fsdp=True) where the network is too large for one"
            )


def _from_config(config: Mapping[str, Any]) -> Sharding:
    for name, value in config.items():
        neutral, reason = NEUTRAL.get(name, (None, f"FSDP2 here reads {', '.join(READ)}"))
        if name not in READ and value not in (neutral, None) and str(value) != str(neutral):
            raise ConfigError(
                f"training=fsdp_config has {name}={value!r}, which is not supported: {reason}; "
                "leave it out"
            )
    return _sharding(
        config.get("version", 2),
        config.get("auto_wrap_policy", BY_BLOCK),
        config.get("transformer_layer_cls_to_wrap") or (),
        config.get("reshard_after_forward", True),
    )


def _from_launcher() -> Sharding:
    """Return the options that ``accelerate launch`` passes on by the environment."""
    environment = {
        name: os.environ.get(f"FSDP_{name.upper()}", "false").lower()
        for name in ("offload_params", "activation_checkpointing", "cpu_ram_efficient_loading")
    }
    asked = [name for name, value in environment.items() if value == "true"]
    if asked:
        raise ConfigError(
            f"accelerate was launched with --fsdp_{asked[0]} true, which is not supported: a fit "
            "shards the frozen network alone, after every process has loaded it; set it to false"
        )
    names = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    return _sharding(
        os.environ.get("FSDP_VERSION", 1),
        os.environ.get("FSDP_AUTO_WRAP_POLICY", BY_BLOCK),
        [name for name in names.split(",") if name],
        os.environ.get("FSDP_RESHARD_AFTER_FORWARD", True),
    )


def _sharding(version: Any, policy: str, blocks: Any, reshard: Any) -> Sharding:
    if int(version) != 2:
        raise ConfigError(
            f"FSDP version {version} is not supported, since it cannot hold frozen and trained "
            "weights apart; set fsdp_config={'version': 2}, or --fsdp_version 2"
        )
    if str(policy).upper() != BY_BLOCK:
        raise ConfigError(
            f"FSDP's auto_wrap_policy={policy!r} is not supported: weights are gathered block by "
            f"block; set it to {BY_BLOCK!r}, with the class of the blocks in "
            "transformer_layer_cls_to_wrap"
        )
    return Sharding(tuple(blocks), str(reshard).lower() in ("true", "full_shard", "1"))
