"""Digests of weights: exact, of every element and every place, whatever the layout."""

from __future__ import annotations

import pytest
import torch
from problems import bert, llama
from torch import Tensor, nn

from pyrolora.storage.digest import ELEMENTS, digest, digests, matches

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn]


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    drawn = 4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn > 0 if dtype is torch.bool else drawn.to(dtype)


def by_hand(tensor: Tensor) -> str:
    """The formula in Python's whole numbers."""
    octets = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    octets += bytes(-len(octets) % 8)
    total = 0
    for i in range(len(octets) // 8):
        u = int.from_bytes(octets[8 * i : 8 * i + 8], "little") * -7046029254386353131 % 2**64
        high = (u >> 32) | (0xFFFFFFFF << 32 if u >> 63 else 0)  # the shift keeps the sign
        total += (2 * i + 1) * (u ^ high)
    return f"{total % 2**64:016x}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 7, 1000])
def test_it_is_the_sum_of_the_formula(dtype: torch.dtype, size: int) -> None:
    tensor = numbers(size, dtype=dtype)
    assert digest(tensor) == by_hand(tensor)


def test_chunks_do_not_show() -> None:
    tensor = numbers(ELEMENTS + 5)
    assert digest(tensor) == by_hand(tensor)
    assert digest(tensor, torch.bfloat16) == by_hand(tensor.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_every_element_counts(dtype: torch.dtype) -> None:
    tensor = numbers(5, 7, dtype=dtype)
    seen = {digest(tensor)}
    for place in range(tensor.numel()):
        for change in (torch.neg, lambda x: torch.nextafter(x, torch.full_like(x, 100.0))):
            other = tensor.clone().view(-1)
            other[place] = change(other[place])
            seen.add(digest(other.view(5, 7)))
    assert len(seen) == 1 + 2 * tensor.numel()


def test_every_place_counts() -> None:
    tensor = numbers(40)
    seen = {digest(tensor)}
    for first in range(40):
        for second in range(first):
            other = tensor.clone()
            other[[first, second]] = other[[second, first]]
            seen.add(digest(other))
    assert len(seen) == 1 + 40 * 39 // 2
    assert digest(tensor.view(5, 8).T) != digest(tensor.view(5, 8))


def test_the_layout_in_memory_does_not_count() -> None:
    tensor = numbers(6, 7)
    assert digest(tensor.T.contiguous().T) == digest(tensor)
    padded = numbers(43)
    padded[1:] = tensor.flatten()
    assert digest(padded[1:]) == digest(tensor)  # it starts within a word


def test_tensors_that_change_places_are_seen_by_name() -> None:
    network = bert()
    before = digests(network, ["classifier"])
    layers = network.bert.encoder.layer
    layers[0], layers[1] = layers[1], layers[0]
    after = digests(network, ["classifier"])
    assert before.keys() == after.keys()
    key = "bert.encoder.layer.{}.attention.self.query.weight"
    assert before[key.format(0)] == after[key.format(1)] != after[key.format(0)]


def test_tied_weights_have_one_digest_under_both_names() -> None:
    found = digests(llama(tie_word_embeddings=True), [])
    assert found["lm_head.weight"] == found["model.embed_tokens.weight"]


def test_running_statistics_count_and_buffers_that_are_not_saved_do_not() -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    network.register_buffer("derived", torch.ones(2), persistent=False)
    before = digests(network, [])
    assert "1.running_mean" in before
    assert "derived" not in before
    network(torch.randn(4, 3))
    changed = {name for name, entry in digests(network, []).items() if entry != before[name]}
    assert {"1.running_mean", "1.running_var"} <= changed
    assert not changed & {"0.weight", "1.weight"}


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_copy_in_another_precision_matches_and_another_tensor_does_not(
    saved: torch.dtype, own: torch.dtype
) -> None:
    layer = nn.Linear(8, 8).to(saved)
    entry = digests(layer, [])["weight"]
    assert matches(layer.weight.to(own), entry)
    if saved is not torch.float32:  # what the saved ones were rounded from
        original = layer.weight.float() * (1 + 2**-13)
        assert matches(original, entry) == torch.equal(original.to(saved), layer.weight)
    other = layer.weight.to(own).clone()
    with torch.no_grad():
        other[3, 4] *= 1.01
    assert not matches(other, entry)


class Coded(Tensor):
    """A tensor of codes and a scale, as quantisation libraries make them."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Coded:
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)
        made.codes, made.scale = codes, scale
        return made

    def __tensor_flatten__(self):  # type: ignore[no-untyped-def]
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(func)


def coded(seed: int = 0) -> nn.Module:
    layer = nn.Linear(4, 4, bias=False)
    codes = numbers(4, 4, dtype=torch.int8, seed=seed)
    layer.weight = nn.Parameter(Coded(codes, torch.ones(())), requires_grad=False)
    return layer


def test_a_subclass_of_tensors_is_the_tensors_that_it_is_made_of() -> None:
    found = digests(coded(), [])
    assert found == digests(coded(), [])
    assert set(found) == {"weight.codes", "weight.scale"}
    assert found["weight.codes"] != digests(coded(1), [])["weight.codes"]
