"""A module that stands in another one's place without the network noticing."""

from __future__ import annotations

from typing import Any

from torch import nn

from pyrolora.adapters.compiled import Shown


class Wrapper(nn.Module):
    """A module in place of another one that the network keeps seeing.

    Attributes and the state dict are those of the wrapped module, so that wrapping changes
    neither what the network's code reads nor a key of what it saves.
    """

    base_layer: nn.Module
    shown: Shown | None = None
    """The part of the binding that is for it, for compiled code; None until some was shown one.

    Until then compiled code leaves its call to Python, which sees every binding.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._prefix = ""
        self.register_load_state_dict_post_hook(_restore_names)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Torch looks for a child's tensors below the child's name.
        self._prefix = prefix
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}base_layer.{key[len(prefix) :]}"] = state_dict.pop(key)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module itself, or the one that a wrapper of ours wraps."""
    return module.base_layer if isinstance(module, Wrapper) else module


def _restore_names(wrapper: nn.Module, incompatible: Any) -> None:
    """Report missing and unexpected keys under the names that the state dict has."""
    prefix = f"{wrapper._prefix}base_layer."
    for keys in (incompatible.missing_keys, incompatible.unexpected_keys):
        keys[:] = [
            f"{wrapper._prefix}{key[len(prefix) :]}" if key.startswith(prefix) else key
            for key in keys
        ]
