"""A network that is offloaded or spread is refused by name, before any step."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from problems import bert, tokens
from torch import nn

import pyrolora
from pyrolora.adapters import check_in_memory
from pyrolora.errors import ConfigError

OPTIONS = {"epochs": 1, "adapter": pyrolora.AdapterConfig(r=2)}


def on_the_cpu(network, folder):
    return cpu_offload(network, torch.device("cpu"))


def on_disk(network, folder):
    disk_offload(network, folder, torch.device("cpu"))
    return network


def on_meta(network, folder):
    network.bert.encoder.layer[0].to("meta")
    return network


def in_part(network, folder):
    return mapped(network, {"bert.embeddings": "disk", "bert.encoder": "cpu"})


def mapped(network, places):
    network.hf_device_map = places
    return network


def spread(network, folder):
    return mapped(network, {"bert.embeddings": 0, "bert.encoder": 1, "classifier": 1})


@pytest.mark.parametrize(
    ("moved", "message"),
    [
        (on_the_cpu, "are offloaded, to the CPU or to disk"),
        (on_disk, "are offloaded, to the CPU or to disk"),
        (on_meta, r"'bert\.encoder\.layer\.0\..*' is not in memory"),
        (in_part, "spread over cpu, disk"),
        (spread, "spread over 0, 1"),
    ],
)
@pytest.mark.parametrize("guide", ["map", "full"])
def test_a_network_that_is_not_in_memory_in_one_place_is_refused(
    moved, message, guide, tmp_path, steps
):
    network = moved(bert(), str(tmp_path))
    options = {"epochs": 1} if guide == "full" else OPTIONS
    with pytest.raises(ConfigError, match=rf"{message}.*device_map={{'': 0}}"):
        pyrolora.fit(network, tokens(8), guide, **options)
    assert not steps


def test_a_network_in_one_place_passes_whatever_says_so():
    network = mapped(bert(), {"": "cpu"})
    check_in_memory(network)
    check_in_memory(mapped(bert(), {"bert": "cpu", "classifier": "cpu"}))
    hooked = nn.Linear(2, 2)
    add_hook_to_module(hooked, AlignDevicesHook("cpu"))
    check_in_memory(nn.Sequential(hooked))
