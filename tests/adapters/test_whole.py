"""A network that is compiled, offloaded or spread is refused by name, before any step."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from problems import bert, llama, tokens
from torch import nn

import pyrolora
from pyrolora.adapters import check_eager, check_in_memory
from pyrolora.errors import ConfigError

OPTIONS = {"epochs": 1, "adapter": pyrolora.AdapterConfig(r=2)}
BACKEND = {"backend": "eager"}


def whole(network):
    return torch.compile(network, **BACKEND)


def in_place(network):
    network.compile(**BACKEND)
    return network


def one_layer(network):
    network.bert.encoder.layer[1].compile(**BACKEND)
    return network


def one_layer_replaced(network):
    layers = network.bert.encoder.layer
    layers[0] = torch.compile(layers[0], **BACKEND)
    return network


def forward(network):
    network.bert.forward = torch.compile(network.bert.forward, **BACKEND)
    return network


COMPILED = [
    (whole, r"all of it.*network\._orig_mod"),
    (in_place, "all of it.*_compiled_call_impl = None"),
    (one_layer, r"part 'bert\.encoder\.layer\.1'"),
    (one_layer_replaced, r"part 'bert\.encoder\.layer\.0'.*layer\.0\._orig_mod"),
    (forward, "part 'bert'"),
]


@pytest.mark.parametrize(("compiled", "message"), COMPILED)
def test_a_compiled_network_is_refused_before_a_fit_and_before_loading(
    compiled, message, tmp_path, steps
):
    pyrolora.fit(bert(), tokens(8), "map", **OPTIONS).save(tmp_path / "run")
    begun = len(steps)
    network = compiled(bert())
    for task in (None, "classification"):
        with pytest.raises(ConfigError, match=message):
            pyrolora.fit(network, tokens(8), "map", task=task, **OPTIONS)
    with pytest.raises(ConfigError, match=message):
        pyrolora.load(tmp_path / "run", network)
    with pytest.raises(ConfigError, match=message):
        pyrolora.from_peft(tmp_path / "run", network)
    assert len(steps) == begun


@pytest.mark.parametrize("compiled", [in_place, one_layer, one_layer_replaced, forward])
def test_a_network_that_is_compiled_after_the_fit_is_refused_by_every_prediction(compiled):
    posterior = pyrolora.fit(bert(), tokens(8), "montec", **OPTIONS)
    expected = posterior.predict(tokens(8), 3, seed=0).probs
    compiled(posterior.base)
    for predict in (posterior.predict, posterior.evaluate):
        with pytest.raises(ConfigError, match="network is compiled"):
            predict(tokens(8), 3, seed=0)
    if compiled in (in_place, one_layer):
        for part in posterior.base.modules():  # as the message says
            part._compiled_call_impl = None
        assert torch.equal(posterior.predict(tokens(8), 3, seed=0).probs, expected)


def test_a_compiled_language_model_does_not_write():
    posterior = pyrolora.fit(llama(), tokens(8).remove_columns("labels"), "map", **OPTIONS)
    posterior.base.compile(**BACKEND)
    with pytest.raises(ConfigError, match="network is compiled"):
        posterior.generate(torch.tensor([[4, 5, 6]]), 0, max_new_tokens=2)


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
    check_eager(network)
    check_in_memory(mapped(bert(), {"bert": "cpu", "classifier": "cpu"}))
    hooked = nn.Linear(2, 2)
    add_hook_to_module(hooked, AlignDevicesHook("cpu"))
    check_in_memory(nn.Sequential(hooked))
