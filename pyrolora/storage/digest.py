"""Digests of a network's weights: cheap, exact, the same on every device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyrolora.adapters import is_quantised
from pyrolora.progress import progress
from pyrolora.storage.tensors import tensors

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CODES = {"int8", "uint8", "float8_e4m3fn", "float8_e5m2"}  # dtypes that store quantised weights
ELEMENTS = 1 << 18  # per chunk: whole words of eight bytes in every dtype
MIX = -7046029254386353131  # odd, so that the product is one to one modulo 2⁶⁴


def digest(tensor: Tensor, dtype: torch.dtype | None = None) -> str:
    """Return a digest of the bits of ``tensor``, or of its rounding to ``dtype``.

    With v_i the bits in words of eight bytes,

        Σ_i (2 i + 1) m(v_i) mod 2⁶⁴,   m(v) = u ⊕ (u >> 32),   u = MIX · v mod 2⁶⁴.

    It is a sum of integers, and so the same in every order and on every device. m is one to one
    and 2 i + 1 odd: one changed word always changes the sum; several, or a permutation, all but
    surely (it guards against another network, not against somebody who builds a collision). The
    work is done in chunks, without a copy of the tensor unless it is not contiguous.
    """
    flat = tensor.detach().contiguous().view(-1)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    places = torch.arange(0, device=flat.device)
    for start in range(0, len(flat), ELEMENTS):
        chunk = flat[start : start + ELEMENTS].to(dtype or flat.dtype)
        words = _words(chunk).mul(MIX)
        words ^= words >> 32
        if len(places) < len(words):
            places = torch.arange(1, 2 * len(words), 2, device=flat.device)
        offset = start * chunk.element_size() // 8
        total += 2 * offset * words.sum() + words.mul_(places[: len(words)]).sum()
    return f"{int(total) % 2**64:016x}"


def digests(network: nn.Module, heads: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return tensor name -> shape, dtype and digests.

    They are the digests of the tensor, and of its roundings to other precisions that a copy of the
    network may be in.
    """
    entries: dict[str, dict[str, Any]] = {}
    known: dict[int, str] = {}
    alive = {id(parameter): parameter for parameter in network.parameters()}
    read = progress(tensors(network, heads), title="recognising the network")
    for name, tensor in read:
        tied = known.get(id(tensor))
        entries[name] = _entry(tensor) if tied is None else entries[tied]
        if id(tensor) in alive:  # an address that no other tensor gets meanwhile
            known.setdefault(id(tensor), name)
    return entries


def matches(tensor: Tensor, saved: Mapping[str, Any]) -> bool:
    """Return whether a tensor is the saved one, or one of the two is the other's rounding."""
    bits, dtype = saved["bits"], _name(tensor.dtype)
    if dtype in bits:
        return digest(tensor) == bits[dtype]
    rounded = FLOATS.get(saved["dtype"])
    if rounded is None or is_quantised(tensor.dtype):
        return False
    return digest(tensor, rounded) == bits[saved["dtype"]]


def quantised_layers(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return layer -> the name and dtype of its codes, such as ``"weight.nf4 uint8"``."""
    return {
        layer_of(name): f"{name.removeprefix(layer_of(name)).lstrip('.')} {entry['dtype']}"
        for name, entry in entries.items()
        if entry["dtype"] in CODES and entry["shape"]
    }


def layer_of(name: str) -> str:
    """Return the layer of a weight, of its codes or of its scales; of another tensor its module.

    A weight of codes has several tensors: ``"x.weight.nf4"`` and ``"x.weight.absmax"`` are of
    ``"x"``, and so is ``"x.SCB"``, but not ``"x.bias"``, which is no part of the weight.
    """
    module, _dot, last = name.rpartition(".")
    if last == "bias":
        return name
    before, found, _ = name.rpartition(".weight")
    return before if found else module


def _entry(tensor: Tensor) -> dict[str, Any]:
    dtypes = [None, *(dtype for dtype in FLOATS.values() if _loses(tensor.dtype, dtype))]
    return {
        "shape": list(tensor.shape),
        "dtype": _name(tensor.dtype),
        "bits": {_name(dtype or tensor.dtype): digest(tensor, dtype) for dtype in dtypes},
    }


def _words(chunk: Tensor) -> Tensor:
    """Return the bits as integers of eight bytes, with zeros at the end."""
    octets = chunk.view(torch.uint8)
    surplus = -len(octets) % 8
    if surplus or octets.storage_offset() % 8:
        octets = torch.cat([octets, octets.new_zeros(surplus)])
    return octets.view(torch.int64)


def _loses(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Return whether a cast to ``other`` changes numbers: all but widening does."""
    if dtype == other or is_quantised(dtype):
        return False
    return other.itemsize <= dtype.itemsize


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
