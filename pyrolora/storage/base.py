"""The base network of a saved posterior: described, recognised, loaded again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from pyrolora.adapters import LayerSpec, unwrapped
from pyrolora.errors import CheckpointError

PROBES = 8


def describe_base(network: nn.Module, specs: list[LayerSpec]) -> dict[str, Any]:
    """What recognises the network: its class, where it came from, a few weights of each target."""
    description: dict[str, Any] = {
        "class": type(network).__name__,
        "probes": {spec.name: _probe(network, spec.name) for spec in specs},
    }
    if isinstance(network, PreTrainedModel):
        config = network.config
        description |= {
            "name_or_path": config._name_or_path,
            "config": {
                "num_labels": config.num_labels,
                "problem_type": config.problem_type,
                "pad_token_id": getattr(config, "pad_token_id", None),
                "id2label": config.id2label,
            },
        }
    return description


def load_base(description: Mapping[str, Any]) -> PreTrainedModel:
    """The network of a description, from the hub id or folder that it was loaded from."""
    name, kind = description.get("name_or_path"), getattr(transformers, description["class"], None)
    if not name or kind is None:
        raise CheckpointError(
            f"the posterior's network, a {description['class']}, was not loaded from a hub or "
            "folder; pass it: pyrolora.load(path, model)"
        )
    config = {k: v for k, v in description["config"].items() if v is not None}
    if "id2label" in config:
        config["id2label"] = {int(k): v for k, v in config["id2label"].items()}
        config.pop("num_labels", None)
    try:
        with _quiet():  # the report of a missing head: the posterior brings its own
            network: PreTrainedModel = kind.from_pretrained(name, dtype="auto", **config)
    except OSError as error:
        where = (
            "folder is gone or incomplete" if Path(name).is_absolute() else "hub id is not found"
        )
        raise CheckpointError(
            f"cannot load the posterior's network from {name!r} ({where}); pass the network: "
            "pyrolora.load(path, model)"
        ) from error
    return network


@contextmanager
def _quiet() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def check_base(network: nn.Module, description: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` unless ``network`` is the one that the posterior was fitted on.

    Weights are compared to 1 % of their layer's size, so that a half-precision copy passes.
    """
    for name, saved in description["probes"].items():
        try:
            probe = torch.tensor(_probe(network, name))
        except AttributeError:
            raise CheckpointError(
                f"the posterior adapts a layer {name!r} that this {type(network).__name__} does "
                f"not have; it was fitted on a {description['class']} "
                f"({description.get('name_or_path') or 'built in memory'})"
            ) from None
        expected = torch.tensor(saved)
        difference = (probe - expected).abs()
        tolerance = 0.01 * expected[-PROBES:].abs().max()
        if probe.shape != expected.shape or (difference > tolerance).any():
            raise CheckpointError(
                f"the weights of layer {name!r} are not those that the posterior was fitted on "
                f"({description.get('name_or_path') or description['class']}); load the same model"
            )


def _probe(network: nn.Module, name: str) -> list[float]:
    """Shape and a few evenly spaced weights of a layer."""
    weight = unwrapped(network.get_submodule(name)).get_parameter("weight").detach()
    flat = weight.flatten()
    picks = torch.linspace(0, len(flat) - 1, PROBES, device=flat.device).long()
    return [*map(float, weight.shape), *flat[picks].float().tolist()]
