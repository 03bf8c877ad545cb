"""The base network of a saved posterior: described, recognised, loaded again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from pyrolora.adapters import plain_parameters
from pyrolora.errors import CheckpointError

PROBES = 8


def describe_base(network: nn.Module, heads: Iterable[str]) -> dict[str, Any]:
    """What recognises the network: its class, where it came from, a few numbers of each of its
    tensors outside of the task heads."""
    description: dict[str, Any] = {"class": type(network).__name__, "probes": probe(network, heads)}
    if isinstance(network, PreTrainedModel):
        config = network.config
        description |= {
            "name_or_path": config._name_or_path,
            "dtype": str(next(network.parameters()).dtype).removeprefix("torch."),
            "config": {
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
    config = {key: value for key, value in description["config"].items() if value is not None}
    config["id2label"] = {int(key): value for key, value in config["id2label"].items()}
    config["label2id"] = {value: key for key, value in config["id2label"].items()}
    try:
        with _quiet():  # transformers reports a missing head: the posterior brings its own
            network: PreTrainedModel = kind.from_pretrained(
                name, dtype=getattr(torch, description["dtype"]), **config
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot load the posterior's network, a {description['class']}, from {name!r} "
            f"({str(error).splitlines()[0]}); pass the network: pyrolora.load(path, model)"
        ) from error
    return network


def check_base(network: nn.Module, heads: Iterable[str], description: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` unless ``network`` is the one that the posterior was fitted on.

    Numbers are compared to 1 % of their tensor's largest, so that a half-precision copy passes.
    """
    origin = description.get("name_or_path") or "built in memory"
    remedy = f"the posterior was fitted on a {description['class']} ({origin}): load that model"
    found, saved = probe(network, heads), description["probes"]
    missing, foreign = sorted(set(saved) - set(found)), sorted(set(found) - set(saved))
    if missing or foreign:
        raise CheckpointError(
            f"this {type(network).__name__} has other weights: missing {missing[:2]}, unexpected "
            f"{foreign[:2]}; {remedy}"
        )
    for name, numbers in saved.items():
        expected, own = torch.tensor(numbers["values"]), torch.tensor(found[name]["values"])
        if numbers["shape"] != found[name]["shape"]:
            raise CheckpointError(
                f"the weight {name!r} has shape {found[name]['shape']}, not {numbers['shape']}; "
                f"{remedy}"
            )
        if own.numel() and not ((own - expected).abs() <= 0.01 * expected.abs().max()).all():
            raise CheckpointError(f"the weight {name!r} is not the one that was adapted; {remedy}")


@torch.no_grad()
def probe(network: nn.Module, heads: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """Tensor name -> its shape and a few evenly spaced numbers."""
    prefixes = tuple(f"{head}." for head in heads)
    probes = {}
    for name, parameter in plain_parameters(network):
        if not name.startswith(prefixes):
            flat = parameter.flatten()
            steps = torch.arange(PROBES, device=flat.device)  # whole numbers: exact at any size
            picks = steps * (len(flat) - 1) // (PROBES - 1) if len(flat) else steps[:0]
            probes[name] = {
                "shape": list(parameter.shape),
                "values": flat[picks].float().tolist(),
            }
    return probes


@contextmanager
def _quiet() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
