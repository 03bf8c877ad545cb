"""Compiled networks: how their code finds what is bound, and what runs without it."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from pyrolora.errors import ConfigError

uncompiled = _disable_dynamo
"""Keeps a function out of compiled code; unlike ``torch.compiler.disable``, it does not import the
compiler before that is needed."""

_compilers: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""Network -> the compiler of the ``torch.compile(network)`` in which it was last passed."""

_lock = threading.RLock()


def _forked() -> None:
    global _lock
    _lock = threading.RLock()  # the thread that held it is not there


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


@dataclass(frozen=True)
class Shown:
    """A part of a binding, as an attribute of the layer or head that it is for.

    The compiler turns the tensors in it to inputs of the code that it makes, which serves the next
    binding, too.

    Attributes
    ----------
    bound
        The factors of one setting, or the heads and the sizes of their blocks.
    several
        The factors of several draws, instead. Under one name, tensors with and without a dimension
        of draws would make the compiler take none of their sizes for constant.
    rows
        A tensor with as many rows as the pass: a number would be a constant of the code.
    """

    rows: Tensor
    bound: Any = None
    several: Any = None


UNBOUND = Shown(torch.empty(1, 0))
"""Nothing, to a wrapper that was shown a part of a binding before."""


@contextmanager
def shown(parts: Mapping[Any, Shown]) -> Iterator[None]:
    """Have compiled code see ``parts``, wrapper -> what is bound to it, in the block.

    One thread at a time does: the attributes are the network's.
    """
    with _lock:
        before = {wrapper: wrapper.shown for wrapper in parts}
        try:
            for wrapper, part in parts.items():
                wrapper.shown = part
            yield
        finally:
            for wrapper, value in before.items():
                wrapper.shown = UNBOUND if value is None else value


def bare(network: Any) -> Any:
    """Return the network in a ``torch.compile(network)``, and anything else as it is.

    The names of its weights do not have the wrapper's ``_orig_mod``, and with `compiled_calls` it
    runs as the wrapper does.

    Raises
    ------
    ConfigError
        For a network with such a wrapper in the place of a part of it.
    """
    if not isinstance(network, nn.Module):
        return network
    inner: Any = network
    while "_orig_mod" in inner._modules:
        inner = inner._modules["_orig_mod"]
    for name, module in inner.named_modules():
        if "_orig_mod" in module._modules:
            raise ConfigError(
                f"the network's part {name!r} is the wrapper that torch.compile(part) returns, "
                f"which changes the names of the weights in it; put network.{name}._orig_mod back "
                "in its place, and compile it there with its method compile(), or the whole network"
            )
    if inner is network:
        _compilers.pop(network, None)
    else:
        _compilers[inner] = network.dynamo_ctx
    return inner


def is_compiled(network: nn.Module) -> bool:
    """Return whether a network runs compiled, in whole or in part."""
    return network in _compilers or any(
        module._compiled_call_impl is not None or has_compiled_forward(module)
        for module in network.modules()
    )


def has_compiled_forward(module: nn.Module) -> bool:
    """Return whether ``module.forward`` was replaced by compiled code."""
    return hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")


def uncompile(copied: nn.Module) -> None:
    """Give the modules of a copied network their own ``forward`` where it was compiled.

    That of a copy would run the modules that were copied.
    """
    for module in copied.modules():
        if not has_compiled_forward(module):
            continue
        forward = module.__dict__.pop("forward")._torchdynamo_orig_callable
        function = getattr(forward, "__func__", None)
        if function is not type(module).forward:
            module.forward = forward if function is None else MethodType(function, module)


def keep_compiled(copied: nn.Module, network: nn.Module) -> None:
    """Have the copy of a network run compiled as that does, or warn that it does not."""
    if network in _compilers:
        _compilers[copied] = _compilers[network]
    elif is_compiled(network):
        warnings.warn(
            "this guide owns a copy of the network, and torch does not copy compiled code: the "
            "copy is not compiled. Pass torch.compile(network), or "
            "training=TrainingArguments(torch_compile=True), or compile posterior.base afterwards",
            UserWarning,
            stacklevel=2,
        )


@contextmanager
def compiled_calls(network: nn.Module) -> Iterator[None]:
    """Run a network that was passed in ``torch.compile(network)`` as that does, in the block."""
    compiler = _compilers.get(network)
    if compiler is None or network._compiled_call_impl is not None:
        yield
        return
    network._compiled_call_impl = compiler(network._call_impl)
    try:
        yield
    finally:
        network._compiled_call_impl = None


@contextmanager
def compiled_in_place(network: nn.Module, **options: Any) -> Iterator[None]:
    """Have a network compiled, with options of ``torch.compile``, for the block."""
    network.compile(**options)
    try:
        yield
    finally:
        network._compiled_call_impl = None


@contextmanager
def eagerly(network: nn.Module) -> Iterator[None]:
    """Run a network without its compiled code, if it has some, in the block.

    The switch is the process's, so that one thread at a time has it. A fit that gives way to others
    in the block would wait for them, and they for the switch.
    """
    if not is_compiled(network):
        yield
        return
    with _lock, torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def after_calls(network: nn.Module, change: Callable[[Any], Any]) -> Iterator[None]:
    """Apply ``change`` to what the network returns to this thread, in the block.

    Others may run the network at the same time, and get what it returns. The change stays outside
    of compiled code, which would be made anew for each such function.
    """
    here = threading.get_ident()

    def changed(output: Any) -> Any:
        return change(output) if threading.get_ident() == here else output

    with _lock if is_compiled(network) else nullcontext(), compiled_calls(network):
        compiled = network._compiled_call_impl
        if compiled is None:
            handle = network.register_forward_hook(lambda _, __, output: changed(output))
            try:
                yield
            finally:
                handle.remove()
            return
        network._compiled_call_impl = lambda *args, **kwargs: changed(compiled(*args, **kwargs))
        try:
            yield
        finally:
            network._compiled_call_impl = compiled
