"""Activation (gradient) checkpointing of a network whose layers use what is bound to them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from pyrolora.adapters import bind, current_binding
from pyrolora.errors import ConfigError


def enable(network: nn.Module, options: dict[str, Any] | None, **kwargs: Any) -> None:
    """Enable activation checkpointing in ``network`` with these options of torch's.

    It is the non-reentrant one. The recomputation runs when the binding of the forward pass has
    ended, on a GPU in another thread; ``context_fn`` carries the binding over to it.

    Raises
    ------
    ConfigError
        For a network that has no such method, and for ``use_reentrant=True``.
    """
    options = dict(options or {})
    if options.pop("use_reentrant", False):
        raise ConfigError(
            "use_reentrant=True gives adapters inside the checkpointed layers no gradient; "
            "leave it out or pass use_reentrant=False"
        )
    options |= {"use_reentrant": False, "context_fn": _rebinding_contexts}
    method, keyword = _method_of(network)
    method(**{keyword: options}, **kwargs)


def disable(network: nn.Module) -> None:
    """Switch activation checkpointing of ``network`` off, and the gradient of its embeddings.

    transformers makes embeddings require a gradient for it, by hooks that it leaves behind.
    """
    unhook = getattr(network, "disable_input_require_grads", None)
    if callable(unhook):
        unhook()
    for prefix in ("activation", "gradient"):
        method = getattr(network, f"{prefix}_checkpointing_disable", None)
        if method is not None:
            method()
            return


def _rebinding_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), bind(current_binding())


def _method_of(network: Any) -> tuple[Callable[..., Any], str]:
    """Return the method that enables it, and its keyword for the options."""
    for prefix in ("activation", "gradient"):
        method = getattr(network, f"{prefix}_checkpointing_enable", None)
        if method is not None:
            return method, f"{prefix}_checkpointing_kwargs"
    raise ConfigError(
        f"{type(network).__name__} does not support activation checkpointing; leave it out"
    )
