"""Kernels that read the weights of layers without calling the layers: no adapter acts there.

Mamba's fused kernels read the output projections of its mixers; torch's fast path for attention
reads those of ``nn.TransformerEncoderLayer``, and can be switched off.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pyrolora.adapters.kinds import is_linear
from pyrolora.adapters.modules import model_type, walk
from pyrolora.adapters.wrapper import unwrapped

MAMBA_TYPES = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
"""transformers' names of the architectures for which PEFT refuses these layers."""
_REFUSED_BY_PEFT = ("out_proj", "conv1d")


def read_by_kernels(network: nn.Module) -> list[str]:
    """Return the names of the linear layers that Mamba's kernels may read without calling them.

    Mixers are recognised by their class, in whatever architecture: a hybrid has some, too.
    """
    modules = {name: unwrapped(module) for name, module in walk(network)}
    mixers = [name for name, module in modules.items() if "Mamba" in type(module).__name__]
    read = [f"{name}.out_proj" for name in mixers]
    return [name for name in read if name in modules and is_linear(modules[name])]


def refused_by_peft(layers: Iterable[str], network: nn.Module) -> list[str]:
    """Return those of ``layers`` that PEFT refuses for the kernels' sake.

    PEFT asks for the architecture and the ends of names, not for the mixers: `read_by_kernels` is
    another question.
    """
    if model_type(network) not in MAMBA_TYPES:
        return []
    return [name for name in layers if name.rpartition(".")[2] in _REFUSED_BY_PEFT]


_lock = threading.Lock()
_was_enabled: list[bool] = []


@contextmanager
def layers_called() -> Iterator[None]:
    """Switch torch's fast path for attention off for the block.

    It is a switch of the process, and on again when no thread needs it off.
    """
    with _lock:
        _was_enabled.append(torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        with _lock:
            enable = any(_was_enabled)
            _was_enabled.pop()
            if not _was_enabled:
                torch.backends.mha.set_fastpath_enabled(enable)
