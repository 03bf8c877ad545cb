"""Attach adapters to a network, and undo everything where the work with them fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pyrolora.adapters import Attachment
from pyrolora.errors import NonFiniteError, SaveError


@contextmanager
def attached(network: nn.Module, attach: Callable[[], Attachment]) -> Iterator[Attachment]:
    """Attach adapters to ``network`` for good, unless the block raises.

    Then the network is what it was before: its own modules stand where the wrappers stood, every
    module is in its training mode, every parameter takes a gradient if it did, and a network that
    was on one device is there again. A `NonFiniteError` or `SaveError` with a posterior leaves the
    adapters on, since that posterior uses them.

    Parameters
    ----------
    network
        The network.
    attach
        Wraps its layers; what it raises is undone, too.
    """
    modes = {module: module.training for module in network.modules()}
    devices = _devices(network)
    attachment = None
    try:
        attachment = attach()
        yield attachment
    except BaseException as error:
        if isinstance(error, NonFiniteError | SaveError) and error.posterior is not None:
            raise
        if attachment is not None:
            attachment.detach()
        for module, mode in modes.items():
            module.training = mode
        if len(devices) == 1 and _devices(network) != devices:
            network.to(devices.pop())
        raise


def _devices(network: nn.Module) -> set[torch.device]:
    return {parameter.device for parameter in network.parameters()}
