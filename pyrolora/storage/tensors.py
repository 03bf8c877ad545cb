"""Tensors that make a network's function, in a form that does not depend on their storage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from pyrolora.adapters import unwrapped, walk

NIBBLES = 32  # rows that bitsandbytes packs together on a CPU


@torch.no_grad()
def tensors(network: nn.Module, heads: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the parameters and persistent buffers outside of ``heads``.

    Names are those without our wrappers. The tensors are taken as each module would save them; a
    subclass of tensors (torchao's, quanto's) gives the tensors that it is made of, and a 4-bit
    weight of bitsandbytes what `_four_bit` makes of it.
    """
    prefixes = tuple(f"{head}." for head in heads)
    for name, module in walk(network):
        layer, entries = unwrapped(module), dict[str, Any]()
        prefix = f"{name}." if name else ""
        with align_module_device(layer):  # for an offloaded layer, the weights themselves
            if _is_four_bit(layer):  # to save it would change a packed weight in place
                nn.Module._save_to_state_dict(layer, entries, prefix, True)
            else:
                layer._save_to_state_dict(entries, prefix, True)
            for key, value in entries.items():
                if isinstance(value, Tensor) and not key.startswith(prefixes):
                    yield from _parts(key, value)


def _is_four_bit(layer: nn.Module) -> bool:
    return any(getattr(p, "quant_state", None) is not None for p in layer._parameters.values())


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if getattr(tensor, "quant_state", None) is not None:
        yield from _four_bit(name, tensor.data, tensor.quant_state)  # type: ignore[attr-defined]
    elif hasattr(tensor, "full_tensor"):  # sharded: all processes take part
        yield name, tensor.full_tensor()
    elif hasattr(tensor, "__tensor_flatten__"):
        for part in tensor.__tensor_flatten__()[0]:
            yield from _parts(f"{name}.{part}", getattr(tensor, part))
    else:
        yield name, tensor


def _four_bit(name: str, codes: Tensor, state: Any) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the codes of a 4-bit weight of bitsandbytes, and its scales in bfloat16.

    In the first pass on a CPU bitsandbytes packs the codes anew, rounds the scales to bfloat16 and
    transposes them. Both forms come to the same here.
    """
    scales = state.absmax
    if getattr(state, "packing_format_for_cpu", False):
        scales = scales.T
        rows, half = codes.shape
        packed = codes.reshape(-1, NIBBLES)
        pairs = torch.cat([packed & 15, packed >> 4], dim=-1)
        pairs = pairs.view(rows // NIBBLES, half, NIBBLES, 2).transpose(1, 2).reshape(-1, 2)
        codes = (pairs[:, 0] << 4) | pairs[:, 1]
    elif state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        scales = dequantize_blockwise(scales, state.state2) + state.offset
    yield f"{name}.{state.quant_type}", codes.contiguous().view(torch.uint8).flatten()
    yield f"{name}.absmax", scales.to(torch.bfloat16).flatten()
