"""The base network of all posteriors, loaded once."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyrolora.adapters import bare
from pyrolora.errors import CheckpointError, PyroLoraError
from pyrolora.loading import load
from pyrolora.posterior import Posterior
from pyrolora.serving.errors import DamagedPosteriorError, OtherBaseError
from pyrolora.storage import check_base, load_base, read_folder
from pyrolora.storage.configuration import NEUTRAL
from pyrolora.storage.description import Description

PATH = re.compile(r"(?<![\w.:/])/(?:[^\s/'\"(),;]+/)+")
"""The folders of an absolute path, which is no address."""
WRAPPER = ".base_layer"
"""The part that an adapted layer adds to the names of the parameters below it."""


class Networks:
    """Networks of one base: one per head, which all have the same tensors.

    A classifier of three classes, one of eight, and a language model on the same encoder are three
    modules of transformers. Those loaded later take over the tensors of the first that are equal,
    so the weights are in memory once.

    Parameters
    ----------
    model
        A network, or the hub id or folder that every posterior's network is loaded from.
    device
        The device of networks and posteriors; None: where the network is.
    """

    def __init__(
        self, model: str | Path | nn.Module, device: torch.device | str | None = None
    ) -> None:
        self.model = model
        self.device = device
        self._networks: dict[str, nn.Module] = {}
        self._lock = threading.Lock()

    def load(self, folder: Path) -> tuple[Posterior, str]:
        """Return the posterior in ``folder``, on the network that it shares with others.

        Its `family` comes second.

        Raises
        ------
        DamagedPosteriorError
            When the folder is incomplete, edited, or no posterior.
        OtherBaseError
            When the posterior was fitted on another network.
        """
        try:
            description = read_folder(folder).description
        except (PyroLoraError, OSError) as error:
            raise DamagedPosteriorError(_damaged(folder, error)) from error
        with self._lock:
            key = json.dumps([description.base["class"], description.base["config"]])
            network = self._network(key, folder, description.base)
            try:
                posterior = load(folder, network)
            except (PyroLoraError, OSError) as error:
                self._check_base(network, folder, description)
                raise DamagedPosteriorError(_damaged(folder, error)) from error
            self._networks.setdefault(key, network)
            if self.device is not None:
                posterior.model.to(self.device)
            return posterior, family(description)

    def detach(self, posterior: Posterior) -> None:
        """Take a posterior's adapters out of its network.

        Loading waits meanwhile, because it reuses the wrappers that it finds.
        """
        with self._lock:
            posterior.detach()

    def _network(self, key: str, folder: Path, base: dict[str, Any]) -> nn.Module:
        if isinstance(self.model, nn.Module):
            return self.model
        if key in self._networks:
            return self._networks[key]
        try:
            network = load_base(base, str(self.model))
        except CheckpointError as error:
            raise OtherBaseError(
                _of_other_base(folder, error, base, self.model), "model"
            ) from error
        share_tensors(network, self._networks.values())
        return network.to(self.device) if self.device is not None else network

    def _check_base(self, network: nn.Module, folder: Path, description: Description) -> None:
        try:
            check_base(bare(network), description.heads, description.base)
        except CheckpointError as error:
            raise OtherBaseError(
                _of_other_base(folder, error, description.base), "model"
            ) from error


def family(description: Description) -> str:
    """Return a digest that is equal for posteriors whose rows can share a pass.

    They have the same network but for its heads, and adapt the same layers.
    """
    base = description.base
    config = {name: value for name, value in base["config"].items() if name not in NEUTRAL}
    layers = sorted(spec.name for spec in description.specs)
    parts = [base["class"], config, base["weights"], layers, sorted(description.heads)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def share_tensors(network: nn.Module, others: Iterable[nn.Module]) -> None:
    """Replace parameters of ``network`` by equal ones of the same name in the ``others``."""
    known = {
        name.replace(WRAPPER, ""): parameter
        for other in others
        for name, parameter in other.named_parameters(remove_duplicate=False)
    }
    for prefix, module in network.named_modules():
        for leaf, parameter in module._parameters.items():
            twin = known.get(f"{prefix}.{leaf}".removeprefix("."))
            if parameter is not None and twin is not None and _equal(parameter, twin):
                module._parameters[leaf] = twin


def _equal(parameter: nn.Parameter, twin: nn.Parameter) -> bool:
    return (
        parameter.shape == twin.shape
        and parameter.dtype == twin.dtype
        and torch.equal(parameter.to(twin.device), twin)
    )


def _damaged(folder: Path, error: Exception) -> str:
    reason = _without_paths(error, folder)
    return f"the posterior {folder.name!r} cannot be loaded: {reason}"


def _of_other_base(
    folder: Path, error: Exception, base: dict[str, Any], model: str | Path = ""
) -> str:
    reason = _without_paths(error, folder, base["name_or_path"], model)
    return f"the posterior {folder.name!r} does not belong to the network of this server: {reason}"


def _without_paths(error: Exception, folder: Path, *others: str | Path | None) -> str:
    """Return the text of an error with the names of the server's folders in place of their paths.

    Paths that are known are replaced whole, since they may have spaces in them.
    """
    text = str(error).replace(str(folder), folder.name).replace(f"{folder.parent}/", "")
    for place in (*others, Path.cwd()):
        if place is not None and Path(place).is_absolute() and Path(place).name:
            text = text.replace(str(place), Path(place).name)
    return PATH.sub("", text)
