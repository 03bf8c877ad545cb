"""Refusal of networks that are offloaded, or spread over devices."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from pyrolora.errors import ConfigError
from pyrolora.processes import is_sharded, take_part


def check_in_memory(network: nn.Module) -> None:
    """Raise `ConfigError` for a network whose weights are offloaded, or lie on several devices."""
    remedy = "load the network whole on one device: without device_map, or with device_map={'': 0}"
    for name, module in network.named_modules():
        if any(hook.offload for hook in _hooks(module)):
            raise ConfigError(
                f"the weights of {name or 'the network'!r} are offloaded, to the CPU or to disk, "
                f"and a fit needs them in memory; {remedy}"
            )
    for name, parameter in network.named_parameters():
        if parameter.is_meta:
            raise ConfigError(
                f"the weight {name!r} is not in memory (it is on the meta device: offloaded, or "
                f"never loaded); {remedy}"
            )
    _check_not_in_parts(network)
    devices = {parameter.device for parameter in network.parameters()}
    spread = {str(place) for place in getattr(network, "hf_device_map", {}).values()}
    if len(devices) > 1 or len(spread) > 1:
        places = sorted(map(str, devices)) if len(devices) > 1 else sorted(spread)
        raise ConfigError(
            f"the network is spread over {', '.join(places)}, and a fit would move it to one "
            f"device; {remedy}"
        )


def _check_not_in_parts(network: nn.Module) -> None:
    """Raise `ConfigError` for weights in parts, but those that a fit under FSDP2 made itself."""
    tensors = sys.modules.get("torch.distributed.tensor")  # it takes long to import
    if tensors is None or (is_sharded(network) and take_part()):
        return
    for name, parameter in network.named_parameters():
        if isinstance(parameter, tensors.DTensor):
            raise ConfigError(
                f"each process has a part of the weight {name!r}, by a tensor parallel plan or "
                "FSDP; load the network whole in every process, without tp_plan, and have the fit "
                "share it out, with TrainingArguments(fsdp=True)"
            )


def _hooks(module: nn.Module) -> list[Any]:
    """Return the hooks of accelerate's that place the weights of a module."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])
    return [one for one in hooks if hasattr(one, "offload") and hasattr(one, "weights_map")]
